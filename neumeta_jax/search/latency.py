"""How long networks of a trained INR take on this machine, and what a change of size costs.

    python -m neumeta_jax.latency --workdir=/tmp/digits
    python -m neumeta_jax.latency --workdir=/tmp/digits --width_ratios=1,0.5 --spec=best.json

Each network is measured at its own shapes, without masked channels, in JAX (compiled, weights and
images on the device) and in onnxruntime on the CPU, where that is installed. One call of each is
timed in turn, in an order that is drawn anew each time, so that what else the machine does hits all
alike. No data set is needed: the images are noise, on which the time does not depend.

Writes latency.json and latency.csv into the work directory; `eval.py --report` shows them.
"""

import functools
import importlib.metadata
import importlib.util
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from neumeta_jax.commands import command_line
from neumeta_jax.core import hypernetwork as hyper
from neumeta_jax.errors import UsageError
from neumeta_jax.evaluation import timing
from neumeta_jax.evaluation.morphs import load_morph
from neumeta_jax.export import onnx as onnx_format, safetensors as saved
from neumeta_jax.export.network import INPUT_NAME, Network as Exported, Normalization
from neumeta_jax.files import storage
from neumeta_jax.networks import families
from neumeta_jax.networks.cifar_resnet import Params
from neumeta_jax.networks.cifar_spec import ResNetSpec
from neumeta_jax.networks.families import Family, Size
from neumeta_jax.report import page
from neumeta_jax.runs import evaluations, experiment as lab

BATCH_SIZES = (1, 64)
NUM_CALLS = 50
NUM_WARM_UP = 3
RUNTIMES = ("jax", "onnxruntime")


class Network(NamedTuple):
    """One network to measure: its name, ratio (None: of a file) and hidden widths."""

    name: str
    width_ratio: float | None
    widths: tuple[int, ...]


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """{"p50_ms", "p90_ms", "calls"} of the times of single calls.

    >>> percentiles([0.001, 0.002, 0.003])
    {'p50_ms': 2.0, 'p90_ms': 2.8, 'calls': 3}
    """
    p50, p90 = np.percentile(seconds, (50, 90))
    return {
        "p50_ms": round(1e3 * float(p50), 4),
        "p90_ms": round(1e3 * float(p90), 4),
        "calls": len(seconds),
    }


def peak_memory(compiled: jax.stages.Compiled) -> int | None:
    """Bytes that XLA reserves for one call: weights, images, logits and temporary buffers.

    None where the backend does not say. The program itself and the runtime are not in it.
    """
    found = compiled.memory_analysis()
    if found is None:
        return None
    return (
        found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes
    ) - found.alias_size_in_bytes


