"""What today's code computes, small enough to keep; `test_golden.py` compares it with later code.

    python tests/golden/make.py

writes, beside this file,

    projection.npz, grid.npz, per_tensor_mlp.npz    of each INR kind the networks of two widths,
                                                    one update step, one export
    resnet20.json, resnet56.json                    counts, stacks of tensors, groups of channels,
                                                    orders by smoothness and by importance

Weights are drawn by NumPy's RandomState, whose numbers never change, so that nothing that is
compared hangs on how parameters are initialised; the keys of the step are JAX's. Write the files
again only where another result is wanted, and say why in the commit.
"""

import dataclasses
import functools
import json
import pathlib
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from neumeta_jax.core import hypernetwork as hyper
from neumeta_jax.core.inr import Grid, PerTensorMLP, Projection
from neumeta_jax.core.recipe import InrRecipe
from neumeta_jax.core.update import inr_update, phase_inputs, start_phase
from neumeta_jax.data.preprocessing import Images, Preprocessing
from neumeta_jax.elastic import ordering
from neumeta_jax.export import safetensors as saved
from neumeta_jax.export.network import Network, Normalization, draw
from neumeta_jax.networks import cifar_resnet
from neumeta_jax.networks.cifar_resnet import ResNetHypernetwork
from neumeta_jax.networks.cifar_spec import ResNetSpec, generated_blocks, morph, resnet_spec

FOLDER = pathlib.Path(__file__).resolve().parent
SPEC = resnet_spec(14, num_classes=5, stage_widths=(4, 6, 8), image_size=8)
SMALL = resnet_spec(8, num_classes=5, stage_widths=(4, 6, 8), image_size=8)
INRS = {
    "projection": Projection(modulated=True, depth_term=True, max_cell=1.75),
    "grid": Grid(noise_scale=0.5),
    "per_tensor_mlp": PerTensorMLP(
        hidden_width=6, num_layers=3, num_frequencies=3, noise_scale=0.5, noise_per="channel"
    ),
}
RATIOS = (1.0, 0.4)
RECIPE = InrRecipe(
    mode="at_once",
    batch_size=4,
    num_random_sizes=2,
    alpha_init=0.7,
    sandwich=True,
    per_block_widths=0.5,
    ce_weight=1.0,
    distillation_weight=0.5,
    temperature=2.0,
    learning_rate=1e-2,
    alpha_learning_rate=1e-2,
    learned_learning_rate=1e-2,
    ema_decay=0.9,
    learned="all",
    schedule="cosine",
)
# Of each kind the optimiser that its configs have.
OPTIMIZERS = {"projection": "muon", "grid": "muon", "per_tensor_mlp": "adamw"}
PREPROCESSING = Preprocessing((0.5,) * 3, (0.25,) * 3, crop_padding=1)
DEPTHS = (20, 56)


