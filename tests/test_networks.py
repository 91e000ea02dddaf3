"""The families of networks: counts as published, widths, batch statistics, torchvision's names."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import refused

from neumeta_jax import elastic, networks
from neumeta_jax.networks import (
    MLP,
    RESNET_VARIANTS,
    VGG,
    MLPMixer,
    MobileNetV2,
    ResNet,
    ViT,
    make_network,
)
from neumeta_jax.networks.layers import LayerNorm


def shapes(net, image_shape):
    images = jnp.zeros((2, *image_shape))
    return jax.eval_shape(net.init, jax.random.key(0), images)


def random_variables(net, image_shape, seed=0):
    """Every number at random; variances are positive, and all channels of a layer norm are kept."""
    rng = np.random.default_rng(seed)

    def leaf(path, shape):
        if path[-1].key == "kept":
            return np.ones(shape.shape, np.float32)
        fan_in = np.prod(shape.shape[:-1]) if len(shape.shape) > 1 else 10
        values = rng.normal(size=shape.shape) * fan_in**-0.5
        values = {"var": abs(values) + 0.5, "scale": values + 1}.get(path[-1].key, values)
        return values.astype(np.float32)

    return jax.tree_util.tree_map_with_path(leaf, shapes(net, image_shape))


# With torchvision 0.29 and timm 1.0, whose numbers of parameters these are; the CIFAR networks of
# github.com/kuangliu/pytorch-cifar (VGG16, ResNet18) and github.com/chenyaofo/pytorch-cifar-models
# (15.25 M and 2.24 M); LeNet-300-100 of arXiv 1506.02626 (266 K).
COUNTS = [
    ("mlp", {}, (28, 28, 1), 266_610),
    ("resnet", {"variant": 18}, (224, 224, 3), 11_689_512),
    ("resnet", {"variant": 34}, (224, 224, 3), 21_797_672),
    ("resnet", {"variant": 50}, (224, 224, 3), 25_557_032),
    ("resnet", {"variant": 101}, (224, 224, 3), 44_549_160),
    ("resnet", {"variant": 18, "stem": "cifar", "num_classes": 10}, (32, 32, 3), 11_173_962),
    ("mobilenet", {}, (224, 224, 3), 3_504_872),
    ("mobilenet", {"width_multiple": 0.5}, (224, 224, 3), 1_968_680),
    ("mobilenet", {"num_classes": 10, "stem_stride": 1}, (32, 32, 3), 2_236_682),
    ("vgg", {"variant": 16}, (32, 32, 3), 14_728_266),
    ("vgg", {"variant": 16, "dense": [512, 512]}, (32, 32, 3), 15_253_578),
    ("vgg", {"dense": [4096, 4096], "num_classes": 1000}, (224, 224, 3), 138_365_992),
    ("vit", {"variant": "Ti/16"}, (224, 224, 3), 5_717_416),
    ("vit", {"variant": "B/16"}, (224, 224, 3), 86_567_656),
    ("mixer", {}, (224, 224, 3), 18_528_264),
    ("mixer", {"variant": "B/16"}, (224, 224, 3), 59_880_472),
]


@pytest.mark.parametrize(("kind", "fields", "image_shape", "count"), COUNTS)
def test_the_published_networks_have_the_published_numbers_of_parameters(
    kind, fields, image_shape, count
):
    params = shapes(make_network(kind, **fields), image_shape)["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count


# A network, the same one with wider layers, and the images.
PAIRS = {
    "mlp": (MLP((5, 6)), MLP((9, 8)), (4, 4, 2)),
    "vgg": (VGG(((3, 4), (5,)), (6,)), VGG(((5, 4), (7,)), (8,)), (4, 5, 3)),
    "mobilenet": (
        MobileNetV2(((1, 4, 1, 1), (2, 5, 2, 2)), 3, 1, 7, num_classes=10),
        MobileNetV2(((1, 6, 1, 1), (3, 7, 2, 2)), 5, 1, 9, num_classes=10),
        (7, 8, 1),
    ),
    "basic": (
        ResNet((1, 2), False, 3, "cifar", 10),
        ResNet((1, 2), False, 5, "cifar", 10),
        (7, 8, 1),
    ),
    "bottleneck": (ResNet((2, 1), True, 2), ResNet((2, 1), True, 3), (17, 16, 3)),
    "vit_token": (ViT(2, 8, 2, 2), ViT(2, 12, 2, 3), (4, 6, 3)),
    "vit_mean": (ViT(2, 8, 1, 2, 3.0, "mean"), ViT(2, 12, 1, 3, 4.0, "mean"), (4, 6, 3)),
    "mixer": (MLPMixer(2, 8, 2, 5, 9), MLPMixer(2, 12, 2, 7, 13), (4, 6, 3)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_masked_or_cut_to_the_widths_of_a_narrower_network_it_computes_the_same(name):
    narrow, wide, image_shape = PAIRS[name]
    images = np.random.default_rng(1).normal(size=(3, *image_shape)).astype(np.float32)
    variables = random_variables(wide, image_shape)
    family = elastic.trace(wide.apply, variables, images, check=False)
    other = elastic.trace(narrow.apply, random_variables(narrow, image_shape), images, check=False)
    widths = other.groups.sizes(family.groups.elastic("stream", "paired"))

    cut = elastic.slice_params(family.groups, variables, widths)
    chex.assert_trees_all_equal_shapes(cut, shapes(narrow, image_shape))
    assert elastic.num_params(family.groups, widths) == elastic.num_params(other.groups, {})
    expected = jax.jit(narrow.apply)(cut, images)
    assert expected.shape == (3, narrow.num_classes) and expected.dtype == jnp.float32
    assert np.std(expected, axis=0).mean() > 1e-2  # the images differ
    masked = elastic.mask_params(family.groups, variables, widths)
    np.testing.assert_allclose(jax.jit(wide.apply)(masked, images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["vgg", "mobilenet", "basic", "bottleneck"])
def test_training_normalises_by_the_batch_and_moves_the_statistics(name):
    net, _, image_shape = PAIRS[name]
    images = np.random.default_rng(1).normal(size=(4, *image_shape)).astype(np.float32)
    variables = random_variables(net, image_shape)

    @jax.jit
    def train(images):
        return net.apply(variables, images, train=True, mutable=["batch_stats"])

    logits, moved = train(images)
    before, after = (jax.tree.leaves(tree["batch_stats"]) for tree in (variables, moved))
    assert all(np.abs(x - y).max() > 1e-4 for x, y in zip(before, after, strict=True))
    # The first batch norm undoes what a factor on the images does.
    np.testing.assert_allclose(train(3 * images)[0], logits, rtol=1e-2, atol=2e-3)
    assert np.abs(jax.jit(net.apply)(variables, images) - logits).max() > 1e-2


def test_the_table_of_groups_says_what_would_make_them_elastic():
    net, _, image_shape = PAIRS["mixer"]
    images = np.ones((2, *image_shape), np.float32)
    family = elastic.trace(net.apply, random_variables(net, image_shape), images, check=False)
    rows = {line.split()[0]: line for line in str(family.groups).splitlines()}
    assert "no: it carries a residual stream (elastic('stream') allows it)" in rows["embed"]
    # A mean goes over the patches, which no name allows.
    assert "would notice those masked; it carries" in rows["block0/token_mixing/down"]
    assert "allows" not in rows["block0/token_mixing/down"]


def test_a_layer_norm_of_all_its_channels_is_the_usual_one():
    net, _, image_shape = PAIRS["vit_mean"]
    variables = random_variables(net, image_shape)
    images = np.random.default_rng(1).normal(size=(2, *image_shape)).astype(np.float32)
    apply = jax.jit(net.apply)
    with_collection = apply(variables, images)
    without = apply({"params": variables["params"]}, images)
    np.testing.assert_array_equal(with_collection, without)

    other = jax.tree.map(lambda kept: -0.3 * kept, variables["channels"])
    np.testing.assert_array_equal(apply({**variables, "channels": other}, images), without)

    norm = LayerNorm()
    x = np.random.default_rng(2).normal(2, 3, (5, 4, 8)).astype(np.float32)
    params = random_variables(norm, (4, 8))["params"]
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    expected = (x - mean) / np.sqrt(var + 1e-6) * params["scale"] + params["bias"]
    found = jax.jit(norm.apply)({"params": params}, x)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


# torchvision's ResNet, from its names alone.


def torch_tensors(depth, num_classes=7, width=64, seed=0):
    """A state_dict under torchvision's names, at random."""
    blocks, bottleneck = RESNET_VARIANTS[depth]["blocks"], depth >= 50
    rng, tensors = np.random.default_rng(seed), {}

    def conv(name, out, channels, size):
        values = rng.standard_normal((out, channels, size, size), np.float32)
        tensors[f"{name}.weight"] = values * np.float32((2 / (channels * size**2)) ** 0.5)

    def norm(name, n):
        for kind, values in {
            "weight": rng.uniform(0.5, 1.5, n),
            "bias": rng.normal(0, 0.2, n),
            "running_mean": rng.normal(0, 0.2, n),
            "running_var": rng.uniform(0.5, 1.5, n),
        }.items():
            tensors[f"{name}.{kind}"] = values.astype(np.float32)
        tensors[f"{name}.num_batches_tracked"] = np.int64(9)

    conv("conv1", width, 3, 7)
    norm("bn1", width)
    channels = width
    for stage, count in enumerate(blocks):
        hidden = width * 2**stage
        out = 4 * hidden if bottleneck else hidden
        for block in range(count):
            prefix = f"layer{stage + 1}.{block}"
            sizes = (1, 3, 1) if bottleneck else (3, 3)
            widths = (channels, hidden, hidden, out) if bottleneck else (channels, hidden, out)
            for number, size in enumerate(sizes):
                conv(f"{prefix}.conv{number + 1}", widths[number + 1], widths[number], size)
                norm(f"{prefix}.bn{number + 1}", widths[number + 1])
            if block == 0 and (stage > 0 or bottleneck):
                conv(f"{prefix}.downsample.0", out, channels, 1)
                norm(f"{prefix}.downsample.1", out)
            channels = out
    tensors["fc.weight"] = rng.standard_normal((num_classes, channels), np.float32) / 50
    tensors["fc.bias"] = rng.standard_normal(num_classes, np.float32)
    return tensors


