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

import pathlib
import statistics
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from neumeta_jax.commands import command_line
from neumeta_jax.core import hypernetwork as hyper
from neumeta_jax.core.inr import INR, Grid, PerTensorMLP, Projection, describe_inr
from neumeta_jax.errors import check
from neumeta_jax.evaluation import timing
from neumeta_jax.files import storage
from neumeta_jax.files.provenance import versions
from neumeta_jax.networks import cifar_resnet, cifar_spec
from neumeta_jax.report.tables import table

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
    "grid_nested": ("the first channels of learned values", Grid(1, resampling="nested")),
    "projection": ("learned values, projected", Projection()),
    "projection_modulated": (
        "learned values, projected, a factor of each kernel linear in the width",
        Projection(modulated=True),
    ),
}


FLAGS: command_line.Flags = {
    "depth": (int, 20, "Of the ResNet, 6n + 2."),
    "out": (str, "", "Folder of the results."),
    "repeats": (int, 20, "Generations of a kind."),
    "batch_size": (int, 500, "Of the forward pass."),
}


def measure(name: str, spec: Any, backbone: Any, args: flags.FlagValues) -> dict[str, Any]:
    """What is known of a kind."""
    description, inr = KINDS[name]
    blocks = cifar_spec.generated_blocks(spec, "inner")
    family = cifar_resnet.hypernetwork(spec, blocks, inr)
    params = jax.jit(hyper.init, static_argnums=1)(jax.random.key(0), family, backbone)
    images = jax.random.normal(jax.random.key(1), (args.batch_size, *spec.input_shape))
    _, network = timing.compiled(lambda p, x: cifar_resnet.apply(spec, p, x), backbone, images)
    rng = np.random.default_rng(0)

    def random_widths():
        return jnp.asarray(family.widths(rng.uniform(0.5, 1.0)))

    compile_seconds, generate = timing.compiled(
        lambda params, widths: hyper.generate(family, params, widths), params, random_widths()
    )
    times = timing.in_turns(
        {
            "generation": lambda: generate(params, random_widths()),
            "forward": lambda: network(backbone, images),
        },
        args.repeats,
    )
    generation = statistics.median(times["generation"])
    forward = statistics.median(times["forward"]) * NUM_IMAGES / args.batch_size
    num_inr = hyper.num_inr_params(params)
    return {
        "name": name,
        "description": description,
        "inr": describe_inr(inr),
        "num_inr_params": num_inr,
        "networks": num_inr / spec.num_params,
        "generation_seconds": generation,
        "forward_seconds": forward,
        "generation_to_forward": generation / forward,
        "compile_seconds": compile_seconds,
    }


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    ratio = f"generation / forward pass of {NUM_IMAGES:,} images"
    cells = [
        {
            "INR": row["name"],
            "": row["description"],
            "parameters": f"{row['num_inr_params']:,}",
            "networks": f"{row['networks']:.2f}",
            "generation s": f"{row['generation_seconds']:.3g}",
            ratio: f"{row['generation_to_forward']:.2g}",
            "compilation s": f"{row['compile_seconds']:.1f}",
        }
        for row in rows
    ]
    return table(cells, left=2)


def main(argv: Sequence[str]) -> None:
    _, args = command_line.parse(argv, FLAGS, config_required=False)
    check(args.out, "--out=DIR is required; the results go there.")
    command_line.check_at_least(args, repeats=1, batch_size=1)
    # A compilation that is read from a cache would be timed as one.
    jax.config.update("jax_enable_compilation_cache", False)

    spec, rows = cifar_spec.resnet_spec(args.depth, num_classes=100), []
    backbone = jax.jit(cifar_resnet.init_params, static_argnums=1)(jax.random.key(0), spec)
    for name in KINDS:
        rows.append(measure(name, spec, backbone, args))
        print(f"{name}: {rows[-1]['generation_seconds']:.3g} s", flush=True)

    document = {"depth": args.depth, "num_params": spec.num_params, "versions": versions()}
    document |= {"batch_size": args.batch_size, "repeats": args.repeats, "rows": rows}
    text = (
        f"{markdown(rows)}\n\nResNet{args.depth}, 100 classes, {spec.num_params:,} parameters; "
        f"{document['versions']['devices']}. Medians of {args.repeats} generations at random "
        f"widths, after compilation, and of as many forward passes of {args.batch_size} images, "
        f"which took turns; the latter are scaled to {NUM_IMAGES:,} images.\n"
    )
    path = pathlib.Path(args.out, f"inr_kinds_resnet{args.depth}")
    path.parent.mkdir(parents=True, exist_ok=True)
    storage.write_json(path.with_suffix(".json"), document)
    storage.write_text(path.with_suffix(".md"), text)
    print(f"\n{text}\nwrote {path}.json and .md")


if __name__ == "__main__":
    command_line.run(main)
