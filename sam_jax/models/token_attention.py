"""Attention between the few tokens of a prompt and the many cells of an image."""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.typing import DTypeLike

from sam_jax.arrays import Array, Bool, DimSize, Float, Int
from sam_jax.models.layers import Projection
from sam_jax.ops import cell_means_kernel
from sam_jax.ops.cell_kernel import CellFunction, over_cells
from sam_jax.ops.dropout import keeps, kept
from sam_jax.ops.full_precision import EXACT, add_bias, add_shared, multiply
from sam_jax.ops.tpu_kernel import SUBLANES, product

# Of the LayerNorms of the two-way transformer.
NORM_EPSILON = 1e-5

# Lengths that ``jax.export`` leaves open are taken for those of clicks on many objects.
_OPEN_TOKENS = 8
_OPEN_OBJECTS = 64


class _OfAttention(nn.Module):
    """What has the weights of multi-head attention.

    Attributes:
      num_heads: heads.
      downsample_rate: of the embedding's width over that of all heads.
    """

    num_heads: int
    downsample_rate: int = 1
    dtype: DTypeLike = jnp.float32

    def weights(self, dim: int) -> "Weights":
        """Of all projections, for ``dim`` channels."""
        inner = dim // self.downsample_rate

        # Queries and keys start with the same projection, so that attention starts as a kernel on
        # positions: a click looks around itself from the first step on, and need not learn to.
        lecun_normal = nn.initializers.lecun_normal()
        init_key = self.make_rng("params") if self.is_initializing() else None

        def same_for_both(key, shape, dtype=jnp.float32):
            return lecun_normal(key if init_key is None else init_key, shape, dtype)

        def inward(name, kernel_init):
            kernel, bias = Projection(inner, kernel_init, self.dtype, name=name)(dim)
            return (
                rearrange(kernel, "d (a c) -> d a c", a=self.num_heads),
                rearrange(bias, "(a c) -> a c", a=self.num_heads),
            )

        q_kernel, q_bias = inward("q_proj", same_for_both)
        k_kernel, k_bias = inward("k_proj", same_for_both)
        v_kernel, v_bias = inward("v_proj", lecun_normal)
        out_kernel, out_bias = Projection(dim, lecun_normal, self.dtype, name="out_proj")(inner)
        out_kernel = rearrange(out_kernel, "(a c) d -> a c d", a=self.num_heads)
        return Weights(q_kernel, q_bias, k_kernel, k_bias, v_kernel, v_bias, out_kernel, out_bias)


class AttentionWeights(_OfAttention):
    """The weights of an ``Attention``, for those who do not apply it to tokens as they are."""

    @nn.compact
    def __call__(self, dim: int) -> "Weights":
        return self.weights(dim)


class Attention(_OfAttention):
    """Multi-head attention whose inner width may be smaller than the embedding's.

    Queries and keys carry an axis of objects that may be 1 on either side where all objects of an
    image share it: it is broadcast inside the product and never copied.

    An object has a handful of tokens and thousands of cells. Where the cells are its own, the
    tokens are brought through the cells' projections instead of the cells: for every head,
    ``(W_q t) . (W_k c) = (W_k^T W_q t) . c`` and ``sum_c p_c (W_v c) = W_v (sum_c p_c c)``. This is
    exact, takes less than half of the arithmetic, and no projected cells are ever in memory.
    """

    @nn.compact
    def __call__(
        self,
        queries: Float[Array, "b #p s d"],
        keys: Float[Array, "b #p t d"],
        values: Float[Array, "b #p t d"],
        keys_valid: Bool[Array, "b #p t"] | None = None,
    ) -> Float[Array, "b p s d"]:
        weights = self.weights(queries.shape[-1])
        queries, keys, values = (x.astype(self.dtype) for x in (queries, keys, values))
        num_queries, num_keys = (_known(x.shape[2], _OPEN_TOKENS) for x in (queries, keys))
        if num_queries > num_keys:
            return _cells_ask_tokens(weights, queries, keys, values, keys_valid)
        return _tokens_ask(weights, queries, keys, values, keys_valid)