def measure(
    hypernetwork: Family,
    params: Mapping,
    networks: Sequence[Network],
    *,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    rounds: int = NUM_CALLS,
    runtimes: Sequence[str] = RUNTIMES,
    key: jax.Array | None = None,
    num_samples: int = 1,
) -> list[dict[str, Any]]:
    """A row of JSON types for each network.

    Args:
        hypernetwork, params: the family and its learned parameters.
        networks: what to measure.
        batch_sizes: images per call.
        rounds: calls of each network, batch size and runtime.
        runtimes: some of `RUNTIMES`.
        key, num_samples: of the noise that the networks are generated with.

    Returns:
        {"name", "width_ratio", "widths", "num_params", "num_macs",
         "latency": {runtime: {batch: `percentiles`}},
         "memory_bytes": {batch: `peak_memory` in JAX},
         "file_bytes": {"safetensors", "onnx"},
         "switch_ms": what a change to this network costs: "generate" (by a program that serves all
            sizes, and the cut to this one), then "compile" (JAX, the smallest batch) or
            "onnxruntime" (writing the graph and loading it)}.
    """
    largest = np.max([hypernetwork.full_widths, *(n.widths for n in networks)], axis=0).tolist()

    @jax.jit
    def generate(params, widths):
        return hyper.generate(
            hypernetwork, params, widths, sizes=largest, key=key, num_samples=num_samples
        )

    def draw(widths) -> tuple[Size, Params]:
        tree = jax.device_get(generate(params, np.array(widths, np.int32)))
        return hypernetwork.dense(tree, widths, largest)

    draw(networks[0].widths)  # compiled once for all
    rng, calls, rows = np.random.default_rng(0), {}, []
    for number, network in enumerate(networks):
        generation, (small, tree) = timing.timed(draw, network.widths)
        row: dict[str, Any] = {
            "name": network.name,
            "width_ratio": network.width_ratio,
            "widths": list(network.widths),
            "num_params": hypernetwork.num_params(network.widths),
            "num_macs": hypernetwork.num_macs(network.widths),
            "latency": {runtime: {} for runtime in runtimes},
            "memory_bytes": {},
            "file_bytes": {"safetensors": _safetensors_size(small, tree)},
            "switch_ms": {"generate": 1e3 * generation},
        }
        on_device = jax.device_put(tree)
        session = None
        if "onnxruntime" in runtimes:
            seconds, (session, size) = timing.timed(_load_onnx, cast("ResNetSpec", small), tree)
            row["switch_ms"]["onnxruntime"] = 1e3 * seconds
            row["file_bytes"]["onnx"] = size
        for batch in sorted(batch_sizes):
            shape = (batch, small.image_size, small.image_size, small.channels)
            pixels = rng.normal(size=shape).astype(np.float32)
            if "jax" in runtimes:
                images = jax.device_put(pixels)
                program = jax.jit(
                    lambda tree, images, small=small: families.run(small, tree, images)
                )
                seconds, compiled = timing.compiled(program, on_device, images)
                row["switch_ms"].setdefault("compile", 1e3 * seconds)
                row["memory_bytes"][str(batch)] = peak_memory(compiled)
                calls[number, "jax", batch] = functools.partial(compiled, on_device, images)
            if session is not None:
                feed = {INPUT_NAME: np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))}
                calls[number, "onnxruntime", batch] = functools.partial(session.run, None, feed)
        row["switch_ms"] = {name: round(value, 3) for name, value in row["switch_ms"].items()}
        rows.append(row)
    found = timing.in_turns(calls, rounds, warm_up=NUM_WARM_UP)
    for (number, runtime, batch), times in found.items():
        rows[number]["latency"][runtime][str(batch)] = percentiles(times)
    return rows


def _exported(spec: Size, params: Params) -> Exported:
    return Exported(spec, params, Normalization((0.0,) * spec.channels, (1.0,) * spec.channels))


def _load_onnx(spec: ResNetSpec, params: Params) -> tuple[Any, int]:
    """(a session on the CPU, the graph's size in bytes)."""
    import onnxruntime

    content = onnx_format.to_onnx(_exported(spec, params)).SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return session, len(content)


def _safetensors_size(spec: Size, params: Params) -> int:
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "net.safetensors"
        saved.save(path, _exported(spec, params))
        return path.stat().st_size


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """What `measure` found as plain text: latency and memory, then the cost of changes."""
    width = max([12, *(len(row["name"]) for row in rows)])
    lines = [
        f"{'network':>{width}}  {'MACs (M)':>8}  {'runtime':>11}  {'batch':>5}  {'p50 ms':>9}  "
        f"{'p90 ms':>9}  {'memory MiB':>10}"
    ]
    for row in table_rows(rows):
        memory = row["memory_bytes"]
        shown = f"{memory / 2**20:10.2f}" if memory is not None else f"{'':>10}"
        lines.append(
            f"{row['name']:>{width}}  {row['num_macs'] / 1e6:8.2f}  {row['runtime']:>11}  "
            f"{row['batch']:>5}  {row['p50_ms']:9.3f}  {row['p90_ms']:9.3f}  {shown}"
        )
    lines.append("\na change to this size, ms, and its files, KiB")
    for row in rows:
        costs = ", ".join(f"{name} {value:.1f}" for name, value in row["switch_ms"].items())
        files = ", ".join(f"{n} {size / 1024:.0f}" for n, size in row["file_bytes"].items())
        lines.append(f"{row['name']:>{width}}  {costs}; {files}")
    return "\n".join(lines)


