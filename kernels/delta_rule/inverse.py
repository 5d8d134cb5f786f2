"""The inverse that the delta rule's chunks share, T = (I + strictly lower part of diag(beta) K K^T)^-1, as a kernel.

A program holds one chunk of one head in blocks of 16 rows, in float32. The diagonal blocks are inverted by forward
substitution and the others follow from them, X_ij = -X_ii sum over j <= m < i of L_im X_mj. Correlated keys make the
powers of L larger than T by many orders of magnitude, so a product of powers would lose every digit.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels import triton_blocks
from kernels.triton_blocks import operand, rows_and_columns

SIZE = 16  # rows of a block, the least that a product takes
DEPTH = 64  # K columns of one product
EPSILON = 1e-6  # under the root of a norm, as in `kernels.chunks.normalize`


def inverse(q, k, beta, normalize_qk, chunk):
  """T `[B, H, N, C, C]` in float32, and 1 / norm of the rows of q and k, `[B, T, H]` each.

  Without `normalize_qk` the norms are None; with it T is that of the normalized keys.
  """
  (B, T, H, K), C = k.shape, chunk
  keys = pl.BlockSpec((None, C, None, K), lambda n, h, b: (b, n, h, 0))
  rows = pl.BlockSpec((None, C, None), lambda n, h, b: (b, n, h))
  t, *norms = triton_blocks.launch(
      functools.partial(_inverse_kernel, depth=min(DEPTH, K)), name="delta_rule_inverse", grid=(T // C, H, B),
      in_specs=[keys, rows, *[keys] * normalize_qk],
      out_specs=[pl.BlockSpec((None, None, None, C, C), lambda n, h, b: (b, h, n, 0, 0)), *[rows] * 2 * normalize_qk],
      out_shape=[jax.ShapeDtypeStruct((B, H, T // C, C, C), jnp.float32),
                 *[jax.ShapeDtypeStruct((B, T, H), jnp.float32)] * 2 * normalize_qk],
      num_warps=1, num_stages=1)(k, beta, *[q] * normalize_qk)
  return t, *(norms or (None, None))


def _inverse_kernel(k_ref, beta_ref, *refs, depth, dot):
  *q_ref, t_ref = refs if len(refs) == 1 else (refs[0], refs[1])
  norm_refs = refs[2:]
  C, dtype = k_ref.shape[0], operand(k_ref.dtype)
  blocks = range(C // SIZE)
  rows = [pl.ds(i * SIZE, SIZE) for i in blocks]
  row, column = rows_and_columns(SIZE)
  products = _products(k_ref, k_ref, rows, [(i, j) for i in blocks for j in range(i + 1)], depth, dtype, dot)
  weights = [beta_ref[rows[i]] for i in blocks]
  others = [None for _ in blocks]
  if norm_refs:
    own = _products(q_ref[0], q_ref[0], rows, [(i, i) for i in blocks], depth, dtype, dot)
    for i in blocks:
      inverse_norm = lambda x, axis: jax.lax.rsqrt(
          jnp.sum(jnp.where(row == column, x, 0.0), axis=axis) + EPSILON)
      norm_refs[0][rows[i]] = inverse_norm(own[i, i], 1)
      norm = inverse_norm(products[i, i], 1)
      norm_refs[1][rows[i]] = norm
      weights[i], others[i] = weights[i] * norm, inverse_norm(products[i, i], 0)
  lower = {}
  for (i, j), x in products.items():
    x = x * weights[i][:, None]
    lower[i, j] = x if others[j] is None else x * others[j][None]
  x = {}
  for i in blocks:
    x[i, i] = _substitute(jnp.where(row > column, lower[i, i], 0.0))
    for j in reversed(range(i)):
      x[i, j] = -dot(x[i, i], sum(dot(lower[i, m], x[m, j]) for m in range(j, i)))
    for j in blocks:
      t_ref[rows[i], rows[j]] = x[i, j] if j <= i else jnp.zeros((SIZE, SIZE), jnp.float32)


def _products(a_ref, b_ref, rows, pairs, depth, dtype, dot):
  """A_i B_j^T of blocks of rows."""
  found = {pair: jnp.zeros((SIZE, SIZE), jnp.float32) for pair in pairs}
  for d in range(0, a_ref.shape[1], depth):
    a, b = ([ref[r, pl.ds(d, depth)].astype(dtype) for r in rows] for ref in (a_ref, b_ref))
    found = {(i, j): x + dot(a[i], b[j].T) for (i, j), x in found.items()}
  return found


def _substitute(lower):
  """(I + lower)^-1 of one block: row j is final when its multiples leave the rows below it."""
  row, column = rows_and_columns(SIZE)

  def eliminate(j, x):
    multiples = jnp.sum(jnp.where(column == j, lower, 0.0), axis=1)
    final = jnp.sum(jnp.where(row == j, x, 0.0), axis=0)
    return x - multiples[:, None] * final[None]

  return jax.lax.fori_loop(0, SIZE - 1, eliminate, jnp.where(row == column, 1.0, 0.0))
