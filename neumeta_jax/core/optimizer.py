"""What turns gradients of an INR's parameters into steps."""

import re

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from neumeta_jax.core.recipe import InrRecipe

CLIP = 10.0  # of an entry of a gradient (arXiv 2505.05510)


def inr_optimizer(recipe: InrRecipe) -> optax.GradientTransformation:
    """AdamW or Muon behind a clip, at a learning rate of 1; the step multiplies by those it has.

    Muon takes steps whose singular values are all about equal (Jordan, "Muon", 2024), here for the
    kernels of convolutions, those that an INR holds as values included, and for hidden layers of
    MLPs; all else keeps AdamW, with Nesterov's momentum. Steps are as long as AdamW's, a root mean
    square of 0.2 times the learning rate (Liu et al., arXiv 2502.16982), so that rates carry over.
    """
    if recipe.optimizer == "muon":
        numbers = optax.contrib.MuonDimensionNumbers(reduction_axis=2, output_axis=1)
        optimizer = _stacked(
            optax.contrib.muon(
                1.0,
                weight_decay=recipe.weight_decay,
                adam_weight_decay=recipe.weight_decay,
                consistent_rms=0.2,
                muon_weight_dimension_numbers=lambda stacks: jax.tree.map_with_path(
                    lambda path, _: None if path[0].key == _REST else numbers, stacks
                ),
            )
        )
    else:
        optimizer = optax.adamw(1.0, weight_decay=recipe.weight_decay)
    return optax.chain(optax.clip(CLIP), optimizer)


_REST = "rest"  # the stack of all that is no matrix


def _stacked(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """`optimizer`, whose tree has one array for all matrices of a shape and one for all else.

    Its updates are those that it would have for each leaf; a GPU runs one small program for a shape
    instead of one for a leaf.
    """

    def as_matrices(path, leaf):
        """A leaf as [number, rows, columns], or as a vector if it is no matrix to Muon."""
        names = [str(getattr(entry, "key", "")) for entry in path]
        if names[-1] == "values" and leaf.shape[3] > 1:  # tensors, terms, out, in, 3 x 3
            return leaf.reshape(-1, leaf.shape[2], leaf.shape[3] * leaf.shape[4])
        if names[-1] == "kernel" and leaf.ndim == 4:  # HWIO
            return jnp.moveaxis(leaf, 3, 0).reshape(1, leaf.shape[3], -1)
        if re.fullmatch(r"hidden\d+/kernel", "/".join(names[-2:])):  # ..., in, out
            return leaf.reshape(-1, *leaf.shape[-2:])
        return leaf.reshape(-1)

    def stack(tree):
        stacks: dict[str, list] = {}
        for path, leaf in jax.tree.leaves_with_path(tree):
            part = as_matrices(path, leaf)
            stacks.setdefault("x".join(map(str, part.shape[1:])) or _REST, []).append(part)
        return {name: jnp.concatenate(parts) for name, parts in stacks.items()}

    def update(updates, state, params=None):
        stacks, state = optimizer.update(stack(updates), state, stack(params))
        _, unstack = jax.vjp(stack, updates)  # a linear map that moves entries: its transpose
        return unstack(stacks)[0], state

    return optax.GradientTransformation(lambda params: optimizer.init(stack(params)), update)
