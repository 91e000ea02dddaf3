"""Which networks exist: static descriptions of CIFAR ResNets, their parameters and multiply-adds.

A `ResNetSpec` holds shapes and nothing else. It is hashable, so it can be a static argument of
`jax.jit`. Batch norm is taken as folded into the convolutions, so every convolution has a bias.

Reference: He et al., "Deep Residual Learning for Image Recognition", 2016, section 4.2.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

NUM_STAGES = 3
SHORTCUTS = ("projection", "pad")
MAX_DEPTH = 6002  # the deepest published one has 1,202 layers


@dataclasses.dataclass(frozen=True)
class Block:
    """One residual block: two 3x3 convolutions around `hidden_width` channels.

    `stage` counts from 1 and `index` from 0, as `layer1.0` does in PyTorch. `in_size` is the side
    of the input feature map in pixels. A `hidden_width` of 0 means that the block is skipped.
    """

    stage: int
    index: int
    in_width: int
    hidden_width: int
    out_width: int
    stride: int
    in_size: int
    projection: bool

    @property
    def name(self) -> str:
        return f"stage{self.stage}_block{self.index}"

    @property
    def out_size(self) -> int:
        return -(-self.in_size // self.stride)

    @property
    def skippable(self) -> bool:
        """True where the identity has the shape of the block."""
        return self.stride == 1 and self.in_width == self.out_width

    @property
    def num_params(self) -> int:
        hidden, size_in, size_out = self.hidden_width, self.in_width, self.out_width
        convs = hidden * (9 * size_in + 1) + size_out * (9 * hidden + 1) if hidden else 0
        return convs + (size_out * (size_in + 1) if self.projection else 0)

    @property
    def num_macs(self) -> int:
        convs = 9 * self.hidden_width * (self.in_width + self.out_width)
        shortcut = self.in_width * self.out_width if self.projection else 0
        return (convs + shortcut) * self.out_size**2


@dataclasses.dataclass(frozen=True)
class ResNetSpec:
    """A CIFAR ResNet: a 3x3 stem, three stages of residual blocks, global mean, linear head.

    Attributes:
        stage_widths: channels of the residual stream in each stage.
        hidden_widths: channels inside each block, in order; 0 = the block is skipped.
        num_classes: length of the logits.
        image_size: side of the square input in pixels.
        channels: channels of the input image.
        shortcut: what a block does where stream and block differ in shape: "projection" (1x1
            convolution) or "pad" (every second pixel, zero channels on both sides; the "option A"
            of He et al.).
    """

    stage_widths: tuple[int, ...]
    hidden_widths: tuple[int, ...]
    num_classes: int
    image_size: int = 32
    channels: int = 3
    shortcut: str = "projection"

    def __post_init__(self):
        if len(self.stage_widths) != NUM_STAGES or min(self.stage_widths) < 1:
            raise ValueError(
                f"A CIFAR ResNet has {NUM_STAGES} stage widths of at least 1, "
                f"got {self.stage_widths}."
            )
        if not self.hidden_widths or len(self.hidden_widths) % NUM_STAGES:
            raise ValueError(
                f"A CIFAR ResNet has the same number of blocks in each of its {NUM_STAGES} stages, "
                f"got {len(self.hidden_widths)} hidden widths."
            )
        if min(self.num_classes, self.image_size, self.channels) < 1:
            raise ValueError(
                "Classes, image size and channels must be at least 1, got "
                f"{self.num_classes=}, {self.image_size=}, {self.channels=}."
            )
        if self.shortcut not in SHORTCUTS:
            raise ValueError(f"shortcut must be one of {SHORTCUTS}, got {self.shortcut!r}.")
        if self.shortcut == "pad" and list(self.stage_widths) != sorted(self.stage_widths):
            raise ValueError(
                "Padded shortcuts need stage widths that do not decrease, got "
                f"{self.stage_widths}; use shortcut='projection'."
            )
        for block in self.blocks:
            if block.hidden_width < 0:
                raise ValueError(
                    f"Hidden widths must be at least 0, got {block.hidden_width} for {block.name}."
                )
            if block.hidden_width == 0 and not block.skippable:
                raise ValueError(
                    f"{block.name} changes the shape of the residual stream and cannot be skipped; "
                    "give it a hidden width of at least 1."
                )

    @property
    def depth(self) -> int:
        return 2 * len(self.hidden_widths) + 2

    @property
    def title(self) -> str:
        return f"ResNet{self.num_layers}"

    @property
    def num_layers(self) -> int:
        """Of those that are there: `depth` counts skipped blocks too."""
        return 2 + 2 * sum(width > 0 for width in self.hidden_widths)

    @property
    def blocks_per_stage(self) -> int:
        return len(self.hidden_widths) // NUM_STAGES

    @property
    def blocks(self) -> tuple[Block, ...]:
        result = []
        in_width, size = self.stage_widths[0], self.image_size
        for number, hidden_width in enumerate(self.hidden_widths):
            stage, index = divmod(number, self.blocks_per_stage)
            out_width = self.stage_widths[stage]
            stride = 2 if stage > 0 and index == 0 else 1
            reshapes = stride > 1 or in_width != out_width
            block = Block(
                stage=stage + 1,
                index=index,
                in_width=in_width,
                hidden_width=hidden_width,
                out_width=out_width,
                stride=stride,
                in_size=size,
                projection=reshapes and self.shortcut == "projection",
            )
            result.append(block)
            in_width, size = out_width, block.out_size
        return tuple(result)

    @property
    def num_params(self) -> int:
        """Parameters with batch norm folded into the convolutions.

        >>> resnet_spec(56, num_classes=100).num_params
        859492
        """
        stem = self.stage_widths[0] * (9 * self.channels + 1)
        head = (self.stage_widths[-1] + 1) * self.num_classes
        return stem + sum(block.num_params for block in self.blocks) + head

    @property
    def num_macs(self) -> int:
        """Multiply-adds of one forward pass of one image (convolutions and head, no biases).

        >>> round(resnet_spec(56, num_classes=100).num_macs / 1e6, 2)
        125.75
        """
        stem = 9 * self.channels * self.stage_widths[0] * self.image_size**2
        head = self.stage_widths[-1] * self.num_classes
        return stem + sum(block.num_macs for block in self.blocks) + head

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Of an image: (height, width, channels)."""
        return self.image_size, self.image_size, self.channels

    def to_dict(self) -> dict:
        """The spec as plain JSON types; `from_dict` is the inverse."""
        fields = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}

    @classmethod
    def from_dict(cls, fields: Mapping) -> "ResNetSpec":
        names = {field.name for field in dataclasses.fields(cls)}
        if set(fields) != names:
            raise ValueError(f"A ResNetSpec has the fields {sorted(names)}, got {sorted(fields)}.")
        values: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()
        }
        return cls(**values)


