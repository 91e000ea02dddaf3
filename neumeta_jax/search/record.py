"""What a search keeps in its folder."""

import collections
import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from neumeta_jax.errors import UsageError, check
from neumeta_jax.files import storage
from neumeta_jax.files.provenance import differences
from neumeta_jax.search.budgets import Widths
from neumeta_jax.search.evolution import Candidate, Score

STATE_FILE = "candidates.json"


@dataclasses.dataclass
class Record:
    """A search as far as it has come.

    Attributes:
        path: its file.
        settings: what its networks and scores depend on.
        archive: the networks that were evaluated.
        containers, strategy: of `Evaluator.plan`, shapes and how they were evaluated.
        facts: by widths, of some networks, "latency_ms" and, on the whole validation and test
            splits, "validation_accuracy", "validation_loss", "test_accuracy" and "test_loss".
        noise: by how many milliseconds two measurements of one network differed.
        seconds: spent on the archive.
    """

    path: pathlib.Path
    settings: dict[str, Any]
    archive: list[Candidate] = dataclasses.field(default_factory=list)
    containers: list[Widths] = dataclasses.field(default_factory=list)
    strategy: str = "auto"
    facts: dict[Widths, dict[str, float]] = dataclasses.field(
        default_factory=lambda: collections.defaultdict(dict)
    )
    noise: float | None = None
    seconds: float = 0.0

    def write(self) -> None:
        fields = {**vars(self), "facts": list(self.facts.items())}
        storage.write_json(self.path, {name: fields[name] for name in fields if name != "path"})


def read_record(path: pathlib.Path, settings: Mapping[str, Any]) -> Record:
    """The search in `path`, or a new one where there is no such file.

    Raises:
        UsageError: if the file is damaged, or of a search with other settings, naming them.
    """
    given = json.loads(json.dumps(settings))
    if not path.exists():
        return Record(path, given)
    try:
        fields: dict[str, Any] = json.loads(path.read_text())
        fields["archive"] = [Candidate(tuple(w), Score(*s), n) for w, s, n in fields["archive"]]
        fields["containers"] = list(map(tuple, fields["containers"]))
        facts = {tuple(widths): dict(found) for widths, found in fields["facts"]}
        fields["facts"] = collections.defaultdict(dict, facts)
        record = Record(path, **fields)
        differing = ", ".join(differences(dict(record.settings), given))
    except (ValueError, TypeError, KeyError):
        raise UsageError(
            f"{path} must hold a search of this version, but it is damaged or older; remove it to "
            "start anew."
        ) from None
    check(
        not differing,
        f"{path} is of a search with other settings; these differ: {differing}; use the saved "
        "values or another --out.",
    )
    return record