def table_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each network, runtime and batch size."""
    kept = ("name", "width_ratio", "num_params", "num_macs", "widths")
    return [
        {
            **{name: row[name] for name in kept},
            "runtime": runtime,
            "batch": batch,
            **found,
            "memory_bytes": row["memory_bytes"].get(batch) if runtime == "jax" else None,
        }
        for row in rows
        for runtime, batches in row["latency"].items()
        for batch, found in batches.items()
    ]


# --- the command -----------------------------------------------------------------------------


FLAGS: command_line.Flags = {
    **command_line.WORKDIR,
    "width_ratios": (list, None, "Comma-separated; default: the config's."),
    "spec": (list, None, "JSON files of one network each, as of a search, to measure too."),
    "batch_sizes": (list, list(map(str, BATCH_SIZES)), "Images per call."),
    "calls": (int, NUM_CALLS, "Timed calls of each."),
    "out": (
        str,
        "",
        "The folder to write into; default: the work directory, where measurements of other "
        "networks are not replaced.",
    ),
}


def _networks(hypernetwork: Family, ratios: Sequence[float], files: Sequence[str]) -> list[Network]:
    found: dict[tuple[int, ...], Network] = {}
    for ratio in ratios:
        widths = tuple(hypernetwork.widths(ratio).tolist())
        found.setdefault(widths, Network(f"{ratio:g}", ratio, widths))
    for file in files:
        widths = load_morph(file, hypernetwork)
        found.setdefault(widths, Network(pathlib.Path(file).stem, None, widths))
    return list(found.values())


def main(argv: Sequence[str]) -> None:
    config, options = command_line.parse(argv, FLAGS, config_required=False)
    if not options.workdir:
        raise UsageError("Latency needs --workdir=DIR, a work directory of train.py.")
    if not all(size.isdecimal() and int(size) > 0 for size in options.batch_sizes):
        raise UsageError(
            "--batch_sizes takes integers of at least 1 with commas between, got "
            f"{','.join(options.batch_sizes)!r}."
        )
    command_line.check_at_least(options, calls=1)
    ratios = evaluations.parse_width_ratios(options.width_ratios)
    opened = lab.open_run(config, options)
    ratios = ratios or tuple(opened.config["eval"]["width_ratios"])
    networks = _networks(opened.hypernetwork, ratios, options.spec or ())
    folder = pathlib.Path(options.out or opened.workdir)
    evaluations.check_free(folder, {"latency": [network.widths for network in networks]})
    out = folder / page.LATENCY_FILE
    num_samples = opened.config["eval"]["num_samples"]

    runtimes = RUNTIMES
    versions: dict[str, Any] = lab.versions()
    if not isinstance(opened.hypernetwork.spec, ResNetSpec):
        runtimes = RUNTIMES[:1]
        print("note: only JAX is measured; ONNX graphs are written for CIFAR ResNets")
    elif all(map(importlib.util.find_spec, ("onnx", "onnxruntime"))):
        versions["onnxruntime"] = importlib.metadata.version("onnxruntime")
    else:
        runtimes = RUNTIMES[:1]
        print("note: without onnxruntime only JAX is measured; pip install 'neumeta-jax[export]'")
    device = f"{versions['devices']}; {lab.num_cores()} CPU cores"
    print(f"{len(networks)} networks, {options.calls} calls of each, on {device}", flush=True)

    cached = getattr(jax.config, "jax_enable_compilation_cache")  # noqa: B009, unknown to checkers
    jax.config.update("jax_enable_compilation_cache", False)  # compilation is measured too
    try:
        rows = measure(
            opened.hypernetwork,
            jax.tree.map(jnp.asarray, opened.params),
            networks,
            batch_sizes=[int(size) for size in options.batch_sizes],
            rounds=options.calls,
            runtimes=runtimes,
            key=jax.random.key(0) if num_samples > 1 else None,
            num_samples=num_samples,
        )
    finally:
        jax.config.update("jax_enable_compilation_cache", cached)
    print(format_table(rows))
    storage.write_json(out, {"device": device, "versions": versions, "rows": rows})
    storage.write_csv(out.with_suffix(".csv"), storage.as_table(table_rows(rows)))
    print(f"\nwrote {out} and latency.csv")


if __name__ == "__main__":
    command_line.run(main)
