"""What the kinds of INR cost: parameters, time to generate a network, time to compile.

    python benchmarks/inr_kinds.py --depth=20 --out=DIR
    python benchmarks/inr_kinds.py --depth=56 --out=DIR

For a CIFAR ResNet of 100 classes. A kind generates the full-shaped tree of a network of random
width, once (the papers average 100 noisy samples, which takes 100 times as long). Times depend on
the machine and on what else it does, so each is also given as a ratio to one forward pass of
10,000 images of the full-size folded network: generations and forward passes of one batch take
turns, and the median of the batches is scaled by the number of images. The weights are random;
no time depends on them.

The papers' INR of a ResNet56 has 187.8 M parameters and takes a minute or more of a CPU.

Writes inr_kinds_resnet<depth>.json and .md to --out.
"""

import argparse
import json
import pathlib
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from neumeta_jax.commands.command_line import run
from neumeta_jax.core import hypernetwork as hyper
from neumeta_jax.core.inr import INR, Grid, PerTensorMLP, Projection, describe_inr
from neumeta_jax.errors import UsageError
from neumeta_jax.evaluation import timing
from neumeta_jax.networks import cifar_resnet, cifar_spec
from neumeta_jax.networks.cifar_resnet import ResNetHypernetwork
from neumeta_jax.runs import experiment as lab

NUM_IMAGES = 10_000
KINDS: dict[str, tuple[str, INR]] = {
    "per_tensor_mlp_htty": (
        "an MLP per tensor, 512 x 8, 32 frequencies (arXiv 2505.05510)",
        PerTensorMLP(hidden_width=512, num_layers=8, num_frequencies=32, activation="elu"),
    ),
    "per_tensor_mlp_neumeta": (
        "an MLP per tensor, 256 x 4, 16 frequencies (arXiv 2410.11878)",
        PerTensorMLP(hidden_width=256, num_layers=4, num_frequencies=16, activation="relu"),
    ),
    "grid_cell": ("values averaged over cells, linear in the width", Grid(num_terms=2)),
    "grid_nested": (
        "the first channels of learned values",
        Grid(num_terms=1, resampling="nested"),
    ),
    "projection": ("learned values, projected", Projection()),
    "projection_modulated": (
        "learned values, projected, a factor of each kernel linear in the width",
        Projection(modulated=True),
    ),
}


def measure(
    name: str,
    family: ResNetHypernetwork,
    backbone: Any,
    forward: Callable[[], Any],
    *,
    batch_size: int,
    repeats: int,
) -> dict[str, Any]:
    """One line of the table; `forward` runs one batch."""
    params = jax.jit(hyper.init, static_argnums=1)(jax.random.key(0), family, backbone)
    full = np.array(family.full_widths)
    rng = np.random.default_rng(0)

    def random_widths():
        ratio = rng.uniform(0.5, 1.0)
        return jnp.asarray(np.maximum(1, np.floor(ratio * full + 0.5)), jnp.int32)

    compile_seconds, generate = timing.compiled(
        lambda p, w: hyper.generate(family, p, w), params, random_widths()
    )
    calls = {"generation": lambda: generate(params, random_widths()), "forward": forward}
    times = timing.in_turns(calls, repeats)
    generation = statistics.median(times["generation"])
    forward_pass = statistics.median(times["forward"]) * NUM_IMAGES / batch_size
    num_inr = hyper.num_inr_params(params)
    return {
        "name": name,
        "description": KINDS[name][0],
        "inr": describe_inr(family.inr),
        "num_inr_params": num_inr,
        "networks": num_inr / family.spec.num_params,
        "generation_seconds": generation,
        "forward_seconds": forward_pass,
        "generation_to_forward": generation / forward_pass,
        "compile_seconds": compile_seconds,
        "repeats": repeats,
    }


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    header = (
        "INR",
        "",
        "parameters",
        "networks",
        "generation s",
        f"generation / forward pass of {NUM_IMAGES:,} images",
        "compilation s",
    )
    lines = [header, ("---", "---", *("---:",) * 5)]
    for row in rows:
        lines.append(
            (
                row["name"],
                row["description"],
                f"{row['num_inr_params']:,}",
                f"{row['networks']:.2f}",
                f"{row['generation_seconds']:.3g}",
                f"{row['generation_to_forward']:.2g}",
                f"{row['compile_seconds']:.1f}",
            )
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--depth", type=int, default=20, help="of the ResNet, 6n + 2")
    parser.add_argument("--out", required=True, type=pathlib.Path, help="folder of the results")
    parser.add_argument("--kinds", default="", help="names with commas between; default all")
    parser.add_argument("--repeats", type=int, default=20, help="generations of a kind")
    parser.add_argument("--batch_size", type=int, default=500, help="of the forward pass")
    args = parser.parse_args(list(argv[1:]))
    names = [name.strip() for name in args.kinds.split(",") if name.strip()] or list(KINDS)
    unknown = [name for name in names if name not in KINDS]
    if unknown:
        raise UsageError(f"--kinds must be among {', '.join(KINDS)}, got {', '.join(unknown)}.")
    if min(args.repeats, args.batch_size) < 1:
        raise UsageError(
            f"--repeats and --batch_size must be at least 1, got {args.repeats} and "
            f"{args.batch_size}."
        )
    args.out.mkdir(parents=True, exist_ok=True)
    # A compilation that is read from a cache would be timed as one.
    jax.config.update("jax_enable_compilation_cache", False)

    spec = cifar_spec.resnet_spec(args.depth, num_classes=100)
    blocks = cifar_spec.generated_blocks(spec, "inner")
    backbone = jax.jit(cifar_resnet.init_params, static_argnums=1)(jax.random.key(0), spec)
    shape = (args.batch_size, spec.image_size, spec.image_size, spec.channels)
    images = jax.random.normal(jax.random.key(1), shape)
    _, network = timing.compiled(lambda p, x: cifar_resnet.apply(spec, p, x), backbone, images)

    rows = []
    for name in names:
        rows.append(
            measure(
                name,
                cifar_resnet.hypernetwork(spec, blocks, inr=KINDS[name][1]),
                backbone,
                lambda: network(backbone, images),
                batch_size=args.batch_size,
                repeats=args.repeats,
            )
        )
        print(f"{name}: {rows[-1]['generation_seconds']:.3g} s", flush=True)

    versions = lab.versions()
    document = {
        "depth": args.depth,
        "num_params": spec.num_params,
        "num_blocks": len(blocks),
        "batch_size": args.batch_size,
        "rows": rows,
        "versions": versions,
    }
    note = (
        f"ResNet{args.depth}, 100 classes, {spec.num_params:,} parameters, {len(blocks)} generated "
        f"blocks; {versions['devices']}. Medians of {args.repeats} generations at random "
        f"widths, after compilation, and of as many forward passes of {args.batch_size} images, "
        f"which took turns; the latter are scaled to {NUM_IMAGES:,} images."
    )
    text = f"{markdown(rows)}\n\n{note}\n"
    path = args.out / f"inr_kinds_resnet{args.depth}"
    path.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
    path.with_suffix(".md").write_text(text)
    print(f"\n{text}\nwrote {path}.json and .md")


if __name__ == "__main__":
    run(main)
