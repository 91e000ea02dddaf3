from neumeta_jax.commands import command_line
from neumeta_jax.export.formats import __doc__, main  # noqa: F401

command_line.run(main)