def resnet_spec(
    depth: int,
    *,
    num_classes: int,
    stage_widths: Sequence[int] = (16, 32, 64),
    image_size: int = 32,
    channels: int = 3,
    shortcut: str = "projection",
) -> ResNetSpec:
    """The CIFAR ResNet of `depth` = 6n + 2 layers, with n blocks in each of three stages.

    >>> resnet_spec(20, num_classes=10).num_params
    271690

    Raises:
        ValueError: if `depth` is not 6n + 2 with n >= 1, or any width is below 1.
    """
    if depth > MAX_DEPTH:
        raise ValueError(f"A CIFAR ResNet of depth {MAX_DEPTH} at most is built, got {depth=}.")
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f"A CIFAR ResNet has depth 6n + 2 with n >= 1, got {depth=}.")
    if len(stage_widths) != NUM_STAGES:
        raise ValueError(
            f"A CIFAR ResNet has {NUM_STAGES} stage widths, got {tuple(stage_widths)}."
        )
    blocks_per_stage = (depth - 2) // 6
    return ResNetSpec(
        stage_widths=tuple(stage_widths),
        hidden_widths=tuple(w for w in stage_widths for _ in range(blocks_per_stage)),
        num_classes=num_classes,
        image_size=image_size,
        channels=channels,
        shortcut=shortcut,
    )


GENERATED = ("inner", "not_first", "all", "full")


def generated_blocks(spec: ResNetSpec, which: str = "inner") -> tuple[int, ...]:
    """Positions in `spec.blocks` of the blocks whose weights an INR generates, in training order.

    "inner" leaves out the first block of each stage and the last block of the network: 23 of the
    27 blocks of a ResNet56 (arXiv 2505.05510). "not_first" has the last block too, so that every
    block can be skipped (see `Block.skippable`). "all" takes every block, as does "full", where the
    widths of the residual streams vary too.

    >>> len(generated_blocks(resnet_spec(56, num_classes=100)))
    23
    """
    if which not in GENERATED:
        raise ValueError(f"generated must be one of {GENERATED}, got {which!r}.")
    if which in ("all", "full"):
        return tuple(range(len(spec.blocks)))
    last = len(spec.blocks) - 1
    chosen = tuple(
        n
        for n, block in enumerate(spec.blocks)
        if block.index > 0 and (which == "not_first" or n != last)
    )
    if not chosen:
        raise ValueError(
            f"A ResNet{spec.depth} has no inner block to generate; use generated='all' or a "
            "depth of at least 14."
        )
    return chosen


def morph(spec: ResNetSpec, blocks: Sequence[int], widths: Sequence[int]) -> ResNetSpec:
    """`spec` with the hidden widths of `blocks` replaced by `widths` (0 = block skipped)."""
    if len(blocks) != len(widths):
        raise ValueError(
            f"widths needs one entry for each of the {len(blocks)} generated blocks, "
            f"got {len(widths)}."
        )
    hidden_widths = list(spec.hidden_widths)
    for n, width in zip(blocks, widths, strict=True):
        hidden_widths[n] = int(width)
    return dataclasses.replace(spec, hidden_widths=tuple(hidden_widths))
