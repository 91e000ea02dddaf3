"""Learned values; a smaller network is the least-squares projection of the full one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from neumeta_jax.core.inr.base import INR, mean_ratio, over, skipped_share, width_counts
from neumeta_jax.core.inr.grid import Grid
from neumeta_jax.core.stacks import Side, full_widths, identities


@dataclasses.dataclass(frozen=True)
class Projection(INR):
    """Learned values on a grid of channels; smaller networks are projections of the full one.

    Channels are nested: a group of width C keeps the first C of its channels, K. What the dropped
    channels D contributed is not lost but carried by the kept ones, as well as least squares can:
    with M the second moments of the activations that a product reads and of a constant,
    M = E[(h, 1) (h, 1)^T],

        A = (M_KK + ridge diag(M_KK))^-1 M_KD         h_D is approximately A^T (h_K, 1)
        W1(C) = W1_K,   W2(C) = W2_K + A W2_D,   b2(C) = b2 + (last row of A) W2_D

    W1 writes the channels and W2 reads them; both are those of the full width, learned, conditioned
    on the width ratio w = C / full (of a tensor with several such axes, their mean):

        W(w) = sum over m < num_terms of (1 - w)^m G_m, times 1 + (1 - w) S with `modulated`

    where S has one value for each kernel slice (for biases (1 - w) S is added). Each of
    `width_terms` adds t(w) B to the sum, with t one of `width_counts`: small sizes have what large
    ones need not share. With `depth_term` d D is added, d the share of the branches in its scope
    that are skipped: what is left can make up for them. M is measured once on the teacher,
    (full + 1)^2 numbers for each tensor that reads. A tensor whose product cannot be repaired, such
    as a tied one, keeps its first channels. The projection is a closed form in the width, so that
    it holds at sizes never seen in training, and it needs no calibration data afterwards. At full
    size it is the identity. Beyond the full size, channels are doubled and what reads them is
    halved, which leaves the function as it is (Net2Wider; Chen et al., arXiv 1511.05641).

    Least-squares repair of pruned channels: He, Zhang and Sun, arXiv 1707.06168, there for one
    network and on data; here it is part of the function that is trained.

    Parameters: `num_terms` times what it generates (plus a ninth, `modulated`; one more for each of
    `width_terms` and for `depth_term`) plus the moments.
    Generation: one factorisation of a (full + 1)^2 matrix per tensor that reads, for all widths
    that are generated at once, and one matrix product per tensor.

    Attributes:
        num_terms: 1 leaves the width out of the learned values.
        modulated: learn S.
        width_terms: the width ratios at which a B counts most, descending, below 1; learned here
            and for what is not generated (`hypernetwork`).
        depth_term: learn D, likewise.
        ridge: of the least squares, relative to the diagonal of M.
        max_cell: in training (with a key), half of the networks narrower than full are drawn
            through cells up to this many times wider than those of their own channels: a block of
            width C then has C / factor different channels, each of them several times, and what
            reads them is divided among the copies. This trains coarser functions than any network
            that is built has channels for. With a factor of 2, the network of half the width
            computes what that of a quarter would.
    """

    num_terms: int = 1
    modulated: bool = False
    width_terms: tuple[float, ...] = ()
    depth_term: bool = False
    ridge: float = 1e-3
    max_cell: float = 1.0
    needs_moments = True

    @property
    def _values_only(self) -> Grid:
        return Grid(num_terms=self.num_terms + len(self.width_terms) + self.depth_term)

    def __post_init__(self):
        if self.num_terms < 1 or not self.ridge > 0:
            raise ValueError(
                "A projection needs num_terms >= 1 and ridge > 0, got "
                f"{self.num_terms=}, {self.ridge=}."
            )
        falling = zip((1, *self.width_terms), (*self.width_terms, 0), strict=True)
        if not all(before > after for before, after in falling):
            raise ValueError(
                "The width_terms of a projection must be ratios that descend from below 1 to above "
                f"0, got {self.width_terms}."
            )
        if self.max_cell < 1:
            raise ValueError(f"max_cell must be at least 1, got {self.max_cell}.")

    def init(self, key, stacks):
        params = self._values_only.init(key, stacks)
        for stack in stacks:
            if self.modulated:
                params[stack.name]["modulation"] = jnp.zeros(stack.shape[:3])
            if _repaired(stack):
                # Channels that have nothing in common: the projection keeps what it keeps.
                eye = jnp.eye(stack.columns.size + 1)
                moments = jnp.broadcast_to(eye, (len(stack.paths), *eye.shape))
                params[stack.name]["moments"] = moments
        return params

    def __call__(self, inr_params, stacks, widths, *, key=None):
        factor = jnp.ones(())
        if key is not None and self.max_cell > 1:
            # Half of the draws are 1 and three tenths the largest.
            draw = jax.random.uniform(jax.random.fold_in(key, len(stacks)), minval=-1, maxval=1)
            factor = 1 + (self.max_cell - 1) * jnp.clip(2.5 * draw, 0, 1)
        width = jnp.maximum(jnp.asarray(widths), 1)
        full = full_widths(stacks, len(widths)).astype(width.dtype)
        coarse = jnp.floor(width.astype(jnp.float32) / factor + 0.5)
        coarse = jnp.maximum(1, coarse.astype(width.dtype))
        distinct = jnp.where(width < full, coarse, jnp.minimum(width, full))
        ratios = distinct.astype(jnp.float32) / full.astype(jnp.float32)

        raw, constants = {}, {stack.name: [] for stack in stacks}
        for stack in stacks:
            values = self._values(inr_params[stack.name], stack, ratios, widths)
            if stack.columns.elastic:
                selected = stack.columns.combine(lambda c: _selected(c, width, distinct))
                copies = jnp.maximum(jnp.sum(selected, axis=1, keepdims=True), 1.0)
                project = selected / copies
                if "moments" in inr_params[stack.name]:
                    moments = jax.lax.stop_gradient(inr_params[stack.name]["moments"])
                    kept = stack.columns.mask(lambda c: _kept(c, distinct))
                    compensation = self._compensation(moments, kept, _nested(stack.columns))
                    project = project @ compensation[:, :-1]
                    constant = jnp.einsum("tf,trfo->tr", compensation[:, -1], values)
                    for row, bias in enumerate(stack.biases):
                        if bias is not None:
                            constants[bias[0]].append((bias[1], bias[2], constant, row))
                values = jnp.einsum("tsf,trfo->trso", project, values)
            raw[stack.name] = values
        for stack in stacks:
            values = _shifted(raw[stack.name], constants[stack.name])
            if stack.rows.elastic:
                selected = stack.rows.combine(lambda c: _selected(c, width, distinct))
                values = jnp.einsum("tsf,tfco->tsco", selected, values)
            raw[stack.name] = values
        return raw

    def _powers(self, stack, ratios, widths):
        """float32[tensors, terms]: how much each of the learned values counts."""
        ratio = mean_ratio(stack, ratios)
        small = jnp.maximum(1 - ratio, 0.0)
        powers = small[:, None] ** jnp.arange(self.num_terms, dtype=small.dtype)[None]
        if self.width_terms:
            counts = width_counts(ratio, self.width_terms)
            powers = jnp.concatenate([powers, counts], axis=1)
        if self.depth_term:
            skipped = skipped_share(widths, stack.scope)
            powers = jnp.pad(powers, ((0, 0), (0, 1)), constant_values=skipped)
        return powers

    def _values(self, params, stack, ratios, widths):
        """W(w), float32[tensors, rows, columns, outputs] of the full size."""
        powers = self._powers(stack, ratios, widths)
        values = jnp.einsum("tm,tmrco->trco", powers, params["values"])
        if self.modulated:
            small = jnp.maximum(1 - mean_ratio(stack, ratios), 0.0)
            modulation = small[:, None, None, None] * params["modulation"][..., None]
            values = values * (1 + modulation) if stack.kernel else values + modulation
        return values

    def _compensation(self, moments, kept, nested):
        """float32[tensors, full + 1, full]: how each channel is made of the kept and a constant.

        Columns of kept channels are unit vectors, those of dropped ones the rows of A. Where the
        kept channels are the first ones (`nested`), one factor M = L L^T, the constant put first,
        serves all widths: its leading block is that of M_KK, so that A = L_KK^-T L_DK^T. Otherwise
        they are put first, for each width anew.
        """
        if not nested:
            order = jnp.argsort(~kept, axis=1, stable=True)
            order = jnp.pad(order, ((0, 0), (0, 1)), constant_values=kept.shape[1])
            back = jnp.argsort(order, axis=1)
            moments = jax.vmap(lambda m, o: m[o][:, o])(moments, order)
            kept = jnp.take_along_axis(kept, order[:, :-1], axis=1)
            found = self._compensation(moments, kept, True)
            return jax.vmap(lambda m, b: m[b][:, b[:-1]])(found, back)
        diagonal = jnp.diagonal(moments, axis1=1, axis2=2)
        floor = 1e-6 * jnp.mean(diagonal, axis=1, keepdims=True)  # channels that never fire
        loaded = moments + jax.vmap(jnp.diag)(self.ridge * diagonal + floor)
        factor, inverse = _cholesky(jnp.roll(loaded, 1, axis=(1, 2)))
        there = jnp.pad(kept, ((0, 0), (1, 0)), constant_values=True).astype(moments.dtype)
        solution = jnp.einsum("tki,tk,tjk->tij", inverse, there, factor) * there[:, :, None]
        solution = jnp.roll(solution, -1, axis=1)[:, :, 1:]
        unit = jnp.eye(moments.shape[-1], dtype=solution.dtype)[None, :, :-1]
        return jnp.where(kept[:, None, :], unit, solution)

    def with_term(self, inr_params, stacks, widths, number, raw):
        ratios = jnp.asarray(widths) / full_widths(stacks, len(widths))
        result, place = dict(inr_params), self.num_terms + number
        for stack in stacks:
            counts = self._powers(stack, ratios, widths)[:, place]
            added = over(raw[stack.name], counts[:, None, None, None])
            values = inr_params[stack.name]["values"].at[:, place].add(added)
            result[stack.name] = {**inr_params[stack.name], "values": values}
        return result

    def start_from(self, inr_params, stacks, raw):
        started = self._values_only.start_from(inr_params, stacks, raw)
        return {name: {**inr_params[name], **values} for name, values in started.items()}

    def with_moments(self, inr_params, stacks, moments):
        measured = dict(inr_params)
        for stack in stacks:
            if _repaired(stack):
                parts = (jnp.asarray(moments[path]) for path in dict.fromkeys(stack.paths))
                values = jnp.concatenate([x.reshape(-1, *x.shape[-2:]) for x in parts])
                measured[stack.name] = {**inr_params[stack.name], "moments": values}
        return measured

    def copy_group(self, inr_params, stacks, source, target):
        copied = super().copy_group(inr_params, stacks, source, target)
        for name, leaves in inr_params.items():
            if "moments" in leaves:
                copied[name] = {**copied[name], "moments": leaves["moments"]}
        return copied

    def update_mask(self, inr_params, stacks, active):
        mask = super().update_mask(inr_params, stacks, active)
        for leaves in mask.values():
            if "moments" in leaves:  # measured, not learned
                leaves["moments"] = np.zeros_like(leaves["moments"])
        return mask

    def depth_mask(self, inr_params, stacks):
        mask = super().depth_mask(inr_params, stacks)
        if self.depth_term:
            number = self._values_only.num_terms
            last = np.arange(number) == number - 1
            for stack in stacks:
                mask[stack.name]["values"] = last.astype(np.float32)[:, None, None, None]
        return mask


def _repaired(stack) -> bool:
    return bool(stack.biases) and stack.columns.elastic


def _nested(side: Side) -> bool:
    """Whether the channels there are at any widths are the first ones of the side."""
    return side.kind == "channels" or (
        side.kind == "product"
        and side.parts[0].kind == "channels"
        and not any(part.elastic for part in side.parts[1:])
    )


def _kept(channels: Side, distinct):
    """bool[tensors, full]: the channels of the grid that a network has."""
    if not channels.positions:
        return jnp.ones((len(channels.sizes), channels.full), bool)
    return jnp.arange(channels.full)[None] < distinct[np.array(channels.positions)][:, None]


def _selected(channels: Side, width, distinct):
    """float32[tensors, size, full]: which channel of the grid each of a network's channels is.

    Channel j of the network is channel j of the grid; beyond those that differ it starts over.
    """
    if not channels.positions:
        return identities(channels)
    width, distinct = (w[np.array(channels.positions)][:, None] for w in (width, distinct))
    size, full = (jnp.arange(n, dtype=width.dtype)[None] for n in (channels.size, channels.full))
    selected = (size % distinct)[:, :, None] == full[None]
    selected &= (full < distinct)[:, None]
    selected &= (size < width)[:, :, None]
    return selected.astype(jnp.float32)


def _shifted(values, constants):
    """Biases [tensors, rows, 1, 1] plus what their products no longer see."""
    if not constants:
        return values
    rows, signs, sources, places = zip(*constants, strict=True)
    whole = all(source is sources[0] for source in sources) and set(signs) == {1}
    if whole and rows == places == tuple(range(len(values))) and len(sources[0]) == len(values):
        return values + sources[0][:, :, None, None]
    shift = jnp.stack([s * source[p] for s, source, p in zip(signs, sources, places, strict=True)])
    return values.at[jnp.array(rows)].add(shift[:, :, None, None])


def _cholesky(matrices: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(L, L^-1), lower triangular, with L L^T = `matrices`, float[number, size, size]."""

    def lapack(matrices):
        factor = jnp.linalg.cholesky(matrices)
        eye = jnp.broadcast_to(jnp.eye(matrices.shape[-1], dtype=factor.dtype), matrices.shape)
        return factor, jax.lax.linalg.triangular_solve(factor, eye, left_side=True, lower=True)

    def written_out(matrices):
        """The same, because batched LAPACK calls can block XLA's CPU backend for good."""
        size = matrices.shape[-1]
        index = jnp.arange(size)

        def eliminate(k, state):
            """Takes column k of L out of what is left, and row k of L^-1 out of the unit matrix."""
            left, factor, inverse = state
            column = jnp.take(left, k, axis=2)
            column = jnp.where(index[None] >= k, column, 0.0) / jnp.sqrt(column[:, k])[:, None]
            row = jnp.take(inverse, k, axis=1) / column[:, k][:, None]
            below = jnp.where(index[None] > k, column, 0.0)
            inverse = inverse - below[:, :, None] * row[:, None, :]
            inverse = jnp.where((index == k)[None, :, None], row[:, None, :], inverse)
            left = left - column[:, :, None] * column[:, None, :]
            return left, jnp.where((index == k)[None, None], column[:, :, None], factor), inverse

        eye = jnp.broadcast_to(jnp.eye(size, dtype=matrices.dtype), matrices.shape)
        state = (matrices, jnp.zeros_like(matrices), eye)
        return jax.lax.fori_loop(0, size, eliminate, state)[1:]

    return jax.lax.platform_dependent(matrices, cpu=written_out, default=lapack)
