"""An exported state_dict in PyTorch: a CIFAR ResNet whose blocks take their hidden widths.

    neumeta export --workdir=DIR --width=0.5 --format=torch --out=half.pt
    PYTHONPATH=examples python -c "from torch_resnet import load; print(load('half.pt'))"

The names are those of chenyaofo/pytorch-cifar-models; at full width its own classes serve as well.
Images are NCHW and normalised. Only this file needs PyTorch.
"""

import torch
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    def __init__(self, in_width, hidden_width, out_width, stride, projection):
        super().__init__()
        self.conv1 = nn.Conv2d(in_width, hidden_width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden_width)
        self.conv2 = nn.Conv2d(hidden_width, out_width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_width)
        self.downsample = None
        self.stride, self.extra = stride, out_width - in_width
        if projection:
            conv = nn.Conv2d(in_width, out_width, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(out_width))

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.downsample is not None:
            x = self.downsample(x)
        else:  # the identity, or every second pixel and zero channels on both sides
            x = x[:, :, :: self.stride, :: self.stride]
            x = F.pad(x, (0, 0, 0, 0, self.extra // 2, self.extra - self.extra // 2))
        return F.relu(x + y)


class ResNet(nn.Module):
    """`hidden_widths` lists three stages; 0 = the block is skipped."""

    def __init__(self, stage_widths, hidden_widths, num_classes, channels=3, projection=True):
        super().__init__()
        width = stage_widths[0]
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        for number, (out_width, widths) in enumerate(zip(stage_widths, hidden_widths, strict=True)):
            blocks = []
            for index, hidden_width in enumerate(widths):
                first = number > 0 and index == 0
                shape = (width, hidden_width, out_width, 1 + first, first and projection)
                blocks.append(Block(*shape) if hidden_width else nn.Identity())
                width = out_width
            setattr(self, f"layer{number + 1}", nn.Sequential(*blocks))
        self.head = "fc" if projection else "linear"
        setattr(self, self.head, nn.Linear(width, num_classes))

    def forward(self, images):
        x = F.relu(self.bn1(self.conv1(images)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return getattr(self, self.head)(x.mean((2, 3)))


def load(path):
    """The network in an exported file, in evaluation mode."""
    state = torch.load(path, weights_only=True)
    stage_widths, hidden_widths = [len(state["conv1.weight"])], []
    for stage in (1, 2, 3):
        if stage > 1:
            stage_widths.append(len(state[f"layer{stage}.0.conv2.weight"]))
        names = [name for name in state if name.startswith(f"layer{stage}.")]
        depth = 1 + max((int(name.split(".")[1]) for name in names), default=-1)
        names = [f"layer{stage}.{index}.conv1.weight" for index in range(depth)]
        hidden_widths.append([len(state[name]) if name in state else 0 for name in names])
    projection = "fc.weight" in state
    network = ResNet(
        stage_widths,
        hidden_widths,
        len(state["fc.bias" if projection else "linear.bias"]),
        channels=state["conv1.weight"].shape[1],
        projection=projection,
    )
    network.load_state_dict(state, strict=True)
    return network.eval()
