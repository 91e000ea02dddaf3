"""What all commands ask of JAX and of loggers, before anything else."""

import logging

import jax

from neumeta_jax.files import storage


def configure_jax() -> None:
    """Products of float32 in float32, and a compilation cache.

    GPUs round the factors to 10 bits otherwise, and TPUs to 7, which moments of activations and
    what is solved with them do not bear. Activations in bfloat16 are not affected.

    Compiled programs are kept in the user's cache folder, unless JAX was told where to, all of
    them: a start compiles dozens of small ones, which together take as long as a large one.
    """
    jax.config.update("jax_default_matmul_precision", "highest")
    if getattr(jax.config, "jax_compilation_cache_dir", None) is None:
        jax.config.update("jax_compilation_cache_dir", str(storage.cache_folder()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def quiet_logging() -> None:
    """This package's messages on standard error; orbax and absl only from errors on."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", force=True)
    logging.getLogger("neumeta_jax").setLevel(logging.INFO)
    for name in ("absl", "orbax", "jax"):
        logging.getLogger(name).setLevel(logging.ERROR)
