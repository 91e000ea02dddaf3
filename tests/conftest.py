"""What all tests share: JAX on the CPU, cheap compilation, a compilation cache of this session.

Nearly all the time of these tests is compilation. The settings are environment variables too, so
that the programs that tests start see them.
"""

import os
import shutil
import tempfile

import jax

_CACHE = tempfile.mkdtemp(prefix="neumeta-jax-tests-")

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE
jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_compilation_cache_dir", _CACHE)


def pytest_unconfigure():
    shutil.rmtree(_CACHE, ignore_errors=True)
