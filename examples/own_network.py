"""A network of one's own, every size of it: training, an elastic family, a width, a file.

    pip install -e ".[export]" && python examples/own_network.py [--out=half.stablehlo]

The network is plain Flax and knows nothing of this library. Two minutes on two CPU cores.
"""

import argparse
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import sklearn.datasets
import sklearn.model_selection

import neumeta_jax as nm


class Net(nn.Module):
    """Two convolutions, a residual block with a bottleneck, two dense layers."""

    @nn.compact
    def __call__(self, x, train=False):
        def norm(x):
            return nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)

        x = nn.relu(norm(nn.Conv(24, (3, 3), use_bias=False)(x)))
        x = nn.relu(norm(nn.Conv(48, (3, 3), strides=2, use_bias=False)(x)))
        y = nn.relu(norm(nn.Conv(64, (3, 3), use_bias=False)(x)))
        x = nn.relu(x + norm(nn.Conv(48, (3, 3), use_bias=False)(y)))
        x = nn.gelu(nn.Dense(96)(x.mean((1, 2))))
        return nn.Dense(10)(x)


def train(net, x, labels, epochs=25, batch_size=64):
    """The variables of `net`, trained as one trains a single network."""
    variables = net.init(jax.random.key(0), x[:1])
    steps = len(x) // batch_size
    optimizer = optax.adamw(optax.cosine_decay_schedule(3e-3, epochs * steps), weight_decay=0.05)

    @jax.jit
    def step(variables, state, x, y):
        def loss(params):
            logits, new = net.apply(
                {**variables, "params": params}, x, train=True, mutable=["batch_stats"]
            )
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), new

        grads, new = jax.grad(loss, has_aux=True)(variables["params"])
        updates, state = optimizer.update(grads, state, variables["params"])
        return {"params": optax.apply_updates(variables["params"], updates), **new}, state

    state, rng = optimizer.init(variables["params"]), np.random.default_rng(0)
    for _ in range(epochs):
        order = rng.permutation(len(x))[: steps * batch_size].reshape(steps, batch_size)
        for rows in order:
            variables, state = step(variables, state, x[rows], labels[rows])
    return variables


def main(out: pathlib.Path) -> None:
    x, labels = sklearn.datasets.load_digits(return_X_y=True)
    x = np.asarray(x, np.float32).reshape(-1, 8, 8, 1) / 16
    x, test_x, labels, test_labels = sklearn.model_selection.train_test_split(
        x, labels, test_size=0.25, random_state=0
    )
    net = Net()
    params = train(net, x, labels)

    # From here on: the function, its parameters, and what they have in common.
    family = nm.trace(net.apply, params, x[:2])
    print(family, "\n")
    names = family.groups.elastic("stream")  # the whole network, its residual stream too
    moments = jax.jit(lambda params, x: nm.moments(family, params, x, names))(params, x)

    # Order channels by importance, so that those that a small network keeps are the best ones.
    params, _ = nm.by_importance(family.groups, params, jax.device_get(moments))
    moments = jax.jit(lambda params, x: nm.moments(family, params, x, names))(params, x)

    hyper = nm.Hypernetwork(family.groups, names, nm.make_inr("projection", modulated=True))
    inr_params = nm.init(jax.random.key(1), hyper, params, moments=moments)

    def report(step, metrics):
        print(f"step {step}: loss {metrics['loss']:.3f}", flush=True)

    inr_params = nm.fit(hyper, family, inr_params, x, labels, after=report)

    generate = jax.jit(lambda widths: nm.generate(hyper, inr_params, widths))
    predict = jax.jit(lambda tree: jnp.argmax(jnp.asarray(net.apply(tree, test_x)), -1))
    print("width  parameters  multiply-adds  sliced  refitted  from the INR")
    for ratio in (1.0, 0.75, 0.5, 0.25):
        widths = hyper.by_name(hyper.widths(ratio).tolist())
        small = nm.mask_params(family.groups, params, widths)
        sliced = (predict(small) == test_labels).mean()
        # Neither labels nor training: each product is solved anew for what channels are left.
        small = nm.refit(family, params, small, widths, x)
        refitted = (predict(small) == test_labels).mean()
        ours = (predict(generate(jnp.asarray(hyper.widths(ratio)))) == test_labels).mean()
        print(
            f"{ratio:5.2f}  {nm.num_params(family.groups, widths):10,}  "
            f"{nm.num_macs(family, widths):13,}  {100 * sliced:5.1f}%  {100 * refitted:7.1f}%  "
            f"{100 * ours:11.1f}%"
        )

    # One size as a dense network, in a file that needs neither this library nor the network's code.
    widths = hyper.by_name(hyper.widths(0.5).tolist())
    small = nm.slice_params(family.groups, generate(jnp.asarray(hyper.widths(0.5))), widths)
    half = jax.jit(lambda x: nm.apply_at(family, small, x, widths))
    exported = jax.export.export(half)(jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32))
    out.write_bytes(exported.serialize())
    reloaded = jax.export.deserialize(bytearray(out.read_bytes()))
    np.testing.assert_allclose(reloaded.call(test_x[:1]), half(test_x[:1]), rtol=1e-4, atol=1e-4)
    print(f"half the width: {out}, {out.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("half.stablehlo"))
    main(parser.parse_args().out)
