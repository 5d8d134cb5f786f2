"""Chunk algebra of gated recurrences in plain jnp, shared by the implementations that work chunk by chunk.

With a gate per channel, the weights of pairs are a sum over dyadic levels, which `kernels/gla/README.md` derives. Each
level is a product of decayed queries and keys, whose exponents are sums of gates between the middle of a block and a
row. This is exact for any gate, a reset included, whereas differences of cumulative sums cancel or overflow. Only
queries of second halves and keys of first halves enter a level, so one array Z_s holds both. Two more sums carry the
state: `upto` from the start of the chunk to each row, and `after` from each row to the end of the chunk.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from kernels import cpu_compiler

SIZES = (16, 32, 64, 128)
# The gate of a segment's first token: exp of it is 0 in float32, and sums of it stay finite.
RESET = -1e4


def bounded(log_decay):
  """`log_decay` with every gate below RESET, also -inf, raised to RESET: the decay is still 0, but sums stay finite.

  The gradient of such a gate is 0, as it is in a scan over tokens. NaN stays NaN.
  """
  return jnp.where(log_decay < RESET, RESET, log_decay)


def decayed(decay, state):
  """`decay * state`, but 0 where the decay is 0, whatever the state holds: a reset forgets NaN and infinities too."""
  return decay * jnp.where(decay == 0, 0.0, state)


def segment_starts(segment_ids):
  """True at each token `[B, T]` whose id differs from the previous token's; never at the first token."""
  return jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))


def with_resets(log_decay, starts, heads):
  """A decay per token `[B, T, heads]` that is RESET where a segment starts, from a decay per token or head, or None."""
  log_decay = jnp.broadcast_to(0.0 if log_decay is None else log_decay, (*starts.shape, heads)).astype(jnp.float32)
  return jnp.where(starts[:, :, None], RESET, log_decay)


