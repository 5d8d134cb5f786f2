"""Causal attention within the documents of packed windows, by cuDNN's kernels for packed sequences.

cuDNN takes every document as a sequence of its own, and skips the pairs of tokens from different ones. Under a mask it
would compute them, and read the mask once per head. It needs a number of documents per window that no window exceeds,
for which it also stores statistics. A batch with a window of more than `MOST` documents takes the masked form.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, Int

from kernels.derivatives import RESIDUALS
from lin_jax.sharding import map_over_heads

try:  # JAX gives the packed layout no public name. Under a version that moves it, attention takes the masked form.
  from jax._src.cudnn.fused_attention_stablehlo import MaskType, check_compute_capability, dot_product_attention
except ImportError:
  MaskType = check_compute_capability = dot_product_attention = None

MOST = 16  # documents per window
CAPABILITY = "9.0"  # of GPUs for which cuDNN has the packed layout


def supported(q: Array) -> bool:
  """Whether the default backend's GPU has cuDNN's packed layout for queries like `q`."""
  return q.dtype.itemsize == 2 and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256 and on_hopper()


def on_hopper() -> bool:
  """Whether the default backend's GPU is at least a Hopper. False under a version of JAX that cannot tell."""
  return check_compute_capability is not None and check_compute_capability(CAPABILITY)


def attend(q: Float[Array, "B T H K"], k: Float[Array, "B T G K"], v: Float[Array, "B T G K"], runs: Int[Array, "B T"],
           masked: Callable) -> Float[Array, "B T H K"]:
  """Attention of each token to those before it in its document, softmax(q k^T / sqrt(K)) v.

  Args:
    runs: numbers of the documents of a row, 0 in the first and one more in each document after it.
    masked: the same function of q, k, v and runs for any number of documents. It runs if a row has more than `MOST`.
  """
  return map_over_heads(_with_fallback(masked), "bthk,bshk,bshk,bt->bthk")(q, k, v, runs)


def _with_fallback(masked):
  function = jax.custom_vjp(lambda q, k, v, runs: _forward(masked, q, k, v, runs)[0])
  function.defvjp(lambda q, k, v, runs: _forward(masked, q, k, v, runs),
                  lambda residuals, do: _backward(masked, residuals, do))
  return function


def _forward(masked, q, k, v, runs):
  structure, known = None, None

  def packed():
    nonlocal structure, known
    o, pullback = jax.vjp(lambda *x: _packed(*x, runs), q, k, v)
    leaves, structure = jax.tree.flatten(pullback)
    # Arrays that exist outside of the branch would be copied out of it.
    known = [next((i for i, x in enumerate((q, k, v, o)) if x is leaf), None) for leaf in leaves]
    return o, [leaf for leaf, place in zip(leaves, known, strict=True) if place is None]

  few, (_, shapes) = jnp.max(runs) < MOST, jax.eval_shape(packed)
  # A branch cannot leave out what only the other one keeps, and the rare one computes its output again.
  zeros = lambda: [jnp.zeros(x.shape, x.dtype) for x in shapes]
  o, kept = jax.lax.cond(few, packed, lambda: (masked(q, k, v, runs), zeros()))
  few, o, kept = jax.tree.map(lambda x: checkpoint_name(x, RESIDUALS), (few, o, kept))
  rest = iter(kept)
  leaves = [next(rest) if place is None else (q, k, v, o)[place] for place in known]
  return o, (few, jax.tree.unflatten(structure, leaves), q, k, v, runs)


def _backward(masked, residuals, do):
  few, pullback, q, k, v, runs = residuals
  again = lambda: jax.vjp(lambda *x: masked(*x, runs), q, k, v)[1](do)
  return *jax.lax.cond(few, lambda: pullback(do), again), None


def _packed(q, k, v, runs):
  lengths, offsets = documents(runs)
  with jax.numpy_dtype_promotion("standard"):
    return dot_product_attention(q, k, v, q_seqlen=lengths, kv_seqlen=lengths, q_offsets=offsets, kv_offsets=offsets,
                                 scale=q.shape[-1] ** -0.5, mask_type=MaskType.PADDING_CAUSAL)


def documents(runs: Int[Array, "B T"]) -> tuple[Int[Array, "B M"], Int[Array, "B _"]]:
  """Lengths of the first `MOST` documents of each row and where they start, -1 behind the row's last document."""
  number, runs = jnp.arange(MOST, dtype=runs.dtype)[None, :, None], runs[:, None]
  lengths, starts = (jnp.sum(x, axis=2, dtype=jnp.int32) for x in (runs == number, runs < number))
  lengths, starts = (jnp.where(lengths > 0, x, -1) for x in (lengths, starts))
  return lengths, jnp.pad(starts, ((0, 0), (0, 1)), constant_values=-1)
