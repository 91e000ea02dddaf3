"""The training loss and its terms: float32 scalars, differentiable everywhere."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross-entropy of logits float[batch, classes].

    `labels` are int[batch], or float[batch, classes], probabilities.
    """
    if labels.ndim == 1:
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))
    return jnp.mean(optax.softmax_cross_entropy(logits, labels))


def accuracy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Share of the logits float[batch, classes] whose largest is that of the label.

    `labels` are those of `cross_entropy`; of probabilities the largest counts.
    """
    wanted = labels if labels.ndim == 1 else jnp.argmax(labels, axis=-1)
    return jnp.mean(jnp.argmax(logits, axis=-1) == wanted)


def distillation(
    logits: jax.Array, teacher_logits: jax.Array, *, temperature: float = 1.0
) -> jax.Array:
    """Mean `T^2 KL(softmax(teacher / T) || softmax(logits / T))` over the batch.

    T^2 keeps the size of the gradient independent of T (Hinton et al., arXiv 1503.02531).
    No gradient flows into the teacher.
    """
    log_student = jax.nn.log_softmax(logits / temperature)
    log_teacher = jax.nn.log_softmax(jax.lax.stop_gradient(teacher_logits) / temperature)
    divergence = jnp.sum(jnp.exp(log_teacher) * (log_teacher - log_student), axis=-1)
    return temperature**2 * jnp.mean(divergence)


def weight_norm(
    tensors: Mapping[str, jax.Array], active: Mapping[str, jax.Array] | None = None
) -> jax.Array:
    """Sum of the Euclidean norms of all `tensors` (arXiv 2505.05510).

    `active` holds a weight for each tensor, 0 to leave it out.
    """
    total = jnp.zeros(())
    for name, x in tensors.items():
        # The norm has no gradient at zero, where masked tensors are.
        norm = jnp.sqrt(jnp.sum(jnp.square(x)) + 1e-12)
        total += norm * (1.0 if active is None else active[name])
    return total


def reconstruction(
    tensors: Mapping[str, jax.Array],
    teacher: Mapping[str, jax.Array],
    active: Mapping[str, jax.Array] | None = None,
    *,
    relative: bool = False,
) -> jax.Array:
    """Mean squared error between generated tensors and the teacher's.

    Args:
        tensors: generated ones by path, at full width.
        teacher: tensors by path; what it holds beside these is ignored.
        active: a weight for each tensor, 0 to leave it out.
        relative: divide each tensor's error by the teacher's mean square and average over tensors,
            so that 1 means nothing learned and small tensors count as much as large ones. Without
            it the mean runs over all weights, as in the papers.
    """
    error, count = jnp.zeros(()), jnp.zeros(())
    for name, x in tensors.items():
        weight = jnp.float32(1.0) if active is None else active[name]
        y = teacher[name]
        if relative:
            size = jnp.mean(y**2)  # a tensor of zeros has no size to compare with
            error += weight * jnp.mean((x - y) ** 2) / jnp.where(size > 1e-12, size, 1.0)
            count += weight
        else:
            error += weight * jnp.sum((x - y) ** 2)
            count += weight * x.size
    return error / jnp.where(count > 0, count, 1.0)


@dataclasses.dataclass(frozen=True)
class Loss:
    """The weights of the terms of a network's loss.

    Attributes:
        ce, distillation: of what looks at logits: cross-entropy, and `temperature`'s distillation.
        norm, reconstruction: of what looks at generated weights, the latter at full width only.
        distill_from: whose logits are the soft labels, the "teacher"'s or those of the "full"-size
            network of the same step.
    """

    ce: float = 1.0
    distillation: float = 0.0
    temperature: float = 1.0
    norm: float = 0.0
    reconstruction: float = 0.0
    distill_from: str = "teacher"

    def of_logits(
        self, logits: jax.Array, labels: jax.Array, soft: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """(loss, terms to report) on a batch; `soft` are the logits of the soft labels."""
        terms = {"ce": cross_entropy(logits, labels)}
        loss = self.ce * terms["ce"]
        if self.distillation:
            terms["distillation"] = distillation(logits, soft, temperature=self.temperature)
            loss += self.distillation * terms["distillation"]
        terms["accuracy"] = accuracy(logits, labels)
        return loss, terms

    def of_weights(
        self,
        tensors: Mapping[str, jax.Array],
        teacher: Mapping[str, jax.Array],
        active: Mapping[str, jax.Array],
        is_full: jax.Array,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """(loss, terms to report) of generated tensors by path; `is_full` is 1 at full width."""
        norm = weight_norm(tensors, active)
        error = is_full * reconstruction(tensors, teacher, active)
        loss = self.norm * norm + self.reconstruction * error
        return loss, {"norm": norm, "reconstruction": error}