def repeat_heads(x, heads):
  """`[B, T, G, D]` to `[B, T, heads, D]`, each head repeated heads / G times in place."""
  return x if x.shape[2] == heads else jnp.repeat(x, heads // x.shape[2], axis=2)


def sum_heads(x, heads):
  """Transpose of `repeat_heads`: `[B, T, H, D]` to `[B, T, heads, D]`, each group's sum formed in float32."""
  if x.shape[2] == heads:
    return x
  return jnp.sum(x.reshape(*x.shape[:2], heads, -1, x.shape[3]), axis=3, dtype=jnp.float32).astype(x.dtype)


def to_chunks(x, size):
  """`[B, T, H, D]` to chunks `[N, B, size, H, D]`. Zeros fill up the last chunk, and leave a state unchanged."""
  B, T, H, D = x.shape
  x = jnp.pad(x, ((0, 0), (0, -T % size), (0, 0), (0, 0)))
  return jnp.moveaxis(x.reshape(B, -1, size, H, D), 1, 0)


def merge(x, T):
  """Inverse of `to_chunks`: `[N, B, C, H, D]` to `[B, T, H, D]`."""
  N, B, C, H, D = x.shape
  return jnp.moveaxis(x, 0, 1).reshape(B, N * C, H, D)[:, :T]


# Inside the body of a scan over chunks.


def heads_first(arrays):
  """Chunks `[B, C, H, D]` to `[B, H, C, D]`, or back."""
  return [jnp.swapaxes(x, 1, 2) for x in arrays]


def wide(x):
  """`x` in float32."""
  return x.astype(jnp.float32)


def normalize(x):
  """The rows scaled to norm 1, in float32. The 1e-6 of the published layers keeps a row of zeros finite."""
  x = wide(x)
  return x * jax.lax.rsqrt(rowsum(x * x) + 1e-6)


def rowsum(x):
  """Sum over the last axis, which stays with size 1."""
  return jnp.sum(x, axis=-1, keepdims=True)


def product(dtype):
  """An einsum with float32 accumulation. Its operands are float32 for float32 inputs and bfloat16 for 16-bit inputs."""
  # States and cotangents may leave the range of float16.
  operand = jnp.float32 if dtype == jnp.float32 else jnp.bfloat16
  return lambda subscripts, a, b: einsum(subscripts, a.astype(operand), b.astype(operand))


def einsum(subscripts, a, b):
  """A product of two arrays with float32 accumulation, which no compiler fuses with the operations before it."""
  a, b = cpu_compiler.materialize(a, b)
  return jnp.einsum(subscripts, a, b, precision="highest", preferred_element_type=jnp.float32)


@functools.cache
def level_masks(size: int):
  """The 0/1 matrices of a chunk's L = log2(size) levels, as float32 numpy constants.

  Returns:
    terms: `[L + 2, C, C]`; `terms @ g` are the exponents E_s of every level, then `upto`, then `after`.
    pairs: `[L, C, C]`, the pairs (i, j) of each level.
    second: `[L, C, 1]`, the rows in second halves.
  """
  row, column = np.indices((size, size))
  half = 2 ** np.arange(size.bit_length() - 1)[:, None, None]
  second = row // half % 2 == 1
  same_half = row // half == column // half
  terms = [*(same_half & np.where(second, column <= row, column > row)), column <= row, column > row]
  pairs = second & (row // half == column // half + 1)
  return tuple(np.asarray(x, np.float32) for x in (terms, pairs, second[..., :1]))


def decays(g):
  """exp of the exponents of every level, of `upto` and of `after`: `[B, H, C, K]` to `[B, H, L + 2, C, K]`."""
  terms, _, _ = level_masks(g.shape[2])
  return jnp.exp(einsum("lij,bhjk->bhlik", terms, g))


def sum_exponent_cotangents(de):
  """Transpose of the sums in `decays`: `[B, H, L + 2, C, K]` to the cotangent of g `[B, H, C, K]`."""
  B, H, _, C, K = de.shape
  terms, _, _ = level_masks(C)
  # A batched product: XLA on a CPU would otherwise move the batch of the large operand to the end and back.
  terms = jnp.broadcast_to(terms.reshape(-1, C).T, (B, H, C, terms.shape[0] * C))
  return einsum("bhjr,bhrk->bhjk", terms, de.reshape(B, H, -1, K))


def exponents(g):
  """Sums of a decay per token g `[B, H, C, 1]`, each formed directly, so that a reset costs no precision.

  Returns:
    between: `[B, H, C, C]`, over (j, i] for i >= j; zero above the diagonal.
    upto, after: `[B, H, C, 1]`, up to and including i, and over the tokens after j.
    total: `[B, H, 1, 1]`, over the chunk.
  """
  row, column = np.indices((g.shape[2], g.shape[2]))
  below, upto = np.float32(row > column), np.float32(row >= column)
  sums = functools.partial(einsum, "ir,bhrj->bhij")
  return sums(upto, below[None, None] * g), sums(upto, g), sums(below.T, g), jnp.sum(g, axis=2, keepdims=True)


def unit_lower_inverse(lower):
  """(I + lower)^-1 for strictly lower triangular `[..., C, C]` in float32, C a power of two of at least 16.

  Forward substitution inverts the diagonal blocks of 16 rows. Larger blocks follow from the inverses A' and B' of
  smaller ones: [[A, 0], [L, B]]^-1 = [[A', 0], [-B' L A', B']]. For correlated keys the powers of `lower` are larger
  than its inverse by many orders of magnitude, so a product of them, the Neumann series, would lose every digit.
  """
  C, size = lower.shape[-1], 16
  blocks = lambda row, size: jnp.stack(
      [lower[..., i + row:i + row + size, i:i + size] for i in range(0, C, size + row)], axis=-3)
  diagonal = blocks(0, size)

  def eliminate(j, inverse):
    take = jax.lax.dynamic_slice_in_dim
    return inverse - take(diagonal, j, 1, axis=-1) * take(inverse, j, 1, axis=-2)

  identity = jnp.broadcast_to(jnp.eye(size, dtype=lower.dtype), diagonal.shape)
  inverse = jax.lax.fori_loop(0, size - 1, eliminate, identity)
  while size < C:
    top, bottom = inverse[..., ::2, :, :], inverse[..., 1::2, :, :]
    corner = -einsum("...ij,...jk->...ik", einsum("...ij,...jk->...ik", bottom, blocks(size, size)), top)
    inverse = jnp.concatenate([
        jnp.concatenate([top, jnp.zeros_like(top)], axis=-1), jnp.concatenate([corner, bottom], axis=-1)], axis=-2)
    size *= 2
  return inverse[..., 0, :, :]
