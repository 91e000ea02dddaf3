"""Multi-layer perceptrons."""

import flax.linen as nn
import jax

ACTIVATIONS = {"relu": nn.relu, "gelu": nn.gelu, "tanh": nn.tanh}


class MLP(nn.Module):
    """Dense layers of the given widths, each with an activation, and a linear classifier.

    The default is LeNet-300-100 (LeCun, Bottou, Bengio and Haffner 1998, "Gradient-based learning
    applied to document recognition") as the pruning literature has it, with relu (Han, Pool, Tran
    and Dally, arXiv 1506.02626): 266,610 parameters on images of 28 x 28 pixels.

        >>> import jax
        >>> from neumeta_jax.networks import MLP
        >>> net, images = MLP(widths=(32, 16), num_classes=10), jax.numpy.zeros((2, 8, 8, 1))
        >>> net.apply(net.init(jax.random.key(0), images), images).shape
        (2, 10)

    Attributes:
        widths: of the hidden layers.
        num_classes: length of the output.
        activation: "relu", "gelu" or "tanh".
    """

    widths: tuple[int, ...] = (300, 100)
    num_classes: int = 10
    activation: str = "relu"

    def __post_init__(self):
        super().__post_init__()
        if min((*self.widths, self.num_classes)) < 1:
            raise ValueError(
                "An MLP needs widths and num_classes of 1 or more, got "
                f"{self.widths=}, {self.num_classes=}."
            )
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"activation must be one of {sorted(ACTIVATIONS)}, got {self.activation!r}."
            )

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Logits float[batch, classes] of float[batch, ...]; the axes after the batch are one.

        `train` is there for the sake of the other families.
        """
        del train
        x = x.reshape(x.shape[0], -1)
        for number, width in enumerate(self.widths, start=1):
            dense = nn.Dense(width, kernel_init=nn.initializers.he_normal(), name=f"dense{number}")
            x = ACTIVATIONS[self.activation](dense(x))
        return nn.Dense(self.num_classes, name="head")(x)
