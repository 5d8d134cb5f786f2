"""Selective scan as Pallas kernels for the Triton backend, with their `custom_vjp`.

A program is one warp: it walks through time with the states H `[16 channels, N]` of its channels in registers, in
blocks of a few tokens that are unrolled. The backward pass forms W_t of half a block again, keeps them in registers,
and walks back. `README.md` of this folder has the symbols, the gradients, and each kernel with what it reads and
writes.

Sums over channels are products with a constant matrix, whose operands are rounded to bfloat16, or for float32 inputs
cut into two such numbers. Each program writes its part of db and dc, and XLA adds up the D / 16 parts. Where few rows
and channels leave the GPU idle, `kernels.pieces` cuts the sequence, which is exact.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from kernels import pieces, triton_blocks
from kernels.triton_blocks import LOG2E, given, operand, tile_width

CHANNELS = 16  # per program
MOST_STATES = 32  # per channel: more do not fit into registers
ROWS = 16  # of the product that sums over channels: dc of up to 8 tokens, then their db
# Programs of one warp that keep a multiprocessor as busy as one program of several warps, which `pieces` counts.
WARPS = 32
ENOUGH = 32  # such programs suffice without cutting a sequence: 8 warps, as many as have registers, on 128 processors
# Blocks that count as one chunk when a sequence is cut: pieces shorter than about 256 tokens do not repay their launch.
PIECE_BLOCKS = 4


def supports(x, step_size, a, *others, chunk_size=None) -> str | None:
  """Why these inputs cannot run here, or None."""
  return f"a state of {a.shape[-1]} is more than {MOST_STATES}" if a.shape[-1] > MOST_STATES else None


def block_size(N: int, dtype) -> int:
  """How many tokens are unrolled: the most whose W_t cause no spills on the GPUs of the compile check."""
  narrow = tile_width(N) <= 16
  if dtype == jnp.float32:
    return 6 if narrow else 2
  return 8 if narrow else 4


def selective_scan(x, step_size, a, b, c, resets, initial_state):
  """See `kernels.selective_scan`. The state is given; `resets` [B, T], if any, are added to the logs of the decays."""
  (B, T, D), block = x.shape, block_size(a.shape[1], x.dtype)
  count = pieces.count(-(-D // CHANNELS) * B // WARPS, T, PIECE_BLOCKS * block, enough=ENOUGH)
  return configured(x, step_size, a, b, c, resets, initial_state, block=block, count=count)


def configured(x, step_size, a, b, c, resets, initial_state, *, block, count):
  """The op in blocks of `block` tokens, at most 8, with the sequence cut into `count` pieces."""
  (B, T, D), N = x.shape, a.shape[1]
  dD, dN = -D % CHANNELS, tile_width(N) - N
  fold = lambda x, extra: pieces.fold(jnp.pad(x, ((0, 0), (0, 0), (0, extra))), count, block)
  output, final_state = _selective_scan(
      fold(x, dD), fold(step_size, dD), jnp.pad(a, ((0, dD), (0, dN))), fold(b, dN), fold(c, dN),
      None if resets is None else pieces.fold(resets, count, block),
      jnp.pad(initial_state, ((0, 0), (0, dD), (0, dN))), block)
  return pieces.unfold(output, B)[:, :T, :D], final_state[:, :D, :N]


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def _selective_scan(x, step_size, a, b, c, resets, initial_state, block):
  output, _, final_state = _scan(x, step_size, a, b, c, resets, initial_state, block, save=False)
  return output, final_state


def _forward(x, step_size, a, b, c, resets, initial_state, block):
  output, states, final_state = _scan(x, step_size, a, b, c, resets, initial_state, block, save=True)
  return (output, final_state), (x, step_size, a, b, c, resets, triton_blocks.residuals(states))


def _backward(block, residuals, cotangents):
  x, step_size, a, b, c, resets, states = residuals
  dy, dfinal_state = cotangents
  (P, T, D), N = x.shape, a.shape[1]
  dstates = _entry_states(dy, step_size, a, c, resets, dfinal_state, block, reverse=True)
  grid, tokens, shared, rates, state, reset = _specs(P, T, D, N)
  blocks = pl.BlockSpec((None, T // block, CHANNELS, N), lambda d, p: (p, 0, d, 0))
  sums = pl.BlockSpec((None, None, T // block, ROWS, N), lambda d, p: (d, p, 0, 0, 0))
  dx, ds, dbc, da, dstates = _launch(
      functools.partial(_backward_kernel, resets=resets is not None, block=block), name="selective_scan_backward",
      grid=grid, loop=True,
      in_specs=[tokens, tokens, rates, shared, shared, tokens, blocks, state, *given(resets is not None, reset)],
      out_specs=[tokens, tokens, sums, state, state],
      out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct(x.shape, jnp.float32),
                 jax.ShapeDtypeStruct((D // CHANNELS, P, T // block, ROWS, N), operand(x.dtype)),
                 jax.ShapeDtypeStruct((P, D, N), jnp.float32), jax.ShapeDtypeStruct((P, D, N), jnp.float32)])(
          x, step_size, LOG2E * a, *_wide(b, c), dy, states, dstates, *_scaled(resets))
  dbc = jnp.sum(dbc, axis=0, dtype=jnp.float32)
  dc, db = (dbc[:, :, i:i + block].reshape(P, T, N).astype(x.dtype) for i in (0, ROWS // 2))
  dinitial_state = pieces.exit_state(dstates, dfinal_state.shape[0], reverse=True)
  return dx, ds, jnp.sum(da, axis=0), db, dc, None, dinitial_state


_selective_scan.defvjp(_forward, _backward)


# Kernel bodies. A ref holds all T tokens of one piece for the program's channels; `a` and the resets are in base 2.


def _piece_kernel(*refs, resets, reverse, block, start, dot):
  """The final state of the recurrence from an empty state. If `reverse`, it is the recurrence of the cotangents, and dy
  and c take the places of x and b."""
  x_ref, s_ref, a_ref, b_ref, *r_ref, final_ref = refs
  a, (fma, exp2), T = a_ref[...], _arithmetic(dot), x_ref.shape[0]

  def step(i, state):
    for j in range(block):
      t = T - 1 - (i * block + j) if reverse else i * block + j
      s, x, b = s_ref[t, :], x_ref[t, :].astype(jnp.float32), b_ref[t, :]
      decay = exp2(_exponent(s, a, r_ref, t, fma))
      if reverse:
        state = decay * fma(x[:, None], b[None], state)
      else:
        state = fma(decay, state, (s * x)[:, None] * b[None])
    return state

  final_ref[...] = jax.lax.fori_loop(start, T // block, step, jnp.zeros(a.shape, jnp.float32))


def _forward_kernel(*refs, resets, save, block, start, dot):
  x_ref, s_ref, a_ref, b_ref, c_ref, initial_ref, *refs = refs
  r_ref = [refs.pop(0)] if resets else []
  y_ref, *states_ref, final_ref = refs
  a, (fma, exp2) = a_ref[...], _arithmetic(dot)

  def step(i, state):
    if save:
      states_ref[0][i] = state.astype(states_ref[0].dtype)
    tokens, outputs = [i * block + j for j in range(block)], []
    for t in tokens:
      s = s_ref[t, :]
      u = s * x_ref[t, :].astype(jnp.float32)
      decay = exp2(_exponent(s, a, r_ref, t, fma))
      state = fma(decay, state, u[:, None] * b_ref[t, :][None])
      outputs.append(jnp.sum(state * c_ref[t, :][None], axis=1).astype(y_ref.dtype))
    # The compiler moves no load before a store. With the stores last, the loads of all tokens are under way together.
    for t, y in zip(tokens, outputs):
      y_ref[t, :] = y
    return state

  final_ref[...] = jax.lax.fori_loop(start, x_ref.shape[0] // block, step, initial_ref[...])


def _backward_kernel(*refs, resets, block, start, dot):
  x_ref, s_ref, a_ref, b_ref, c_ref, dy_ref, states_ref, dstate_ref, *refs = refs
  r_ref = [refs.pop(0)] if resets else []
  dx_ref, ds_ref, sums_ref, da_ref, dinitial_ref = refs
  a, (fma, exp2), blocks, half = a_ref[...], _arithmetic(dot), states_ref.shape[0], block // 2
  walk_back = functools.partial(_walk_back, a=a, fma=fma, over_channels=_sums_over_channels(x_ref.dtype, a, dot))

  def load(t):
    s, x, b = s_ref[t, :], x_ref[t, :].astype(jnp.float32), b_ref[t, :][None]
    return s, x, s * x, b, exp2(_exponent(s, a, r_ref, t, fma))

  def step(i, carry):
    dstate, da = carry
    i = blocks - 1 - i
    # A false dependency on `dstate` (plus zero) stops the compiler from computing the states, from the loads on, a
    # second time in the layout of the products' operands.
    state = fma(dstate, jnp.zeros_like(dstate), states_ref[i].astype(jnp.float32))
    middle = state
    for j in range(half):
      _, _, u, b, decay = load(i * block + j)
      middle = fma(u[:, None], b, decay * middle)
    sums = jnp.zeros((ROWS, a.shape[1]), jnp.float32)
    # The W_t of half a block stay in registers at a time, and all loads of a half come before its stores: the compiler
    # moves no load before a store.
    for tokens, entry in ((range(half, block), middle), (range(half), state)):
      at = [i * block + j for j in tokens]
      loaded = [(*load(t), c_ref[t, :][None], dy_ref[t, :].astype(jnp.float32)) for t in at]
      dstate, da, sums, found = walk_back(loaded, tokens, entry, dstate, da, sums)
      for t, (dx, ds) in zip(at, found):
        dx_ref[t, :], ds_ref[t, :] = dx.astype(dx_ref.dtype), ds
    sums_ref[i] = sums.astype(sums_ref.dtype)
    return dstate, da

  dstate, da = jax.lax.fori_loop(start, blocks, step, (dstate_ref[...], jnp.zeros(a.shape, jnp.float32)))
  dinitial_ref[...] = dstate
  da_ref[...] = da


def _walk_back(loaded, tokens, state, dstate, da, sums, *, a, fma, over_channels):
  """Through `tokens` of a block, from the state before them: dstate, da, the sums over channels, and dx and ds."""
  kept, found = [], []
  for _, _, u, b, decay, *_ in loaded:
    kept.append(decay * state)
    state = fma(u[:, None], b, kept[-1])
  for j, w, (s, x, u, b, decay, c, dy) in reversed(list(zip(tokens, kept, loaded, strict=True))):
    dstate = fma(dy[:, None], c, dstate)
    sums = over_channels(j, dy[:, None] * fma(u[:, None], b, w), u[:, None] * dstate, sums)
    du, through = jnp.sum(dstate * b, axis=1), dstate * w
    found.append((s * du, x * du + math.log(2) * jnp.sum(through * a, axis=1)))
    da = fma(s[:, None], through, da)
    dstate = decay * dstate
  return dstate, da, sums, found[::-1]


def _sums_over_channels(dtype, a, dot):
  """The function that puts the sums over channels of two `[16, N]` matrices into the rows of token j in `sums`.

  Rows of `sums` are tokens, for dc in the first half and for db in the second. For float32 inputs, the sums see 16 bits
  of each term, otherwise 8.
  """
  row = jax.lax.broadcasted_iota(jnp.int32, (ROWS, CHANNELS), 0)
  first, second = (row < ROWS // 2).astype(jnp.int32), (row >= ROWS // 2).astype(jnp.int32)
  token = jax.lax.broadcasted_iota(jnp.int32, (ROWS, a.shape[1]), 0) % (ROWS // 2)

  def over(mask, x):
    if dtype == jnp.float32:
      return triton_blocks.masked_sum(mask, x, dot, parts=2)
    return dot(mask.astype(jnp.bfloat16), x.astype(jnp.bfloat16))

  return lambda j, dc, db, sums: jnp.where(token == j, over(first, dc) + over(second, db), sums)


def _exponent(s, a, r_ref, t, fma):
  """s a + reset of token t, in base 2."""
  return fma(s[:, None], a, r_ref[0][t]) if r_ref else s[:, None] * a


def _arithmetic(dot):
  """a b + c in one instruction, which the compiler does not make of a product and a sum, and 2^x without the three
  instructions that serve results below 2^-126."""
  if dot.interpret:
    return lambda a, b, c: a * b + c, jnp.exp2

  def instruction(text, *args):
    shape = jnp.broadcast_shapes(*(jnp.shape(x) for x in args))
    return plt.elementwise_inline_asm(
        text, args=[jnp.broadcast_to(x, shape) for x in args], constraints=",".join(["=f", *["f"] * len(args)]), pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(shape, jnp.float32)])[0]

  return (lambda a, b, c: instruction("fma.rn.f32 $0, $1, $2, $3;", a, b, c),
          lambda x: instruction("ex2.approx.ftz.f32 $0, $1;", x))


# Launches: one program per block of channels and piece.


def _scan(x, step_size, a, b, c, resets, initial_state, block, *, save):
  """The output, the state before each block if `save`, and the final state."""
  (P, T, D), N = x.shape, a.shape[1]
  states = _entry_states(x, step_size, a, b, resets, initial_state, block, reverse=False)
  grid, tokens, shared, rates, state, reset = _specs(P, T, D, N)
  blocks = pl.BlockSpec((None, T // block, CHANNELS, N), lambda d, p: (p, 0, d, 0))
  y, *saved, final = _launch(
      functools.partial(_forward_kernel, resets=resets is not None, save=save, block=block),
      name="selective_scan_forward", grid=grid, loop=True,
      in_specs=[tokens, tokens, rates, shared, shared, state, *given(resets is not None, reset)],
      out_specs=[tokens, *given(save, blocks), state],
      out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype),
                 *given(save, jax.ShapeDtypeStruct((P, T // block, D, N), operand(x.dtype))),
                 jax.ShapeDtypeStruct((P, D, N), jnp.float32)])(
          x, step_size, LOG2E * a, *_wide(b, c), states, *_scaled(resets))
  return y, saved[0] if save else None, pieces.exit_state(final, initial_state.shape[0], reverse=False)


def _entry_states(x, step_size, a, b, resets, initial_state, block, *, reverse):
  """The state that enters each piece. If `reverse`, x and b are dy and c, and it is the cotangent of the exit state."""
  (P, T, D), N = x.shape, a.shape[1]
  if P == initial_state.shape[0]:
    return initial_state
  grid, tokens, shared, rates, state, reset = _specs(P, T, D, N)
  update = _launch(
      functools.partial(_piece_kernel, resets=resets is not None, reverse=reverse, block=block),
      name="selective_scan_piece", grid=grid, loop=True,
      in_specs=[tokens, tokens, rates, shared, *given(resets is not None, reset)],
      out_specs=state, out_shape=jax.ShapeDtypeStruct((P, D, N), jnp.float32))(
          x, step_size, LOG2E * a, *_wide(b), *_scaled(resets))
  exponent = jnp.sum(step_size, axis=1)[:, :, None] * a[None]
  if resets is not None:
    exponent += jnp.sum(resets, axis=1)[:, None, None]
  return pieces.entry_states(initial_state, jnp.exp(exponent), update, reverse)


def _specs(P, T, D, N):
  """The grid, and the blocks of x and similar arrays, of b and c, of a, of states, and of resets."""
  return ((D // CHANNELS, P), pl.BlockSpec((None, T, CHANNELS), lambda d, p: (p, 0, d)),
          pl.BlockSpec((None, T, N), lambda d, p: (p, 0, 0)), pl.BlockSpec((CHANNELS, N), lambda d, p: (d, 0)),
          pl.BlockSpec((None, CHANNELS, N), lambda d, p: (p, d, 0)), pl.BlockSpec((None, T), lambda d, p: (p, 0)))


def _wide(*arrays):
  """The arrays in float32, because every program would widen them again."""
  return [x.astype(jnp.float32) for x in arrays]


def _scaled(resets):
  return [] if resets is None else [LOG2E * resets]


_launch = functools.partial(triton_blocks.launch, num_warps=1, num_stages=1)
