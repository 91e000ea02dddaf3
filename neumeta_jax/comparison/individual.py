"""A network per size, each trained alone."""

import jax
import jax.numpy as jnp

from neumeta_jax.comparison import pruning
from neumeta_jax.comparison.run import (
    SEED_OF_ORDER,
    Family,
    Run,
    num_bytes,
    sliced,
    train_pass,
)
from neumeta_jax.networks import cifar_resnet


def family(run: Run) -> Family:
    """From scratch, or pruned from the teacher and trained on; of these the full size stays."""
    baseline, ordered = run.baseline, None
    if baseline.method == "pruning_finetuned":
        ordered = pruning.ordered_teacher(run, baseline.criterion)
    networks = {}
    for number, ratio in enumerate(baseline.width_ratios):
        if ordered is None:
            small = run.family.at(run.family.widths(ratio).tolist())
            key = jax.random.fold_in(run.experiment.key(SEED_OF_ORDER), number)
            variables = jax.jit(cifar_resnet.init_variables, static_argnums=1)(key, small)
        elif baseline.refitted and ratio < 1:
            small, tree = pruning.refitted(run, ordered, ratio)
            variables = pruning.with_batch_norm(small, tree, pruning.calibration_inputs(run))
        else:
            small, variables = sliced(run.family, ordered, ratio)

        def forward(variables, x, key, spec=small):
            del key
            logits, stats = train_pass(spec, variables, x)
            return [logits], stats

        if ordered is None or ratio < 1:
            variables = run.train(f"width_{ratio}", variables, forward, number)
        networks[ratio] = small, cifar_resnet.fold_batch_norm(variables)
    return Family(
        network=lambda ratio: (networks[ratio][0], jax.tree.map(jnp.array, networks[ratio][1])),
        storage_bytes=num_bytes([tree for _, tree in networks.values()]),
        continuous=False,
        calibration_images=baseline.calibration_images if ordered else 0,
        kept_as_is=(1.0,) if ordered else (),
    )