class Weights(NamedTuple):
    """Of all projections, per head."""

    q_kernel: Float[Array, "d a c"]
    q_bias: Float[Array, "a c"]
    k_kernel: Float[Array, "d a c"]
    k_bias: Float[Array, "a c"]
    v_kernel: Float[Array, "d a c"]
    v_bias: Float[Array, "a c"]
    out_kernel: Float[Array, "a c d"]
    out_bias: Float[Array, " d"]

    def folding_pays(self, few: Array, many: Array) -> bool:
        """Whether few tokens are better brought through a projection of the many."""
        dim, num_heads, head_dim = self.q_kernel.shape
        is_shared = _known(many.shape[1], _OPEN_OBJECTS) == 1
        return folding_pays(
            _known(few.shape[2], _OPEN_TOKENS),
            _known(many.shape[2], _OPEN_TOKENS),
            dim,
            num_heads * head_dim,
            num_heads,
            num_sharing=_known(few.shape[1], _OPEN_OBJECTS) if is_shared else 1,
        )


def _known(size: DimSize, otherwise: int) -> int:
    """A length, or what to count with where an export leaves it open."""
    return size if isinstance(size, int) else otherwise


def folding_pays(
    num_few: int,
    num_many: int,
    dim: int,
    inner: int,
    num_heads: int,
    num_sharing: float = 1,
) -> bool:
    """Whether it takes less to bring few tokens through a projection of many than to project these.

    Args:
      num_few, num_many: tokens on either side, of an object.
      dim: channels of tokens.
      inner: channels of all heads.
      num_heads: heads.
      num_sharing: objects that share the many, and would share their projection.
    """
    projected = num_many * inner * (dim / num_sharing + num_few)
    folded = num_few * dim * (inner + num_many * num_heads)
    # What is projected must be written and read again besides.
    return folded < 1.1 * projected


def _tokens_ask(w, queries, keys, values, keys_valid):
    """Few queries; keys may be many."""
    num_heads, head_dim = w.q_bias.shape
    fold = w.folding_pays(queries, keys)
    if fold:
        # The keys' bias adds the same to all logits of a query, which softmax does not see.
        rows = _fold(_project(queries, w.q_kernel, w.q_bias), w.k_kernel)
    else:
        rows = _in_place(_project_packed(queries, w.q_kernel, w.q_bias), num_heads)
        keys = _project_packed(keys, w.k_kernel, w.k_bias)
    logits = _split_heads(_meet("bpfd,bptd->bpft", _join_heads(rows), keys), num_heads)
    logits = logits * head_dim**-0.5
    if keys_valid is not None:
        logits = jnp.where(keys_valid[:, :, None, None, :], logits, -jnp.inf)
    probs = _join_heads(jax.nn.softmax(logits, axis=-1).astype(values.dtype))
    if not fold:
        values = _project_packed(values, w.v_kernel, w.v_bias)
    means = _split_heads(_meet("bpft,bptd->bpfd", probs, values, values.dtype), num_heads)
    return _project_out(w, _project_means(w, means) if fold else _own(means))


def _cells_ask_tokens(w, queries, keys, values, keys_valid):
    """Many queries and few keys; the many stay the last axis of logits, which is fast to sum."""
    num_heads, head_dim = w.q_bias.shape
    k = _project(keys, w.k_kernel, w.k_bias)
    if w.folding_pays(keys, queries):
        rows = _join_heads(_fold(k, w.q_kernel))
        logits = _split_heads(_meet("bpfd,bpsd->bpfs", rows, queries), num_heads)
        logits += _dot_bias(w.q_bias, k)[..., None]
    else:
        queries = _project_packed(queries, w.q_kernel, w.q_bias)
        rows = _in_place(rearrange(k, "b p t a c -> b p t (a c)"), num_heads)
        logits = _meet("bpfd,bpsd->bpfs", _join_heads(rows), queries)
        logits = _split_heads(logits, num_heads)
    logits = logits * head_dim**-0.5
    if keys_valid is not None:
        logits = jnp.where(keys_valid[:, :, :, None, None], logits, -jnp.inf)
    probs = _join_heads(jax.nn.softmax(logits, axis=2).astype(values.dtype))
    # Unlike queries, what comes back is every object's own.
    return add_bias(
        _meet("bpfs,bpfd->bpsd", probs, _bring_out(w, values), values.dtype), w.out_bias
    )


# Few and many meet over one axis each: XLA's CPU compiler would copy the cells otherwise. Heads
# come last in it: they are eight, as are the rows of a TPU's tiles, so tokens can be summed over
# without moving anything.
def _join_heads(x):
    return rearrange(x, "b p s a d -> b p (s a) d")


