"""What all tests share: JAX on the CPU, cheap compilation, a compilation cache kept between runs.

Nearly all the time of these tests is compilation. The settings are environment variables too, so
that the programs that tests start see them.
"""

import gc
import os
import pathlib

import jax

_CACHE_HOME = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
_SETTINGS = {
    "jax_platforms": os.environ.get("JAX_PLATFORMS", "cpu"),
    "jax_disable_most_optimizations": True,
    "jax_compilation_cache_dir": os.environ.get(
        "JAX_COMPILATION_CACHE_DIR", str(_CACHE_HOME / "neumeta-jax-tests")
    ),
    "jax_persistent_cache_min_compile_time_secs": 0.0,
}
for _name, _value in _SETTINGS.items():
    os.environ[_name.upper()] = str(int(_value) if isinstance(_value, bool) else _value)
    jax.config.update(_name, _value)

# This code generator of XLA compiles in half the time. Later versions do without it, and end a
# process that is given a flag which they do not know.
if jax.__version_info__ < (0, 11):
    _EARLIER = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = f"{_EARLIER} {os.environ.get('XLA_FLAGS', '')}".strip()

# Each of them takes the longest of what is left where they start, so that they start first.
_LONG = (
    "test_docs",
    "test_recipe",
    "test_training",
    "test_devices",
    "test_hosts",
    "test_hypernetwork",
)


def pytest_xdist_auto_num_workers():
    """A process for each core, and no other than pytest's own where there is one core."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(cores, 8) if cores and cores > 1 else 0


def pytest_runtest_teardown(item, nextitem):
    """Compiled programs take maps of memory, of which Linux allows a process 65,530.

    All tests together would need more; those of a module take up to 14,000.
    """
    maps, last = pathlib.Path("/proc/self/maps"), nextitem is None or nextitem.path != item.path
    if last and maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()
        gc.collect()


def pytest_collection_modifyitems(items):
    """Long modules first, so that no worker is left with one when the others are done."""
    order = {name: number for number, name in enumerate(_LONG)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))
