"""Published accuracies to compare a run with, at the multiply-adds of the networks they belong to.

Only accuracies are copied from the sources; multiply-adds are counted here, by the same rule as
those of a run.
"""

import dataclasses

from neumeta_jax.elastic.widths import widths_at
from neumeta_jax.networks.cifar_spec import ResNetSpec, generated_blocks, morph, resnet_spec

NUM_CLASSES = {"cifar10": 10, "cifar100": 100}
STAGE_WIDTHS = (16, 32, 64)
HTTY = "arXiv 2505.05510"
NEUMETA = f"arXiv 2410.11878, as run by {HTTY}"
ZOO = "github.com/chenyaofo/pytorch-cifar-models"


@dataclasses.dataclass(frozen=True)
class Curve:
    """Accuracies of one network at several kept widths.

    Attributes:
        name: as a legend shows it.
        source: where the accuracies are from.
        dataset, depth: data set and depth of the full-size ResNet.
        width_ratios: kept fraction of the hidden channels of the inner blocks; the source's
            compression is 1 - ratio.
        accuracies: top-1 in [0, 1] on the test split.
    """

    name: str
    source: str
    dataset: str
    depth: int
    width_ratios: tuple[float, ...]
    accuracies: tuple[float, ...]

    @property
    def points(self) -> list[tuple[float, float]]:
        """(width ratio, accuracy) of each network."""
        return list(zip(self.width_ratios, self.accuracies, strict=True))

    @property
    def num_macs(self) -> tuple[int, ...]:
        """Multiply-adds of each network, inner blocks narrowed and the others at full size.

        The same for all curves of one depth: the sources compare methods at equal compression.

        >>> [round(n / 1e6, 1) for n in CURVES[0].num_macs]
        [125.8, 98.6, 71.5, 44.4]
        """
        spec = _spec(self.dataset, self.depth)
        blocks = generated_blocks(spec)
        full = [spec.hidden_widths[n] for n in blocks]
        sizes = [widths_at(full, ratio) for ratio in self.width_ratios]
        return tuple(morph(spec, blocks, widths).num_macs for widths in sizes)


@dataclasses.dataclass(frozen=True)
class Single:
    """Accuracy in [0, 1] of one full-size ResNet, trained for itself, on the test split."""

    source: str
    dataset: str
    depth: int
    accuracy: float

    @property
    def name(self) -> str:
        return f"ResNet{self.depth}"

    @property
    def num_macs(self) -> int:
        """Multiply-adds of the network.

        >>> round(SINGLES[0].num_macs / 1e6, 1)
        40.8
        """
        return _spec(self.dataset, self.depth).num_macs


def _spec(dataset: str, depth: int) -> ResNetSpec:
    return resnet_spec(depth, num_classes=NUM_CLASSES[dataset], stage_widths=STAGE_WIDTHS)


RATIOS = (1.0, 0.75, 0.5, 0.25)

_CURVES = (
    ("trained individually", HTTY, (0.7263, 0.7150, 0.7178, 0.7059)),
    ("HTTY", HTTY, (0.6613, 0.6600, 0.6610, 0.6536)),
    ("HTTY, 150 more epochs per block", HTTY, (0.6917, 0.6925, 0.6910, 0.6165)),
    ("NeuMeta, full network", NEUMETA, (0.4903, 0.4869, 0.4865, 0.4538)),
)
CURVES = tuple(
    Curve(name, source, "cifar100", 56, RATIOS, accuracies) for name, source, accuracies in _CURVES
)
_SINGLES = {
    "cifar100": {20: 0.6883, 32: 0.7016, 44: 0.7163, 56: 0.7263},
    "cifar10": {20: 0.9260, 32: 0.9353, 44: 0.9401, 56: 0.9437},
}
# What a figure has to say beside them.
CURVES_NOTE = (
    "Published INRs learn from scratch, on widths from a half up: their smallest network was never "
    "trained, and unlike a run that begins at a teacher they have no soft labels."
)

SINGLES = tuple(
    Single(ZOO, dataset, depth, accuracy)
    for dataset, found in _SINGLES.items()
    for depth, accuracy in found.items()
)


def references(dataset: str, spec: ResNetSpec) -> tuple[tuple[Curve, ...], tuple[Single, ...]]:
    """What there is to compare the networks of `spec` with: (curves, single networks).

    The curves of that data set and depth; where there are none, the networks of the zoo up to that
    depth. Nothing for stage widths other than (16, 32, 64).
    """
    if spec.stage_widths != STAGE_WIDTHS:
        return (), ()
    curves = tuple(c for c in CURVES if (c.dataset, c.depth) == (dataset, spec.depth))
    if curves:
        return curves, ()
    return (), tuple(s for s in SINGLES if s.dataset == dataset and s.depth <= spec.depth)
