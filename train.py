"""What `neumeta train` does, from a checkout: python train.py --config=digits --workdir=DIR."""

from neumeta_jax.commands import command_line
from neumeta_jax.commands.train import main

if __name__ == "__main__":
    command_line.run(main)
