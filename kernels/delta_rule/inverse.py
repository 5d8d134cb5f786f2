"""The triangular inverse that a chunk of the delta rule needs, as a kernel.

With A the strictly lower part of K K^T and b = diag(beta), (I + b A)^-1 = I - b Y and (I + A b)^-1 = I - Y b for one
and the same Y, the solution of (I + A b) Y = A. Y is strictly lower, finite and free of divisions for every beta; for
keys of norm 1 and beta up to 2 no entry is larger than 1, because Y_ij = k_i^T (product of I - beta k k^T) k_j. A decay
only multiplies its entries: along every path from token j to token i the gates are the same.

A program holds one chunk of one head in blocks of 16 rows, in float32. The diagonal blocks are found by forward
substitution and the others follow from them: Z = A_ij - sum over j <= m < i of A_im b_m Y_mj, Y_ij = Z - Y_ii b_i Z.
Correlated keys make the powers of A larger than Y by many orders of magnitude, so a product of powers would lose every
digit.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels import triton_blocks
from kernels.scalar_decay import UNIT, decay_of
from kernels.triton_blocks import halves, operand, rows_and_columns

SIZE = 16  # rows of a block, the least that a product takes
DEPTH = 64  # K columns of one product
EPSILON = 1e-6  # under the root of a norm, as in `kernels.chunks.normalize`


def inverse(q, k, beta, log_decay, normalize_qk, chunk):
  """D * Y `[B, H, N, parts, C, C]`, and three `[B, T, H]`: sums of gates, and 1 / norm of the rows of q and k.

  D is the decay from token j to token i, 1 without gates. D * Y is the sum of its parts: two of bfloat16 for 16-bit
  inputs, one of float32 for float32. The sums are those of a `scalar_decay.Decay`, None without gates. Without
  `normalize_qk` the norms are None; with it Y is that of normalized keys.
  """
  (B, T, H, K), C = k.shape, chunk
  dtype, gated = operand(k.dtype), log_decay is not None
  parts = 1 if dtype == jnp.float32 else 2
  keys = pl.BlockSpec((None, C, None, K), lambda n, h, b: (b, n, h, 0))
  rows = pl.BlockSpec((None, C, None), lambda n, h, b: (b, n, h))
  y, *others = triton_blocks.launch(
      functools.partial(_inverse_kernel, gated=gated, normalized=normalize_qk, depth=min(DEPTH, K)),
      name="delta_rule_inverse", grid=(T // C, H, B), in_specs=[keys, rows, *[rows] * gated, *[keys] * normalize_qk],
      out_specs=[pl.BlockSpec((None, None, None, parts, C, C), lambda n, h, b: (b, h, n, 0, 0, 0)),
                 *[rows] * (gated + 2 * normalize_qk)],
      out_shape=[jax.ShapeDtypeStruct((B, H, T // C, parts, C, C), dtype),
                 *[jax.ShapeDtypeStruct((B, T, H), jnp.int32)] * gated,
                 *[jax.ShapeDtypeStruct((B, T, H), jnp.float32)] * 2 * normalize_qk],
      num_warps=1, num_stages=1)(k, beta, *[log_decay] * gated, *[q] * normalize_qk)
  return y, others.pop(0) if gated else None, *(others or (None, None))


def _inverse_kernel(k_ref, beta_ref, *refs, gated, normalized, depth, dot):
  refs = list(refs)
  g_ref = refs.pop(0) if gated else None
  q_ref = refs.pop(0) if normalized else None
  y_ref = refs.pop(0)
  sums_ref = refs.pop(0) if gated else None
  norm_refs = refs
  C, dtype = k_ref.shape[0], operand(k_ref.dtype)
  blocks = range(C // SIZE)
  rows = [pl.ds(i * SIZE, SIZE) for i in blocks]
  row, column = rows_and_columns(SIZE)
  a = _products(k_ref, k_ref, rows, [(i, j) for i in blocks for j in range(i + 1)], depth, dtype, dot)
  beta = [beta_ref[rows[i]][None] for i in blocks]  # of the columns
  if normalized:
    own = _products(q_ref, q_ref, rows, [(i, i) for i in blocks], depth, dtype, dot)
    norm = lambda x, axis: jax.lax.rsqrt(jnp.sum(jnp.where(row == column, x, 0.0), axis=axis) + EPSILON)
    for i in blocks:
      norm_refs[0][rows[i]] = norm(own[i, i], 1)
      norm_refs[1][rows[i]] = norm(a[i, i], 1)
    of_rows, of_columns = ([norm(a[i, i], axis) for i in blocks] for axis in (1, 0))
    a = {(i, j): x * of_rows[i][:, None] * of_columns[j][None] for (i, j), x in a.items()}
  d = {}
  if gated:
    sums = _sums([g_ref[r] for r in rows])
    for r, x in zip(rows, sums):
      sums_ref[r] = x
    d = {(i, j): jnp.where((i > j) | (row >= column), jnp.exp2((sums[i][:, None] - sums[j][None]).astype(jnp.float32)
                           * UNIT), 0.0) for i, j in a}
  y = {}
  for i in blocks:
    y[i, i] = _substitute(jnp.where(row > column, a[i, i], 0.0), beta[i])
    for j in reversed(range(i)):
      z = a[i, j] - sum(dot(a[i, m] * beta[m], y[m, j]) for m in range(j, i))
      y[i, j] = z - dot(y[i, i] * beta[i], z)
    for j in blocks:
      found = d.get((i, j), 1.0) * y[i, j] if j <= i else jnp.zeros((SIZE, SIZE), jnp.float32)
      for part, x in enumerate([found] if dtype == jnp.float32 else halves(found)):
        y_ref[part, rows[i], rows[j]] = x


def _sums(gates):
  """Inclusive sums of a chunk's gates from those of each block's tokens."""
  before, sums = 0, []
  for g in gates:
    own = decay_of(g, SIZE).sums
    sums.append(before + own)
    before += jnp.min(own)
  return sums


def _products(a_ref, b_ref, rows, pairs, depth, dtype, dot):
  """A_i B_j^T of blocks of rows."""
  found = {pair: jnp.zeros((SIZE, SIZE), jnp.float32) for pair in pairs}
  for d in range(0, a_ref.shape[1], depth):
    a, b = ([ref[r, pl.ds(d, depth)].astype(dtype) for r in rows] for ref in (a_ref, b_ref))
    found = {(i, j): x + dot(a[i], b[j].T) for (i, j), x in found.items()}
  return found


def _substitute(a, beta):
  """Y of one block: row j is final when its multiples have left the rows below it."""
  row, column = rows_and_columns(SIZE)
  multiples = a * beta

  def eliminate(j, y):
    final = jnp.sum(jnp.where(row == j, y, 0.0), axis=0)
    return y - jnp.sum(jnp.where(column == j, multiples, 0.0), axis=1)[:, None] * final[None]

  return jax.lax.fori_loop(0, SIZE - 1, eliminate, a)
