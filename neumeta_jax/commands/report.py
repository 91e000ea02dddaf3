"""Makes the tables and figures of a folder of results from the files of the runs in it.

    neumeta report results --readme=docs/results.md

Reads every row.json (of `neumeta compare`), grid.json with the config.json beside it, and
depths.json below the folder. Writes the report, by default README.md in the folder, with a figure
of each comparison beside it (PNG and CSV), and puts the tables between two lines of another README:

    <!-- results: begin -->
    <!-- results: end -->
"""

import os
import pathlib
from collections.abc import Sequence

from neumeta_jax.commands import command_line
from neumeta_jax.errors import check
from neumeta_jax.files import storage
from neumeta_jax.report import tables
from neumeta_jax.report.comparisons import read_comparisons

FLAGS: command_line.Flags = {
    "out": (str, "", "The report; default: README.md in the folder."),
    "readme": (str, "", "A README to put the tables into as well."),
}


def main(argv: Sequence[str]) -> None:
    folders = [word for word in argv[1:] if not word.startswith("-")]
    check(len(folders) == 1, f"neumeta report takes one folder of results, got {folders}.")
    flags = [word for word in argv if word not in folders]
    _, options = command_line.parse(flags, FLAGS, config_required=False)
    root = pathlib.Path(command_line.local(folders[0], "the folder"))
    check(root.is_dir(), f"{root} must be a folder with the files of runs; there is none.")
    comparisons = read_comparisons(root)
    check(
        comparisons or tables.overview_table(root),
        f"{root} must hold a row.json or grid.json, but it has none.",
    )
    out = pathlib.Path(options.out or root / "README.md")
    texts = {out: tables.report(root, comparisons)}
    if options.readme:
        readme = pathlib.Path(options.readme)
        start = readme.resolve().parent
        prefix = pathlib.PurePath(os.path.relpath(root.resolve(), start)).as_posix() + "/"
        block = tables.readme_block(root, comparisons, prefix)
        texts[readme] = tables.replace_block(readme, block)
    for comparison in comparisons:
        tables.write_figure(out.parent / f"{comparison.stem}.png", comparison)
    for path, text in texts.items():
        storage.write_text(path, text)
        print(f"wrote {path}")
