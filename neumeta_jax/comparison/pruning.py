"""The teacher without its least important channels."""

import functools
from collections.abc import Iterator, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from neumeta_jax import elastic
from neumeta_jax.comparison.run import SEED_OF_ORDER, Family, Run, sliced, whole_batches
from neumeta_jax.core import losses
from neumeta_jax.core.hypernetwork import flat, nested
from neumeta_jax.data.preprocessing import Preprocessing
from neumeta_jax.elastic import ordering
from neumeta_jax.networks import cifar_resnet
from neumeta_jax.networks.cifar_resnet import Params, ResNetHypernetwork
from neumeta_jax.networks.cifar_spec import ResNetSpec
from neumeta_jax.runs.backbone import measure_moments
from neumeta_jax.runs.config import Experiment


def _sums(family: ResNetHypernetwork, variables: Mapping, role: str) -> dict[str, jax.Array]:
    """By group, the sums over the kernels that "read" or "write" each of its channels."""
    groups, leaves, found = cifar_resnet.linen_groups(family.spec), flat(variables), {}
    for name in family.names:
        members = [member for member in groups[name].members if member.role == role]
        kernels = [jnp.moveaxis(leaves[member.path], member.axis, 0) for member in members]
        found[name] = sum(kernel.reshape(len(kernel), -1).sum(axis=1) for kernel in kernels)
    return found


@functools.partial(jax.jit, static_argnums=(0, 1))
def _importance(family, preprocessing, variables, images, labels):
    def loss(params):
        tree, x = {**variables, "params": params}, preprocessing.evaluate(images)
        return losses.cross_entropy(family.network.apply(tree, x), labels)

    params = variables["params"]
    products = jax.tree.map(jnp.multiply, jax.grad(loss)(params), params)
    return {name: x**2 for name, x in _sums(family, {"params": products}, "read").items()}


def taylor_importance(
    family: ResNetHypernetwork,
    variables: Mapping,
    images: np.ndarray,
    labels: np.ndarray,
    preprocessing: Preprocessing,
    batch_size: int = 64,
) -> dict[str, np.ndarray]:
    """First-order importance of channels, by group (Molchanov et al., arXiv 1906.10771).

        importance(c) = mean over batches of (sum of gradient * weight over what reads channel c)^2

    Statistics of batch norm are the running ones.
    """
    given, parts = (family, preprocessing, variables), whole_batches(images, batch_size)
    found = [_importance(*given, images[part], labels[part]) for part in parts]
    return jax.tree.map(lambda *x: np.mean(np.asarray(x, np.float64), axis=0), *found)


def channel_order(
    experiment: Experiment,
    variables: Mapping,
    images: np.ndarray,
    labels: np.ndarray,
    criterion: str,
) -> dict[str, np.ndarray]:
    """Channels of each elastic group, the most important one first, by `criterion`.

    "random"; "l1" and "l2", norms of the filters that write them (Li et al., arXiv 1608.08710);
    "taylor", see `taylor_importance`; "surgeon", which is what the INR's channels are ordered by
    (`ordering.importance_order`).
    """
    family, scores = experiment.hypernetwork, {}
    if criterion == "surgeon":
        folded = family.network.fold(variables)
        moments = jax.device_get(measure_moments(experiment, folded, images))
        orders = ordering.importance_orders(family.groups, folded, moments)
        return {name: orders[name] for name in family.names}
    if criterion == "taylor":
        scores = taylor_importance(family, variables, images, labels, experiment.preprocessing)
    elif criterion == "random":
        key, numbers = experiment.key(SEED_OF_ORDER), family.blocks
        numbers += tuple(range(1000, 1000 + len(family.names) - len(numbers)))  # of the streams
        sizes = zip(numbers, family.names, family.full_widths, strict=True)
        scores = {
            name: jax.random.uniform(jax.random.fold_in(key, n), (w,)) for n, name, w in sizes
        }
    else:
        power = {"l1": 1, "l2": 2}[criterion]
        scores = _sums(family, jax.tree.map(lambda x: jnp.abs(x) ** power, variables), "write")
    return {name: np.argsort(-np.asarray(x), kind="stable") for name, x in scores.items()}