def _split_heads(x, num_heads):
    return rearrange(x, "b p (s a) d -> b p s a d", a=num_heads)


def _project(x, kernel, bias):
    return add_shared(jnp.einsum("bptd,dac->bptac", x, kernel), bias)


def _dot_bias(bias, heads):
    """What a bias adds to the logits of all queries, in float32 as they are."""
    return jnp.einsum("ac,bptac->bpta", bias, heads.astype(jnp.float32), precision=EXACT)


def _fold(rows, kernel):
    """Projected tokens, brought back through the projection of what they will meet."""
    return jnp.einsum("bpsac,dac->bpsad", rows, kernel)


def _project_means(w, means):
    """Projected values, heads side by side, from means of values that were not projected."""
    heads = add_shared(jnp.einsum("bpsad,dac->bpsac", means, w.v_kernel), w.v_bias)
    return rearrange(heads, "b p s a c -> b p s (a c)")


def _project_out(w, heads):
    return add_bias(jnp.einsum("bpse,ed->bpsd", heads, _packed_out(w)), w.out_bias)


def _packed(kernel):
    return rearrange(kernel, "d a c -> d (a c)")


def _packed_out(w):
    return rearrange(w.out_kernel, "a c d -> (a c) d")


def _bring_out(w, values):
    """What each head of each token adds to whoever attends to it alone."""
    v = _project(values, w.v_kernel, w.v_bias)
    return _join_heads(jnp.einsum("bptac,acd->bptad", v, w.out_kernel))


def _project_packed(x, kernel, bias):
    """Heads side by side: alone, few channels would leave a TPU's lanes empty."""
    return add_bias(jnp.einsum("bptd,de->bpte", x, _packed(kernel)), bias.reshape(-1))


def _in_place(packed, num_heads):
    """Each head of few tokens in its own place among zeros, to meet heads that are side by side."""
    return packed[:, :, :, None] * _places(num_heads, packed)


def _own(rows):
    """Of each head's row what is in its place, ``_in_place``'s other way."""
    return jnp.sum(rows * _places(rows.shape[3], rows), axis=3)


