"""Networks of shared kernels: with batch norm for each width, or for all of them."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from neumeta_jax import elastic
from neumeta_jax.comparison import pruning
from neumeta_jax.comparison.run import (
    Family,
    Forward,
    Run,
    sliced,
    split_norms,
    train_pass,
    with_norms,
)
from neumeta_jax.networks import cifar_resnet
from neumeta_jax.networks.cifar_resnet import Params, ResNetHypernetwork
from neumeta_jax.networks.cifar_spec import ResNetSpec


def make_switchable(
    family: ResNetHypernetwork, variables: Mapping, ratios: Sequence[float]
) -> Params:
    """Variables of a slimmable network: the kernels of `variables` and batch norm for each ratio.

    Each starts at the batch norm of `variables`, of its first channels.

        {"params": {"shared": ..., "norms": {"0.5": ...}}, "batch_stats": {"0.5": ...}}
    """
    sizes = {str(ratio): sliced(family, variables, ratio)[1] for ratio in ratios}
    norms = {ratio: split_norms(size["params"])[1] for ratio, size in sizes.items()}
    return {
        "params": {"shared": split_norms(variables["params"])[0], "norms": norms},
        "batch_stats": {ratio: size["batch_stats"] for ratio, size in sizes.items()},
    }


def switch(
    family: ResNetHypernetwork, variables: Mapping, ratio: float
) -> tuple[ResNetSpec, Params]:
    """(spec, linen variables) of a slimmable network at one of its ratios."""
    params, stats = variables["params"], variables["batch_stats"]
    full = with_norms(params["shared"], params["norms"]["1.0"])
    small, kernels = sliced(family, {"params": full, "batch_stats": stats["1.0"]}, ratio)
    own = with_norms(kernels["params"], params["norms"][str(ratio)])
    return small, {"params": own, "batch_stats": stats[str(ratio)]}


def all_switches(family: ResNetHypernetwork, ratios: Sequence[float]) -> Forward:
    """`Forward` of a slimmable network at all its ratios (Yu et al., arXiv 1812.08928)."""

    def forward(variables, x, key):
        del key
        logits, stats = [], {}
        for ratio in ratios:
            found, stats[str(ratio)] = train_pass(*switch(family, variables, ratio), x)
            logits.append(found)
        return logits, stats

    return forward


def sandwich(family: ResNetHypernetwork, *, smallest: float, num_random: int) -> Forward:
    """`Forward` of the full, the smallest and random widths (Yu and Huang, arXiv 1903.05134).

    Random ones are masked, at full shape. Statistics are those of the full network.
    """
    spec, groups = family.spec, cifar_resnet.linen_groups(family.spec)
    full = jnp.array(family.full_widths)

    def forward(variables, x, key):
        logits, stats = train_pass(spec, variables, x)
        found = [logits, train_pass(*sliced(family, variables, smallest), x)[0]]
        for ratio in jax.random.uniform(key, (num_random,), minval=smallest, maxval=1.0):
            widths = jnp.maximum(jnp.floor(ratio * full + 0.5), 1)
            masked = elastic.mask_params(groups, variables, family.by_name(widths))
            found.append(train_pass(spec, masked, x)[0])
        return found, stats

    return forward


def switchable(run: Run) -> Family:
    """Batch norm for each of the widths that are trained."""
    ratios = run.baseline.width_ratios
    start = pruning.ordered_teacher(run, run.baseline.criterion)
    first = make_switchable(run.family, start, ratios)
    variables = run.train("slimmable", first, all_switches(run.family, ratios))

    def network(ratio):
        small, of_ratio = switch(run.family, variables, ratio)
        return small, cifar_resnet.fold_batch_norm(of_ratio)

    return Family(
        network=network,
        storage_bytes=run.storage_bytes(start, ratios),
        continuous=False,
        calibration_images=run.baseline.calibration_images,
    )


def universal(run: Run) -> Family:
    """All widths share all weights; statistics are measured at a change of size."""
    baseline, ratios = run.baseline, run.baseline.width_ratios
    options = {"smallest": ratios[-1], "num_random": baseline.num_random_sizes}
    start = pruning.ordered_teacher(run, baseline.criterion)
    variables = run.train("universally_slimmable", start, sandwich(run.family, **options))

    def network(ratio):
        small, of_ratio = sliced(run.family, variables, ratio)
        return small, cifar_resnet.fold_batch_norm(run.recalibrated(small, of_ratio))

    return Family(
        network=network,
        storage_bytes=run.storage_bytes(variables, ratios),
        switch_images=len(run.calibration[0]),
        calibration_images=baseline.calibration_images,
    )
