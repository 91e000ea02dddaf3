"""How long networks take on this machine, and what a change of size costs.

Each network is measured at its own shapes, without masked channels. One call of each is timed in
turn, in an order that is drawn anew each time, so that what else the machine does hits all alike.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from neumeta_jax.core import hypernetwork as hyper
from neumeta_jax.evaluation import timing
from neumeta_jax.networks import families
from neumeta_jax.networks.cifar_resnet import Params
from neumeta_jax.networks.families import Family, Size

NUM_WARM_UP = 3
Writer = Callable[[Size, Params], bytes]


class Network(NamedTuple):
    """One network to measure: its name, ratio (None: of a file) and hidden widths."""

    name: str
    width_ratio: float | None
    widths: tuple[int, ...]


def milliseconds(family: Family, widths: Sequence[int], *, batch: int, dtype: str) -> float:
    """The median of forward passes in JAX, jitted, for 0.3 s; with weights drawn at random."""
    rng, size = np.random.default_rng(0), family.at(widths)
    params = jax.tree.map(
        lambda x: jnp.asarray(0.05 * rng.normal(size=x.shape), x.dtype),
        families.abstract_params(size),
    )
    images = jnp.ones((batch, *family.spec.input_shape), dtype)
    network = jax.jit(functools.partial(families.run, size))
    times = timing.in_turns({"": lambda: network(params, images)}, 10, seconds=0.3)
    return 1e3 * float(np.median(times[""]))


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Of the times of single calls.

    >>> percentiles([0.001, 0.002, 0.003])
    {'p50_ms': 2.0, 'p90_ms': 2.8, 'calls': 3}
    """
    p50, p90 = (1e3 * np.percentile(seconds, (50, 90))).round(4).tolist()
    return {"p50_ms": p50, "p90_ms": p90, "calls": len(seconds)}


def peak_memory(compiled: jax.stages.Compiled) -> int | None:
    """Bytes that XLA reserves for one call, its program left out; None if it does not say."""
    found = compiled.memory_analysis()
    if found is None:
        return None
    used = found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes
    return used - found.alias_size_in_bytes


def measure(
    family: Family,
    params: Mapping,
    networks: Sequence[Network],
    *,
    batch_sizes: Sequence[int],
    rounds: int,
    writers: Mapping[str, Writer],
    key: jax.Array | None = None,
    num_samples: int = 1,
) -> list[dict[str, Any]]:
    """A row of JSON types for each network.

    Args:
        family, params: the family and its learned parameters.
        networks: what to measure.
        batch_sizes: images per call.
        rounds: calls of each network, batch size and runtime.
        writers: of the formats whose files are measured; what "onnx" writes is also run on the CPU.
        key, num_samples: of the noise that the networks are generated with.

    Returns:
        The fields of `Network`, "num_params", "num_macs", "latency" ({"jax" or "onnxruntime":
        {batch: `percentiles`}}), "memory_bytes" ({batch: `peak_memory` in JAX}), "file_bytes" by
        format, and "switch_ms", what a change to this network costs: "generate" (by a program that
        serves all sizes, and the cut to this one), then "compile" (JAX, the smallest batch) or
        "onnxruntime" (writing the graph and loading it).
    """
    largest = np.max([family.full_widths, *(n.widths for n in networks)], axis=0).tolist()
    options = {"sizes": largest, "key": key, "num_samples": num_samples}
    generate = jax.jit(lambda params, row: hyper.generate(family, params, row, **options))

    def draw(widths):
        tree = jax.device_get(generate(params, np.array(widths, np.int32)))
        return family.dense(tree, widths, largest)

    draw(networks[0].widths)  # compiled once for all
    rng, calls, rows = np.random.default_rng(0), {}, []
    for number, network in enumerate(networks):
        seconds, (size, tree) = timing.timed(draw, network.widths)
        switch, memory, files = {"generate": seconds}, {}, {}
        on_device, session = jax.device_put(tree), None
        for name, write in writers.items():
            seconds, (content, loaded) = timing.timed(_write, name, write, size, tree)
            files[name] = len(content)
            if loaded:
                session, switch["onnxruntime"] = loaded, seconds
        for batch in sorted(batch_sizes):
            pixels = rng.normal(size=(batch, *family.spec.input_shape)).astype(np.float32)
            images = jax.device_put(pixels)
            program = jax.jit(functools.partial(families.run, size))
            seconds, compiled = timing.compiled(program, on_device, images)
            switch.setdefault("compile", seconds)
            memory[str(batch)] = peak_memory(compiled)
            calls[number, "jax", batch] = functools.partial(compiled, on_device, images)
            if session:
                pixels = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
                feed = {session.get_inputs()[0].name: pixels}
                calls[number, "onnxruntime", batch] = functools.partial(session.run, None, feed)
        row = {**network._asdict(), "widths": list(network.widths)}
        row |= {name: getattr(family, name)(network.widths) for name in ("num_params", "num_macs")}
        row |= {"latency": {}, "memory_bytes": memory, "file_bytes": files}
        row["switch_ms"] = {name: round(1e3 * value, 3) for name, value in switch.items()}
        rows.append(row)
    found = timing.in_turns(calls, rounds, warm_up=NUM_WARM_UP)
    for (number, runtime, batch), times in found.items():
        rows[number]["latency"].setdefault(runtime, {})[str(batch)] = percentiles(times)
    return rows


def _write(name: str, write: Writer, size: Size, params: Params) -> tuple[bytes, Any]:
    """The content of a file and, of ONNX, a session on the CPU that runs it."""
    content = write(size, params)
    if name != "onnx":
        return content, None
    import onnxruntime

    return content, onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])


def table_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each network, runtime and batch size."""
    table = []
    for row in rows:
        kept = {n: row[n] for n in ("name", "width_ratio", "num_params", "num_macs", "widths")}
        for runtime, batches in row["latency"].items():
            memory = row["memory_bytes"] if runtime == "jax" else {}
            for batch, found in batches.items():
                called = {"runtime": runtime, "batch": batch, **found}
                table.append({**kept, **called, "memory_bytes": memory.get(batch)})
    return table


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """What `measure` found as plain text: latency and memory, then the cost of changes."""
    table = [("network", "MACs (M)", "runtime", "batch", "p50 ms", "p90 ms", "memory MiB")]
    for row in table_rows(rows):
        memory = "" if row["memory_bytes"] is None else f"{row['memory_bytes'] / 2**20:.2f}"
        times = f"{row['p50_ms']:.3f}", f"{row['p90_ms']:.3f}"
        macs = f"{row['num_macs'] / 1e6:.2f}"
        table.append((row["name"], macs, row["runtime"], row["batch"], *times, memory))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(map(str.rjust, line, widths)) for line in table]
    lines.append("\na change to this size, ms, and its files, KiB")
    for row in rows:
        costs = ", ".join(f"{name} {value:.1f}" for name, value in row["switch_ms"].items())
        files = ", ".join(f"{n} {size / 1024:.0f}" for n, size in row["file_bytes"].items())
        lines.append(f"{row['name'].rjust(widths[0])}  {costs}; {files}")
    return "\n".join(lines)