def _places(num_heads, like):
    dim = like.shape[-1]
    return jnp.asarray(np.kron(np.eye(num_heads), np.ones(dim // num_heads)), like.dtype)


def _meet(equation, few, many, dtype=jnp.float32):
    """A product of what objects have with what they have or share: ``p`` is dropped if shared."""
    (left, right), out = equation.split("->")[0].split(","), equation.split("->")[1]
    if many.shape[1] == 1 and few.shape[1] > 1:
        many, right = many[:, 0], right.replace("p", "")
    elif few.shape[1] == 1 and many.shape[1] > 1:
        few, left = few[:, 0], left.replace("p", "")
    return jnp.einsum(f"{left},{right}->{out}", few, many, preferred_element_type=dtype)


# Kernels for TPUs, in which each cell of an object is read once. The products of tokens before and
# after them are of whole rows with zeros in them: a TPU multiplies the zeros faster than it would
# put heads in an order in which there are none.


def fits_kernels(
    tokens: Float[Array, "b #p t d"], cells: Float[Array, "b #p k d"], num_heads: int
) -> bool:
    """Whether tokens and cells fill the registers of the kernels below."""
    num_rows = _known(tokens.shape[2], 1) * num_heads
    num_cells, dim = (_known(size, 1) for size in cells.shape[2:])
    return num_heads == SUBLANES and cell_means_kernel.supports(num_cells, num_rows, dim)


def _fold_in_place(rows, kernel):
    """``_fold`` of rows that are in their places, joined."""
    return _join_heads(jnp.einsum("bpsae,de->bpsad", rows, _packed(kernel)))


def ask_cells(
    weights: Weights,
    tokens: Float[Array, "b p t d"],
    cells: Float[Array, "b p k d"],
    cell_pe: Float[Array, "k d"],
    *,
    interpret: bool,
) -> tuple[Float[Array, "b p t d"], Float[Array, "b p k d"]]:
    """Attention of tokens to the cells of their object, as ``Attention`` has it; and the cells.

    What follows should use these cells (``cell_means_kernel.cell_means``).
    """
    b = cells.shape[0]
    num_heads, head_dim = weights.q_bias.shape
    rows = _project_packed(tokens, weights.q_kernel, weights.q_bias)
    rows = multiply(rows, head_dim**-0.5)
    rows = _fold_in_place(_in_place(rows, num_heads), weights.k_kernel)
    means, joined = cell_means_kernel.cell_means(
        _join_objects(rows), _join_objects(cells), cell_pe, interpret=interpret
    )
    means = _split_heads(rearrange(means, "(b p) f d -> b p f d", b=b), num_heads)
    heads = _own(jnp.einsum("bpsad,de->bpsae", means, _packed(weights.v_kernel)))
    return _project_out(weights, add_bias(heads, weights.v_bias.reshape(-1))), joined.reshape(
        cells.shape
    )


def answer_cells(
    weights: Weights,
    norm: tuple[Float[Array, " d"], Float[Array, " d"]],
    cells: Float[Array, "b p k d"],
    cell_pe: Float[Array, "k d"],
    keys: Float[Array, "b p t d"],
    values: Float[Array, "b p t d"],
    keys_valid: Bool[Array, "b p t"],
    dropout_seeds: Int[Array, "b p"] | None,
    dropout_rate: float,
    *,
    interpret: bool,
) -> Float[Array, "b p k d"]:
    """Cells, with what attention to their object's tokens adds to them, normalised.

    Args:
      weights: of the attention.
      norm: scale and shift of the LayerNorm.
      cells, cell_pe: of each object; their positions.
      keys, values, keys_valid: tokens.
      dropout_seeds: of ``ops.dropout.keeps``; None for no dropout.
      dropout_rate: of what is added.
      interpret: whether to run it without a TPU, slowly.
    """
    b, _, _, dim = cells.shape
    num_heads, head_dim = weights.q_bias.shape
    k = multiply(_project_packed(keys, weights.k_kernel, weights.k_bias), head_dim**-0.5)
    biases = _dot_bias(weights.q_bias, rearrange(k, "b p t (a c) -> b p t a c", a=num_heads))
    k = _in_place(k, num_heads)
    rows = _fold_in_place(k, weights.q_kernel)
    biases = jnp.where(keys_valid[..., None], biases, -jnp.inf)
    brought_out = _in_place(_project_packed(values, weights.v_kernel, weights.v_bias), num_heads)
    brought_out = jnp.einsum("bptae,ed->bptad", brought_out, _packed_out(weights))
    brought_out = _join_heads(brought_out)
    rate = 0.0 if dropout_seeds is None else dropout_rate
    out = over_cells(
        CellFunction(
            functools.partial(_answer, num_heads, rate),
            out_rows=None,
            name="answer_cells",
            flops_per_cell=4 * rows.shape[2] * dim,
        ),
        (weights.out_bias[None], *(x[None] for x in norm)),
        tuple(_join_objects(x) for x in (rows, _join_heads(biases[..., None]), brought_out)),
        _join_objects(cells),
        positions=cell_pe,
        seeds=None if dropout_seeds is None else dropout_seeds.reshape(-1),
        out_dtype=cells.dtype,
        interpret=interpret,
    )
    return rearrange(out, "(b p) k d -> b p k d", b=b)


def _answer(num_heads, dropout_rate, weights, own, cells, given):
    """Some cells of one object; tokens and heads are joined on the first axis of logits."""
    rows, biases, brought_out = own
    out_bias, scale, shift = weights
    logits = product(rows, cells + given.positions, (1, 1)) + biases
    by_token = logits.reshape(-1, num_heads, logits.shape[1])
    largest = jax.lax.stop_gradient(jnp.max(by_token, axis=0))
    probs = jnp.exp(by_token - largest)
    probs *= 1.0 / jnp.sum(probs, axis=0)
    added = product(probs.reshape(logits.shape).astype(cells.dtype), brought_out, (0, 0))
    added += out_bias
    if dropout_rate:
        rows = given.first + jax.lax.broadcasted_iota(jnp.int32, (added.shape[0], 1), 0)
        keep = keeps(given.seed, rows, added.shape[1], dropout_rate)
        added = kept(added, keep, dropout_rate)
    x = cells.astype(jnp.float32) + added
    x -= jnp.mean(x, axis=1, keepdims=True)
    variance = jnp.mean(jnp.square(x), axis=1, keepdims=True)
    return x * jax.lax.rsqrt(variance + NORM_EPSILON) * scale + shift


def _join_objects(x):
    return rearrange(x, "b p ... -> (b p) ...")