def torch_forward(depth, tensors, images):
    """Logits of torchvision's ResNet in evaluation, images NCHW."""

    def conv(name, x, stride=1):
        kernel = tensors[f"{name}.weight"]
        pad = [(kernel.shape[-1] // 2,) * 2] * 2
        return jax.lax.conv_general_dilated(x, kernel, (stride, stride), pad)

    def norm(name, x):
        kinds = ("weight", "bias", "running_mean", "running_var")
        scale, bias, mean, var = (tensors[f"{name}.{kind}"][:, None, None] for kind in kinds)
        return (x - mean) / jnp.sqrt(var + 1e-5) * scale + bias

    x = jax.nn.relu(norm("bn1", conv("conv1", images, 2)))
    x = jnp.pad(x, [(0, 0), (0, 0), (1, 1), (1, 1)])  # nothing is below 0
    rows, columns = ((n - 3) // 2 + 1 for n in x.shape[2:])
    taps = [(i, j) for i in range(3) for j in range(3)]
    x = jnp.stack([x[:, :, i::2, j::2][:, :, :rows, :columns] for i, j in taps]).max(0)
    for stage, count in enumerate(RESNET_VARIANTS[depth]["blocks"]):
        for block in range(count):
            prefix, stride = f"layer{stage + 1}.{block}", 2 if stage and not block else 1
            y = x
            convs = 3 if depth >= 50 else 2
            strided = 2 if depth >= 50 else 1
            for n in range(1, convs + 1):
                y = conv(f"{prefix}.conv{n}", y, stride if n == strided else 1)
                y = norm(f"{prefix}.bn{n}", y)
                y = y if n == convs else jax.nn.relu(y)
            if f"{prefix}.downsample.0.weight" in tensors:
                x = norm(f"{prefix}.downsample.1", conv(f"{prefix}.downsample.0", x, stride))
            x = jax.nn.relu(x + y)
    return x.mean((2, 3)) @ tensors["fc.weight"].T + tensors["fc.bias"]


torch_tensors_of = functools.cache(torch_tensors)


@pytest.mark.parametrize("depth", [18, 50])
def test_tensors_under_the_names_of_torchvision_give_its_network(depth):
    tensors = torch_tensors_of(depth)
    images = np.random.default_rng(1).normal(size=(2, 3, 32, 39)).astype(np.float32)
    expected = jax.jit(functools.partial(torch_forward, depth))(
        {name: x for name, x in tensors.items() if x.ndim}, images
    )
    net = ResNet(**RESNET_VARIANTS[depth], num_classes=7)
    variables = networks.from_torchvision(tensors, depth)
    assert jax.tree.structure(variables) == jax.tree.structure(shapes(net, (32, 32, 3)))
    found = jax.jit(net.apply)(variables, images.transpose(0, 2, 3, 1))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    assert np.std(expected, axis=0).min() > 1e-3


def test_tensors_that_are_not_of_the_network_are_refused():
    tensors = torch_tensors_of(18)

    def without(*names):
        return {name: x for name, x in tensors.items() if name not in names}

    with refused(r"depth must be one of \[18, 34, 50, 101, 152\], got 20"):
        networks.from_torchvision(tensors, 20)
    with refused(r"ResNet18 has 102 tensors and layer2.0.downsample.1.running_var is missing"):
        networks.from_torchvision(without("layer2.0.downsample.1.running_var"), 18)
    with refused("fc.weight, .*are missing"):
        networks.from_torchvision(without("fc.weight", "bn1.bias"), 18)
    with refused("and .* more are missing"):
        networks.from_torchvision(tensors, 50)
    with refused("conv1.bias is not among the tensors of a ResNet18"):
        networks.from_torchvision({**tensors, "conv1.bias": np.zeros(64)}, 18)
    with refused(r"conv1.weight .* must have the shape \(64, 3, 7, 7\), got \(7, 7, 3, 64\)"):
        swapped = tensors["conv1.weight"].transpose(2, 3, 1, 0)
        networks.from_torchvision({**tensors, "conv1.weight": swapped}, 18)
    with refused(r"fc.weight must have the shape \(classes, features\), got \(512,\)"):
        networks.from_torchvision({**tensors, "fc.weight": np.zeros(512)}, 18)
    with refused(r"fc.bias .* must have the shape \(8,\), got \(7,\)"):
        networks.from_torchvision({**tensors, "fc.weight": np.zeros((8, 512))}, 18)


# The registry, and what constructors refuse.


def test_networks_are_values_that_are_made_by_kind():
    assert set(networks.FAMILIES) == {"mixer", "mlp", "mobilenet", "resnet", "vgg", "vit"}
    listed = make_network("vgg", stages=[[4, 4], [8]], dense=[6])
    assert listed == VGG(((4, 4), (8,)), (6,)) and hash(listed) == hash(VGG(((4, 4), (8,)), (6,)))
    assert make_network("resnet", variant=50) == ResNet()
    assert make_network("vit", variant="B/16", depth=3) == ViT(16, 768, 3, 12)


REFUSALS = {
    "must be one of .*'mlp', .*got 'lstm'": lambda: make_network("lstm"),
    "takes .*'widths'.*, got also \\['width'\\]": lambda: make_network("mlp", width=3),
    "'vit' takes .*got also \\['name', 'parent'\\]": lambda: make_network(
        "vit", name="a", parent=None
    ),
    "'vgg' is one of \\[11, 13, 16, 19\\], got 12": lambda: make_network("vgg", variant=12),
    "must be None, .*got 18": lambda: make_network("mlp", variant=18),
    "An MLP needs": lambda: MLP((4, 0)),
    "activation must be one of .*got 'swish'": lambda: MLP(activation="swish"),
    "A VGG needs": lambda: VGG(()),
    "one convolution or more in each stage": lambda: VGG(((4,), ())),
    "5 stages halves .*8 x 8 pixels": lambda: shapes(VGG(), (8, 8, 1)),
    "A stage of a MobileNetV2 is": lambda: make_network("mobilenet", stages=[[6, 24, 2]]),
    "A MobileNetV2 needs": lambda: MobileNetV2(head_width=0),
    "width_multiple must be positive": lambda: MobileNetV2(width_multiple=-1.0),
    "A ResNet needs": lambda: ResNet(blocks=(2, 0)),
    "stem must be one of .*got 'patch'": lambda: ResNet(stem="patch"),
    "A ViT needs": lambda: ViT(depth=0),
    "multiple of its heads": lambda: ViT(width=100),
    "mlp_ratio must leave": lambda: ViT(mlp_ratio=0.001),
    "pool must be one of .*got 'max'": lambda: ViT(pool="max"),
    "An MLPMixer needs .*'token_width': 0": lambda: MLPMixer(token_width=0),
    "multiples of the patch of 16 pixels, got 32 x 40": lambda: shapes(ViT(), (32, 40, 3)),
}


@pytest.mark.parametrize("words", REFUSALS)
def test_what_is_refused(words):
    with refused(words):
        REFUSALS[words]()
