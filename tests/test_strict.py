"""Generation, networks and loading under the settings of strict research code."""

import jax
import numpy as np
import pytest
from builders import STRICT

from neumeta_jax import elastic
from neumeta_jax.core import hypernetwork as hyper
from neumeta_jax.core.inr import make_inr
from neumeta_jax.networks import cifar_resnet
from neumeta_jax.networks.cifar_spec import generated_blocks, resnet_spec
from neumeta_jax.networks.saved import load_inr, save_inr

SPEC = resnet_spec(14, num_classes=3, stage_widths=(4, 6, 8), image_size=8)

FIELDS = {
    "projection": {"modulated": True, "width_terms": (0.5, 0.25), "depth_term": True},
    "grid": {},
    "per_tensor_mlp": {"hidden_width": 4, "num_layers": 2, "num_frequencies": 2},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The file of an INR of each kind, made under JAX's own settings."""
    folder, paths = tmp_path_factory.mktemp("strict"), {}
    backbone = cifar_resnet.init_params(jax.random.key(0), SPEC)
    for kind, fields in FIELDS.items():
        inr = make_inr(kind, **fields)
        family = cifar_resnet.hypernetwork(SPEC, generated_blocks(SPEC), inr)
        paths[kind] = folder / f"{kind}.safetensors"
        save_inr(paths[kind], family, hyper.init(jax.random.key(1), family, backbone), mean=[0.5])
    return paths


@pytest.mark.parametrize("kind", FIELDS)
@pytest.mark.parametrize("setting", STRICT)
def test_generation_networks_and_loading_hold_under(files, kind, setting):
    widths, pixels = np.array([2, 0], np.int32), np.ones((2, 8, 8, 3), np.float32)
    expected = None
    for value in (getattr(jax.config, setting), STRICT[setting]):
        before = getattr(jax.config, setting)
        jax.config.update(setting, value)
        try:
            family, params, _ = load_inr(files[kind])
            chosen, images = jax.device_put((widths, pixels))
            tree = jax.jit(lambda p, w, h=family: hyper.generate(h, p, w))(params, chosen)
            logits = jax.jit(lambda p, x: cifar_resnet.apply(SPEC, p, x))(tree, images)
            at = family.by_name([2, 0])
            small = jax.jit(lambda t, h=family, at=at: elastic.slice_params(h.groups, t, at))(tree)
            found = jax.device_get((logits, small))
        finally:
            jax.config.update(setting, before)
        if expected is None:
            expected = found
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), expected, found
    )
