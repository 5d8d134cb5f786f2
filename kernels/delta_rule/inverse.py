"""The kernels that find Y, the triangular inverse of a chunk of the delta rule. Letters as in `README.md`.

Y solves (I + X b) Y = X, so that (I + b X)^-1 = I - b Y. It is strictly lower, finite and free of divisions for every
beta. For keys of norm 1 and beta up to 2, no entry is larger than 1 without decay, because then Y_ij = k_i^T (product
of I - beta k k^T) k_j. From keys, a kernel finds Y without decay and multiplies it by D at the end. With a decay per
key channel, X is given.

A program holds one chunk of one head, in float32, in blocks of 16 rows. Forward substitution finds all diagonal blocks
at once with one lane per column, and the others follow from them: Z = X_ij - sum over j <= m < i of X_im b_m Y_mj,
Y_ij = Z - Y_ii b_i Z. Correlated keys make the powers of X larger than Y by many orders of magnitude, so a product of
powers would lose every digit.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels import triton_blocks
from kernels.scalar_decay import UNIT, decay_of
from kernels.triton_blocks import given, halves, key_head, leading_bits, operand, rows_and_columns

SIZE = 16  # rows of a block, the least that a product takes
DEPTH = 64  # key channels of one product in float32; twice as many in 16 bits, which are as many bytes in flight
WARPS = 1  # per program: its 32 lanes hold the columns of two diagonal blocks
STEP = 8  # columns of multiples that a lane holds at once
PARTS = 3  # of 8 significant bits each, which make a float32
EPSILON = 1e-6  # under the root of a norm, as in `kernels.chunks.normalize`


def inverse(q, k, beta, log_decay, normalize_qk, chunk, by_head=False):
  """Y `[B, H, N, parts, C, C]`, and three arrays `[B, T, H]`: sums of gates, and 1 / norm of the rows of q and k.

  Y is the sum of its parts: two of bfloat16 for 16-bit inputs, one of float32 for float32. Its 16 x 16 blocks above the
  diagonal are not written. The sums of gates are as in `scalar_decay.Decay`, and None without gates. Without
  `normalize_qk` the norms are None; with it, Y belongs to the normalized keys.

  With `by_head` the zeros of Y are written too, the sums are `[B, H, T]`, and a fifth array `[B, H, N, 1 or 3, C]` has
  beta, and with `normalize_qk` the factors of k and of q: a copy of whole tiles brings them to shared memory.
  """
  (B, T, G, K), H, C = k.shape, beta.shape[2], chunk
  dtype, gated, key = operand(k.dtype), log_decay is not None, key_head(H, G)
  parts = 1 if dtype == jnp.float32 else 2
  keys = pl.BlockSpec((None, C, None, K), lambda n, h, b: (b, n, key(h), 0))
  rows = pl.BlockSpec((None, C, None), lambda n, h, b: (b, n, h))
  norms = jax.ShapeDtypeStruct((B, T, H), jnp.float32)
  sums = jax.ShapeDtypeStruct((B, H, T) if by_head else (B, T, H), jnp.int32)
  of_head = pl.BlockSpec((None, None, C), lambda n, h, b: (b, h, n)) if by_head else rows
  vectors = 3 if normalize_qk else 1
  y, *others = triton_blocks.launch(
      functools.partial(_inverse_kernel, gated=gated, normalized=normalize_qk, by_head=by_head,
                        depth=min(DEPTH if parts == 1 or by_head and K > 2 * DEPTH else 2 * DEPTH, K)),
      name="delta_rule_inverse", grid=(T // C, H, B),
      in_specs=[keys, rows, *given(gated, rows), *given(normalize_qk, keys)],
      out_specs=[pl.BlockSpec((None, None, None, parts, C, C), lambda n, h, b: (b, h, n, 0, 0, 0)),
                 *given(gated, of_head), *given(normalize_qk, rows, rows),
                 *given(by_head, pl.BlockSpec((None, None, None, vectors, C), lambda n, h, b: (b, h, n, 0, 0)))],
      out_shape=[jax.ShapeDtypeStruct((B, H, T // C, parts, C, C), dtype),
                 *given(gated, sums), *given(normalize_qk, norms, norms),
                 *given(by_head, jax.ShapeDtypeStruct((B, H, T // C, vectors, C), jnp.float32))],
      num_warps=WARPS, num_stages=1)(k, beta, *given(gated, log_decay), *given(normalize_qk, q))
  sums = others.pop(0) if gated else None
  return y, sums, *(others[:2] if normalize_qk else (None, None)), *given(by_head, others[-1] if by_head else None)


def inverse_of_overlaps(overlaps, beta, dtype):
  """Y `[B, H, N, parts, C, C]` as `inverse` gives it for inputs of `dtype`, from X `[B, H, N, C, C]` in float32."""
  B, H, N, C, _ = overlaps.shape
  parts = 1 if operand(dtype) == jnp.float32 else 2
  return triton_blocks.launch(
      _inverse_of_overlaps_kernel, name="delta_rule_channel_inverse", grid=(N, H, B),
      in_specs=[chunk_square(C), pl.BlockSpec((None, C, None), lambda n, h, b: (b, n, h))],
      out_specs=chunk_square(C, parts),
      out_shape=jax.ShapeDtypeStruct((B, H, N, parts, C, C), operand(dtype)), num_warps=WARPS, num_stages=1)(
          overlaps, beta)


def chunk_square(C, *lead):
  """Block of one chunk of an array `[B, H, N, *lead, C, C]`."""
  return pl.BlockSpec((None, None, None, *lead, C, C), lambda n, h, b: (b, h, n, *(0 for _ in lead), 0, 0))


def _inverse_of_overlaps_kernel(overlaps_ref, beta_ref, y_ref, *, dot):
  overlaps = overlaps_ref[...]
  for i, found in enumerate(_rows_of_blocks(overlaps, *_diagonal_inverse(overlaps, beta_ref), dot)):
    for j, y in enumerate(found):
      _store(y_ref, i, j, y)


def _inverse_kernel(k_ref, beta_ref, *refs, gated, normalized, by_head, depth, dot):
  refs = list(refs)
  g_ref = refs.pop(0) if gated else None
  q_ref = refs.pop(0) if normalized else None
  y_ref = refs.pop(0)
  sums_ref = refs.pop(0) if gated else None
  vectors_ref = refs.pop() if by_head else None
  norm_refs = refs
  C, dtype = k_ref.shape[0], operand(k_ref.dtype)
  row, column = rows_and_columns(C)
  norm = lambda x, axis: jax.lax.rsqrt(jnp.sum(jnp.where(row == column, x, 0.0), axis=axis) + EPSILON)
  if normalized:
    of_queries = norm(_overlaps(q_ref, depth, dtype, dot), 1)
    norm_refs[0][...] = of_queries
  overlaps = _overlaps(k_ref, depth, dtype, dot)
  if normalized:
    of_rows, of_columns = norm(overlaps, 1), norm(overlaps, 0)
    norm_refs[1][...] = of_rows
    overlaps = overlaps * of_rows[:, None] * of_columns[None]
  if by_head:
    for i, vector in enumerate((beta_ref[...], of_rows, of_queries) if normalized else (beta_ref[...],)):
      vectors_ref[i, :] = vector
  overlaps = jnp.where(row > column, overlaps, 0.0)
  multiples, own, own_multiples = _diagonal_inverse(overlaps, beta_ref)
  if gated:
    rows = [pl.ds(i * SIZE, SIZE) for i in range(C // SIZE)]
    sums = _sums([g_ref[r] for r in rows])
    for r, x in zip(rows, sums):
      sums_ref[r] = x
  for i, found in enumerate(_rows_of_blocks(overlaps, multiples, own, own_multiples, dot)):
    for j, y in enumerate(found):
      _store(y_ref, i, j, y * _decay(sums, i, j) if gated else y)
    for j in range(i + 1, C // SIZE) if by_head else ():
      for part in range(y_ref.shape[0]):
        y_ref[part, pl.ds(i * SIZE, SIZE), pl.ds(j * SIZE, SIZE)] = jnp.zeros((SIZE, SIZE), y_ref.dtype)


def _diagonal_inverse(overlaps, beta_ref):
  """The multiples -X b, Y of all diagonal blocks, and -Y b of these."""
  multiples = overlaps * -beta_ref[...][None]
  own = _substitute(_diagonal(overlaps), _diagonal(multiples))
  return multiples, own, own * -jnp.broadcast_to(beta_ref[...].reshape(-1, SIZE), own.shape[1:])[None]


def _rows_of_blocks(overlaps, multiples, own, own_multiples, dot):
  """Yields the blocks of Y up to the diagonal, row by row."""
  overlaps, multiples = _blocks(overlaps), _blocks(multiples)
  blocks = range(overlaps.shape[0])
  y = {(i, i): _entry(own, 1, i) for i in blocks}
  for i in blocks:
    for j in reversed(range(i)):
      z = _block(overlaps, i, j) + sum(_product(_block(multiples, i, m), y[m, j], dot) for m in range(j, i))
      y[i, j] = z + _product(_entry(own_multiples, 1, i), z, dot)
    yield [y[i, j] for j in range(i + 1)]


def _store(y_ref, i, j, y):
  for part, x in enumerate([y] if y_ref.dtype == jnp.float32 else halves(y)):
    y_ref[part, pl.ds(i * SIZE, SIZE), pl.ds(j * SIZE, SIZE)] = x


def _overlaps(ref, depth, dtype, dot):
  """Products `[C, C]` of all rows with each other."""
  found = jnp.zeros((ref.shape[0],) * 2, jnp.float32)
  for d in range(0, ref.shape[1], depth):
    x = ref[:, pl.ds(d, depth)].astype(dtype)
    found += dot(x, x.T)
  return found


def _sums(gates):
  """Inclusive sums of a chunk's gates, from the gates of each block."""
  before, sums = 0, []
  for g in gates:
    own = decay_of(g, SIZE).sums
    sums.append(before + own)
    before += jnp.min(own)
  return sums


