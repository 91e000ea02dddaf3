"""How long networks of a trained INR take on this machine, and what a change of size costs.

    neumeta latency --workdir=DIR
    neumeta latency --workdir=DIR --width_ratios=1,0.5 --spec=best.json

Each network is measured at its own shapes, without masked channels, in JAX (compiled, weights and
images on the device) and in onnxruntime on the CPU, where that is installed. No data set is needed:
the images are noise, on which the time does not depend.

Writes latency.json and latency.csv into the work directory; `neumeta eval --report` shows them.
"""

import importlib.metadata
import importlib.util
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from neumeta_jax.commands import command_line, evaluations
from neumeta_jax.errors import check
from neumeta_jax.evaluation.choices import parse_width_ratios
from neumeta_jax.evaluation.morphs import load_morph
from neumeta_jax.export import onnx, safetensors
from neumeta_jax.export.network import Network as Exported, Normalization
from neumeta_jax.files import provenance, storage
from neumeta_jax.networks.cifar_resnet import Params
from neumeta_jax.networks.cifar_spec import ResNetSpec
from neumeta_jax.networks.families import Family, Size
from neumeta_jax.report import page
from neumeta_jax.runs.workdir import open_run
from neumeta_jax.search import latency
from neumeta_jax.search.latency import Network

FLAGS: command_line.Flags = {
    **command_line.WORKDIR,
    "width_ratios": (list, None, "Comma-separated; default: the config's."),
    "spec": (list, None, "JSON files of one network each, as of a search, to measure too."),
    "batch_sizes": (list, ["1", "64"], "Images per call."),
    "calls": (int, 50, "Timed calls of each."),
    "out": (
        str,
        "",
        "The folder to write into; default: the work directory, where measurements of other "
        "networks are not replaced.",
    ),
}


def _exported(size: Size, params: Params) -> Exported:
    return Exported(size, params, Normalization((0.0,) * size.channels, (1.0,) * size.channels))


def write_safetensors(size: Size, params: Params) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "net.safetensors"
        safetensors.save(path, _exported(size, params))
        return path.read_bytes()


def write_onnx(size: Size, params: Params) -> bytes:
    return onnx.to_onnx(_exported(size, params)).SerializeToString()


def _networks(family: Family, ratios: Sequence[float], files: Sequence[str]) -> list[Network]:
    found: dict[tuple[int, ...], Network] = {}
    for ratio in ratios:
        widths = tuple(family.widths(ratio).tolist())
        found.setdefault(widths, Network(f"{ratio:g}", ratio, widths))
    for file in files:
        widths = load_morph(file, family)
        found.setdefault(widths, Network(pathlib.Path(file).stem, None, widths))
    return list(found.values())


def main(argv: Sequence[str]) -> None:
    config, options = command_line.parse(argv, FLAGS, config_required=False)
    check(options.workdir, "Latency needs --workdir=DIR, a work directory of neumeta train.")
    check(
        all(size.isdecimal() and int(size) > 0 for size in options.batch_sizes),
        "--batch_sizes takes integers of at least 1 with commas between, got "
        f"{','.join(options.batch_sizes)!r}.",
    )
    command_line.check_at_least(options, calls=1)
    ratios = parse_width_ratios(options.width_ratios)
    opened = open_run(config, options)
    family, settings = opened.hypernetwork, opened.config["eval"]
    networks = _networks(family, ratios or settings["width_ratios"], options.spec or ())
    folder = pathlib.Path(options.out or opened.workdir)
    evaluations.check_free(folder, {"latency": [network.widths for network in networks]})

    writers: dict[str, latency.Writer] = {"safetensors": write_safetensors}
    versions: dict[str, Any] = provenance.versions()
    if not isinstance(family.spec, ResNetSpec):
        print("note: only JAX is measured; ONNX graphs are written for CIFAR ResNets")
    elif all(map(importlib.util.find_spec, ("onnx", "onnxruntime"))):
        writers["onnx"] = write_onnx
        versions["onnxruntime"] = importlib.metadata.version("onnxruntime")
    else:
        print("note: without onnxruntime only JAX is measured; pip install 'neumeta-jax[export]'")
    device = f"{versions['devices']}; {provenance.num_cores()} CPU cores"
    print(f"{len(networks)} networks, {options.calls} calls of each, on {device}", flush=True)

    cached = getattr(jax.config, "jax_enable_compilation_cache")  # noqa: B009, unknown to checkers
    jax.config.update("jax_enable_compilation_cache", False)  # compilation is measured too
    try:
        rows = latency.measure(
            family,
            jax.tree.map(jnp.asarray, opened.params),
            networks,
            batch_sizes=[int(size) for size in options.batch_sizes],
            rounds=options.calls,
            writers=writers,
            key=jax.random.key(0) if settings["num_samples"] > 1 else None,
            num_samples=settings["num_samples"],
        )
    finally:
        jax.config.update("jax_enable_compilation_cache", cached)
    print(latency.format_table(rows))
    out = folder / page.LATENCY_FILE
    storage.write_json(out, {"device": device, "versions": versions, "rows": rows})
    storage.write_csv(out.with_suffix(".csv"), storage.as_table(latency.table_rows(rows)))
    print(f"\nwrote {out} and latency.csv")
