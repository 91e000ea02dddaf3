"""Train one function and get from it every size of a network."""

import importlib
from typing import Any

__version__ = "0.2.0"

# Public names by module. They are imported when they are used: a look at the package needs no JAX.
_PUBLIC = {
    "networks.saved": ("load",),
    "elastic.counting": ("num_macs", "num_params"),
    "elastic.family": ("Family", "apply_at", "trace"),
    "elastic.folding": ("fold",),
    "elastic.groups": ("Groups",),
    "core.hypernetwork": ("Hypernetwork", "generate", "init"),
    "core.inr": ("make_inr",),
    "core.start": ("fill_terms",),
    "elastic.moments": ("moments",),
    "elastic.ordering": ("by_importance", "smooth"),
    "elastic.refit": ("refit",),
    "elastic.resize": ("mask_params", "permute", "slice_params"),
    "runs.fitting": ("fit",),
}
_MODULES = {name: module for module, names in _PUBLIC.items() for name in names}
__all__ = sorted(_MODULES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
