"""What `neumeta eval` does, from a checkout: python eval.py --workdir=DIR."""

from neumeta_jax.commands import command_line
from neumeta_jax.commands.eval import main

if __name__ == "__main__":
    command_line.run(main)
