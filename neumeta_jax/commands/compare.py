"""Makes a row of the comparison with other ways to a family of sizes; continues one that stopped.

    neumeta compare --config=baselines:slimmable --workdir=DIR --config.data.dir=FOLDER_OR_NPZ \\
        --config.teacher.file=cifar100_resnet20.npz --budget=0.5

A preset is a row: a method, or a recipe for INRs. All rows have the same family of networks (the
hidden widths of the generated blocks at a few ratios), teacher, augmentation, validation split,
evaluation and budget. Writes DIR/row.json; `neumeta report` makes tables of such files. Accuracies
are of the validation and the test split; both are read once, at the end.
"""

import pathlib
from collections.abc import Sequence

from neumeta_jax.commands import command_line, setup
from neumeta_jax.comparison import runner
from neumeta_jax.errors import check

FLAGS: command_line.Flags = {
    "workdir": (str, "", "Where the run lives; created if absent."),
    "budget": (float, 1.0, "Factor on baseline.images."),
    "trial": (
        bool,
        False,
        "Leave the test images alone and write no row, only print; for choosing rates.",
    ),
}


def shown_command(argv: Sequence[str]) -> str:
    """A command line that reads the same on any machine: of paths only the last part.

    >>> shown_command(["", "--config=/a/configs/baselines.py:slimmable", "--workdir=/tmp/b"])
    'neumeta compare --config=configs/baselines.py:slimmable --workdir=DIR'
    """
    words = ["neumeta compare"]
    for word in argv[1:]:
        flag, equals, value = word.partition("=")
        parts = pathlib.PurePath(value).parts
        shown = {"workdir": "DIR", "config": "/".join(parts[-2:])}
        words.append(flag + equals + shown.get(flag.lstrip("-"), parts[-1] if parts else value))
    return " ".join(words)


def main(argv: Sequence[str]) -> None:
    config, options = command_line.parse(argv, FLAGS, config_required=True)
    check(options.workdir, "--workdir=DIR is required; the run is kept and resumed there.")
    setup.quiet_logging()
    setup.configure_jax()
    runner.compare(
        config,
        options.workdir,
        budget=options.budget,
        trial=options.trial,
        command=shown_command(argv),
    )
