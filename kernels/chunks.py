"""Chunk algebra of gated recurrences in plain jnp, shared by the implementations that work chunk by chunk.

Inside a chunk of C tokens the pair weights of an elementwise gate are, for i >= j and g = log_decay <= 0,

  P_ij = sum_d q_id k_jd exp(sum of g_d over (j, i])

Writing the exponent as a difference of cumulative sums cancels when a gate is strong and overflows when it is split
between q and k. The dyadic levels s = 1, 2, 4, ..., C/2 do neither. Tokens i > j belong to exactly one level: the s for
which i lies in the second and j in the first half of one block of 2s tokens. Split at the middle of that block, the
exponent is a sum over rows of the second half up to i (`upto`) plus a sum over rows of the first half after j
(`after`), both <= 0:

  P = sum_s mask_s * ((q * exp(upto_s)) (k * exp(after_s))^T) + diag(q . k)

so every level is a matrix product, exact for any gate, a reset included. Each level's sums follow from the level below
by adding the total of the neighbouring half. Sums over whole chunks (level s = C) carry the state in and out.
"""

import jax.numpy as jnp

SIZES = (16, 32, 64, 128)
# The gate of a segment's first token: exp of it is 0 in float32, and sums of it stay finite.
RESET = -1e4


def segment_starts(segment_ids):
  """True at each token `[B, T]` whose id differs from the previous one's; never at the first, which has none."""
  return jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))


def repeat_heads(x, heads):
  """`[B, T, G, D]` to `[B, T, heads, D]`, each head repeated heads / G times in place."""
  return x if x.shape[2] == heads else jnp.repeat(x, heads // x.shape[2], axis=2)


def split(x, size):
  """`[B, T, H, D]` to chunks `[N, B, H, size, D]`; zeros fill the last one, which leaves a state unchanged."""
  B, T, H, D = x.shape
  x = jnp.pad(x, ((0, 0), (0, -T % size), (0, 0), (0, 0)))
  return x.reshape(B, -1, size, H, D).transpose(1, 0, 3, 2, 4)


def merge(x, T):
  """Inverse of `split`: `[N, B, H, C, D]` to `[B, T, H, D]`."""
  N, B, H, C, D = x.shape
  return x.transpose(1, 0, 3, 2, 4).reshape(B, N * C, H, D)[:, :T]


def blocks(x, size):
  """Rows `[..., C, D]` as blocks `[..., C / size, size, D]`."""
  return x.reshape(*x.shape[:-2], x.shape[-2] // size, size, x.shape[-1])


def halves(x):
  """Blocks `[..., M, s, D]` by turns: the first and the second halves `[..., M/2, s, D]` of blocks twice the size."""
  x = x.reshape(*x.shape[:-3], x.shape[-3] // 2, 2, *x.shape[-2:])
  return x[..., 0, :, :], x[..., 1, :, :]


def join(first, second):
  """Inverse of `halves`, as blocks `[..., M/2, 2s, D]`."""
  return jnp.concatenate([first, second], axis=-2)


def exponents(g):
  """Log decays between rows and the middles of their dyadic blocks, for gates `[..., C, K]` with C a power of two.

  Returns `(levels, upto, after)`. `levels` lists for s = 1, 2, ..., C/2 the pair `(upto_s, after_s)`, both
  `[..., C/2s, s, K]`: of the second halves, sums from the middle up to and including each row; of the first halves,
  sums over the rows after each row up to the middle. `upto` and `after` `[..., C, K]` are these sums over the whole
  chunk; the last row of `upto` is the chunk's total. Linear in g, so its transpose turns cotangents of exponents into
  those of gates.
  """
  upto, after = blocks(g, 1), jnp.zeros_like(blocks(g, 1))
  levels = []
  while upto.shape[-3] > 1:
    (upto_1, upto_2), (after_1, after_2) = halves(upto), halves(after)
    levels.append((upto_2, after_1))
    upto = join(upto_1, upto_1[..., -1:, :] + upto_2)
    after = join(after_1 + upto_2[..., -1:, :], after_2)
  return levels, upto[..., 0, :, :], after[..., 0, :, :]