def ordered_teacher(run: Run, criterion: str) -> Params:
    """The teacher with its channels by importance."""
    orders = channel_order(run.experiment, run.teacher, *run.calibration, criterion)
    return elastic.permute(cifar_resnet.linen_groups(run.family.spec), run.teacher, orders)


def _network(
    run: Run, ordered: Params, recalibrated: bool, ratio: float
) -> tuple[ResNetSpec, Params]:
    small, variables = sliced(run.family, ordered, ratio)
    if recalibrated and ratio < 1:  # the full size is the teacher
        variables = run.recalibrated(small, variables)
    return small, cifar_resnet.fold_batch_norm(variables)


def calibration_inputs(run: Run) -> jax.Array:
    """The images that statistics are measured on, normalised."""
    return run.experiment.preprocessing.evaluate(jnp.asarray(run.calibration[0]))


def refitted(run: Run, ordered: Params, ratio: float) -> tuple[ResNetSpec, Params]:
    """The folded network of the first channels with its products solved anew (`elastic.refit`)."""
    family, folded = run.family, cifar_resnet.fold_batch_norm(ordered)
    widths = family.widths(ratio).tolist()
    at = family.by_name(widths)
    tree = elastic.mask_params(family.groups, folded, at)
    if ratio < 1:
        x = calibration_inputs(run)
        tree = elastic.refit(family.network.family, folded, tree, at, x)
    return family.dense(tree, widths)


def with_batch_norm(spec: ResNetSpec, folded: Params, x: jax.Array) -> Params:
    """Linen variables of the function of a folded tree, with its statistics on `x`, normalised."""
    tree = flat(folded)
    norms = {"stem": "stem_bn", "conv1": "bn1", "conv2": "bn2", "shortcut": "shortcut_bn"}
    at = {}  # the batch norm after each convolution
    for path in tree:
        *block, conv, kind = path.split("/")
        if kind == "kernel" and conv in norms:
            at["/".join([*block, conv])] = "/".join([*block, norms[conv]])

    def variables(moments):
        params = {p: x for p, x in tree.items() if p.endswith("kernel") or p.startswith("head")}
        stats = {}
        for conv, norm in at.items():
            mean, var = moments[conv]
            params[f"{norm}/scale"] = jnp.sqrt(var + cifar_resnet.BATCH_NORM_EPSILON)
            params[f"{norm}/bias"] = tree[f"{conv}/bias"] + mean
            stats |= {f"{norm}/mean": mean, f"{norm}/var": var}
        return {"params": nested(params), "batch_stats": nested(stats)}

    neutral = variables({c: (jnp.zeros_like(b := tree[f"{c}/bias"]), jnp.ones_like(b)) for c in at})
    _, seen = cifar_resnet.ResNet(spec).apply(
        neutral, x, capture_intermediates=lambda m, _: isinstance(m, nn.Conv), mutable=True
    )
    results = flat(seen["intermediates"])
    axes = (0, 1, 2)
    found = {conv: results[f"{conv}/__call__"][0] for conv in at}
    return variables({conv: (jnp.mean(y, axes), jnp.var(y, axes)) for conv, y in found.items()})


def families(run: Run) -> Iterator[tuple[str, str, Family]]:
    """(folder, variant, family) of each criterion, with and without statistics measured anew.

    Of the chosen criterion also with its products solved anew.
    """
    baseline, number = run.baseline, len(run.calibration[0])
    ratios, calibration = baseline.width_ratios, baseline.calibration_images
    for criterion in dict.fromkeys((baseline.criterion, *baseline.criteria)):
        ordered = ordered_teacher(run, criterion)
        network = functools.partial(_network, run, ordered)
        folder = "" if criterion == baseline.criterion else f"{criterion}_recalibrated"
        stored = run.storage_bytes(ordered, ratios)
        found = Family(functools.partial(network, True), stored, True, number, calibration, ratios)
        yield folder, f"{criterion}, statistics recalibrated", found
        measured = calibration if criterion in ("taylor", "surgeon") else 0
        stored = run.storage_bytes(ordered)
        found = Family(functools.partial(network, False), stored, True, 0, measured, ratios)
        yield criterion, criterion, found
        if criterion == baseline.criterion:
            network = functools.partial(refitted, run, ordered)
            found = Family(network, stored, True, number, calibration, ratios)
            yield f"{criterion}_refitted", f"{criterion}, products solved anew", found