def _decay(sums, i, j):
  """Decays from the tokens of block j to the tokens of block i, 0 where they would grow."""
  row, column = rows_and_columns(SIZE)
  decay = jnp.exp2((sums[i][:, None] - sums[j][None]).astype(jnp.float32) * UNIT)
  return jnp.where((i > j) | (row >= column), decay, 0.0)


def _product(a, b, dot):
  """a @ b in float32, as exact as three passes of TF32. bfloat16 parts take fewer instructions to cut and to move."""
  a, b = _parts(a), _parts(b)
  return sum(dot(a[i], b[n - i]) for n in reversed(range(PARTS)) for i in range(n + 1))


def _parts(x):
  found = []
  for _ in range(PARTS - 1):
    high = leading_bits(x)
    found.append(high.astype(jnp.bfloat16))
    x = x - high
  return *found, x.astype(jnp.bfloat16)


# An entry of an axis is taken by a sum in which all other terms are -0. The compiler drops these terms, so that the sum
# costs nothing along an axis in registers.


def _index(x, axis):
  return jax.lax.broadcasted_iota(jnp.int32, x.shape, axis)


def _entry(x, axis, i):
  return jnp.sum(jnp.where(_index(x, axis) == i, x, -0.0), axis=axis)


def _blocks(x):
  return x.reshape(x.shape[0] // SIZE, SIZE, x.shape[1] // SIZE, SIZE)


def _block(x, i, j):
  return _entry(_entry(x, 0, i), 1, j)


def _diagonal(x):
  """The diagonal blocks `[16, blocks, 16]`. A single block comes twice, because two fill the lanes of a warp."""
  count = x.shape[0] // SIZE
  x = jnp.broadcast_to(_blocks(x), (count, SIZE, max(count, 2), SIZE))
  return jnp.sum(jnp.where(_index(x, 0) == (_index(x, 2) & (count - 1)), x, -0.0), axis=0)


def _substitute(overlaps, multiples):
  """Y of diagonal blocks `[16, blocks, 16]`. Multiples of each final row, which come negated, join the rows below.

  Triton keeps the layout of the products' results until an axis is added. The axes added here make it spread columns
  over lanes and rows over registers, and give each lane the multiples of its block. The last line goes back.
  """
  row = _index(overlaps, 0)
  y = jnp.sum(overlaps[..., None], axis=3)
  multiples = multiples.reshape(*overlaps.shape[:2], SIZE // STEP, STEP)
  for j in range(SIZE - 1):
    if j % STEP == 0:
      some = _entry(multiples, 2, j // STEP).transpose(0, 2, 1)[..., None]
      some = jnp.broadcast_to(some, (*some.shape[:3], SIZE))
    final = jnp.broadcast_to(_entry(y, 0, j)[None], y.shape)
    y = jnp.where(row > j, _entry(some, 1, j % STEP) * final + y, y)
  return jnp.where(row > _index(overlaps, 2), y, overlaps)
