"""Fetches public data sets and trained teachers, and compares their checksums.

    neumeta fetch
    neumeta fetch cifar100
    neumeta fetch cifar100-resnet56-teacher --dir=FOLDER

Without a name it lists what there is. Data sets go to ~/.cache/neumeta-jax/data ($XDG_CACHE_HOME),
where runs look for them that name no other folder, or to FOLDER, for --config.data.dir=FOLDER.
Teachers go to ~/.cache/neumeta-jax/teachers and are chosen by name, such as
--config.teacher.file=cifar100-resnet56-teacher. A file takes its name only when it is whole and has
the right checksum.
"""

from collections.abc import Sequence

from neumeta_jax.commands import command_line
from neumeta_jax.data import sources

FLAGS: command_line.Flags = {
    "dir": (str, "", "The folder to put the files into; default: the user's cache."),
}


def main(argv: Sequence[str]) -> None:
    names = [arg for arg in argv[1:] if not arg.startswith("-")]
    rest = [argv[0], *(arg for arg in argv[1:] if arg.startswith("-"))]
    _, options = command_line.parse(rest, FLAGS, config_required=False)
    if not names:
        for name, source in sources.SOURCES.items():
            host = source.address.split("/")[2]
            print(f"{name:26}{source.megabytes:4} MB  {source.terms} ({host})")
    for name in names:
        for done, path in sources.fetch(name, options.dir or None):
            print(f"{path} {done}", flush=True)