def flat(tree: Any) -> dict[str, np.ndarray]:
    """The leaves of nested dicts by their path, such as "inr/stage1_conv1_kernel/values"."""
    return {
        "/".join(str(getattr(key, "key", getattr(key, "name", key))) for key in path): (
            np.asarray(leaf)
        )
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def drawn(tree: Any, seed: int, scale: float = 0.2) -> Any:
    """A tree of the shapes of `tree`, float32 normal; matrices "moments" are positive definite."""
    rng = np.random.RandomState(seed)
    values = {}
    for name, leaf in flat(tree).items():
        value = scale * rng.normal(size=leaf.shape)
        if name.endswith("moments"):
            value = np.einsum("...ik,...jk->...ij", value, value) + 0.1 * np.eye(leaf.shape[-1])
        values[name] = value.astype(np.float32)
    leaves = iter(values.values())
    return jax.tree.map(lambda _: jnp.asarray(next(leaves)), tree)


def start(family: ResNetHypernetwork) -> tuple[Any, Any]:
    """A backbone and the parameters of `family`, both drawn."""
    backbone = drawn(cifar_resnet.init_params(jax.random.key(0), family.spec), seed=1)
    shapes = jax.eval_shape(lambda key: hyper.init(key, family, backbone), jax.random.key(0))
    return backbone, drawn(jax.tree.map(lambda x: np.zeros(x.shape), shapes), seed=2)


def inr_case(kind: str) -> dict[str, np.ndarray]:
    """What a kind generates, exports and learns in a step: arrays by name."""
    family = cifar_resnet.hypernetwork(SPEC, generated_blocks(SPEC), INRS[kind])
    _, params = start(family)
    generate = jax.jit(lambda params, widths: hyper.generate_tensors(family, params, widths))
    found = {}
    for ratio in RATIOS:
        tree = generate(params["inr"], family.widths(ratio))
        found |= {f"network/{ratio}/{name}": value for name, value in flat(tree).items()}

    spec, tree = draw(family, params, (2, 0))
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "network.safetensors"
        normalization = Normalization(PREPROCESSING.mean, PREPROCESSING.std)
        saved.save(path, Network(spec, tree, normalization))
        tensors = safetensors.numpy.load_file(path)
    found |= {f"export/{name}": value for name, value in tensors.items()}
    return found | {f"step/{name}": value for name, value in flat(step(kind)).items()}


def step(kind: str) -> Any:
    """Metrics, parameters and their average after a step of `kind`, at three sizes."""
    family = cifar_resnet.hypernetwork(SMALL, (0, 1), INRS[kind])
    recipe = dataclasses.replace(RECIPE, optimizer=OPTIMIZERS[kind])
    backbone, params = start(family)
    rng = np.random.RandomState(3)
    images = Images(
        jnp.asarray(rng.randint(0, 256, (12, 8, 8, 3)), jnp.uint8),
        jnp.asarray(rng.randint(0, SMALL.num_classes, 12), jnp.int32),
    )
    (phase,) = recipe.phases(family, num_images=120)
    state = start_phase(params, family, recipe, phase)
    prepare = functools.partial(PREPROCESSING.train, num_classes=SMALL.num_classes)
    update = jax.jit(
        inr_update(family, recipe, phase.program, prepare, family.forward, unroll=False)
    )
    inputs = phase_inputs(params, family, recipe, phase)
    state, metrics = update(
        state, np.int32(3), jax.random.key(5), images, np.arange(12), backbone, inputs
    )
    return {"metrics": metrics, "params": state.params}


def network_case(depth: int) -> dict[str, Any]:
    """What is counted and ordered of a full-size network: JSON values."""
    spec = resnet_spec(depth, num_classes=100)
    blocks = generated_blocks(spec)
    family = cifar_resnet.hypernetwork(spec, blocks, Grid())
    morphs = {
        str(ratio): morph(spec, blocks, family.widths(ratio).tolist()) for ratio in (1, 0.5, 0.25)
    }
    params, moments = random_network(spec)
    groups = cifar_resnet.family(spec).groups
    _, smooth = ordering.smooth(groups, params)
    _, important = ordering.by_importance(groups, params, moments)
    return {
        "blocks": list(blocks),
        "parameters": {ratio: small.num_params for ratio, small in morphs.items()},
        "multiply_adds": {ratio: small.num_macs for ratio, small in morphs.items()},
        "shapes": {name: list(x.shape) for name, x in flat(params).items()},
        "stacks": [
            {
                "name": stack.name,
                "positions": list(stack.owners),
                "indices": list(stack.indices),
                "num_tensors": stack.num_tensors,
                "shape": list(stack.shape),
                "elastic": [stack.rows.elastic, stack.columns.elastic],
                "norm": stack.norm,
            }
            for stack in family.stacks
        ],
        "groups": {
            name: [f"{member.path}:{member.axis}" for member in groups[name].members]
            for name in ordering.movable(groups)
        },
        "smoothness": {name: order.tolist() for name, order in smooth.items()},
        "importance": {name: order.tolist() for name, order in important.items()},
    }


def random_network(spec: ResNetSpec) -> tuple[Any, dict[str, np.ndarray]]:
    """A folded tree and the moments of its hidden channels.

    Weights and moments are whole multiples of 2^-10 and small, so that their sums are exact and no
    processor rounds two paths to another order.
    """
    rng = np.random.RandomState(7)
    tree = jax.tree.map(
        lambda shape: (rng.randint(-512, 512, shape) / 1024).astype(np.float32),
        cifar_resnet.param_shapes(spec),
        is_leaf=lambda x: isinstance(x, tuple),
    )
    moments = {}
    for block in spec.blocks:
        size = block.hidden_width + 1
        samples = rng.randint(0, 64, (2 * size, size)) / 32
        samples[:, -1] = 1
        moments[f"{block.name}/conv2/kernel"] = samples.T @ samples / (2 * size)
    return tree, moments


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    for kind in INRS:
        np.savez_compressed(FOLDER / f"{kind}.npz", **inr_case(kind))
    for depth in DEPTHS:
        lines = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in network_case(depth).items()]
        text = "{\n" + ",\n".join(lines) + "\n}\n"
        (FOLDER / f"resnet{depth}.json").write_text(text)


if __name__ == "__main__":
    main()
