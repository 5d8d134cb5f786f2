"""Short convolution as Pallas kernels for the Triton backend, with their `custom_vjp`.

A thread has a few channels. A program walks through `SPAN` tokens of one sequence with the last taps - 1 rows of x in
registers, so that every element is read once and goes through one exponential. With z the result before SiLU, f SiLU
and w the kernel, the backward pass walks from the last token to the first:
  dz_t = dy_t f'(z_t),   dx_t = sum over i of w_i dz_{t+taps-1-i},   dw_i = sum over t of dz_t x_{t-taps+1+i}
z is formed again from x. The rows behind a program's span, whose dz it needs, are its neighbour's as well. Each program
writes its sums dw and dbias in float32, and XLA adds them up.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels import derivatives, triton_blocks
from kernels.short_convolution import reference
from kernels.triton_blocks import given

SPAN = 64  # tokens per program
ROWS = 8  # whose loads are under way together
CHANNELS = 128  # most per program: 4 per thread of one warp
LEAST_CHANNELS = 16


def supports(x, kernel, *others, chunk_size=None) -> str | None:
  """Why these inputs cannot run here, or None."""
  if x.shape[-1] % LEAST_CHANNELS:
    return f"{x.shape[-1]} channels are not a multiple of {LEAST_CHANNELS}"
  if kernel.shape[0] > ROWS:
    return f"{kernel.shape[0]} taps are more than {ROWS}"
  return None


def short_convolution(x, kernel, bias, initial_inputs, runs, silu):
  """See `kernels.short_convolution`. `runs` is that of the reference."""
  (_, T, C), past = x.shape, kernel.shape[0] - 1
  bias = jnp.zeros((C,), jnp.float32) if bias is None else bias
  filled = -T % min(SPAN, pl.cdiv(T, ROWS) * ROWS)
  if filled:
    x = jnp.pad(x, ((0, 0), (0, filled), (0, 0)))
  if runs is not None:
    # The tokens that fill up the last span have a segment of their own, which sends nothing back.
    runs = jnp.pad(jnp.pad(runs, ((0, 0), (past, 0))), ((0, 0), (0, filled + past)), constant_values=-1)
  return _short_convolution(x, kernel, bias, initial_inputs, runs, silu)[:, :T]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _short_convolution(x, kernel, bias, initial_inputs, runs, silu):
  return _forward(x, kernel, bias, initial_inputs, runs, silu)[0]


def _forward(x, kernel, bias, initial_inputs, runs, silu):
  arrays = x, kernel, bias, initial_inputs, runs
  launch = functools.partial(_launch_forward, silu=silu)
  return derivatives.of_definition(launch, functools.partial(_definition, silu=silu))(*arrays), arrays


def _backward(silu, residuals, dy):
  x, kernel, bias, initial_inputs, runs = residuals

  def definition(x, kernel, bias, initial_inputs, runs, dy):
    return jax.vjp(lambda x, kernel, bias: _definition(x, kernel, bias, initial_inputs, runs, silu=silu),
                   x, kernel, bias)[1](dy)

  launch = functools.partial(_launch_backward, silu=silu)
  dx, dkernel, dbias = derivatives.of_definition(launch, definition)(*residuals, dy)
  return dx, dkernel, dbias, _initial_gradient(x, kernel, bias, initial_inputs, runs, dy, silu), None


_short_convolution.defvjp(_forward, _backward)


def _definition(x, kernel, bias, initial_inputs, runs, *, silu):
  past = kernel.shape[0] - 1
  runs = None if runs is None else runs[:, past:-past]
  return reference.short_convolution(x, kernel, bias, initial_inputs, runs, silu)


def _initial_gradient(x, kernel, bias, initial_inputs, runs, dy, silu):
  """The gradient of the initial inputs, which only the first taps - 1 tokens read."""
  if initial_inputs is None:
    return None
  past = kernel.shape[0] - 1
  first = None if runs is None else runs[:, past:2 * past]
  call = lambda inputs: reference.short_convolution(x[:, :past], kernel, bias, inputs, first, silu)
  return jax.vjp(call, initial_inputs)[1](dy[:, :past])[0]


# Kernel bodies. `x_ref` holds all T tokens of a sequence for the channels of the program, and `Rows` reads it.


class Rows:
  """The inputs x_t as float32 rows, also those before the first token, and which tokens belong together."""

  def __init__(self, x_ref, initial_ref, runs_ref, past):
    self.x_ref, self.initial_ref, self.runs_ref, self.past = x_ref, initial_ref, runs_ref, past

  def inside(self, t):
    return self.x_ref[t, :].astype(jnp.float32)

  def before(self, t):
    """x_t of a token that may lie before the first one."""
    x = self.inside(jnp.maximum(t, 0))
    initial = 0.0
    if self.initial_ref is not None:
      initial = self.initial_ref[jnp.minimum(t + self.past, self.past - 1), :].astype(jnp.float32)
    return jnp.where(t >= 0, x, initial)

  def visible(self, row, at, now):
    """The row of the token `at`, or zeros if it belongs to another segment than the token `now`."""
    if self.runs_ref is None:
      return row
    return jnp.where(self.runs_ref[at + self.past] == self.runs_ref[now + self.past], row, 0.0)

  def windows(self, rows, t):
    """The rows of the tokens t - past to t that t sees, of which `rows` begins with the first."""
    return [self.visible(rows[i], t - self.past + i, t) for i in range(self.past)] + [rows[self.past]]


def _forward_kernel(x_ref, kernel_ref, bias_ref, *refs, initial, segments, silu, dot):
  rows, (y_ref,) = _rows(x_ref, kernel_ref, refs, initial, segments)
  past, first = rows.past, pl.program_id(2) * y_ref.shape[0]
  taps, bias = [kernel_ref[i, :] for i in range(past + 1)], bias_ref[...]

  def step(i, carried):
    loaded = [*carried, *(rows.inside(first + i * ROWS + j) for j in range(ROWS))]
    for j in range(ROWS):
      z = _weighted(taps, rows.windows(loaded[j:], first + i * ROWS + j), bias)
      y_ref[i * ROWS + j, :] = (z * jax.nn.sigmoid(z) if silu else z).astype(y_ref.dtype)
    return loaded[ROWS:]

  jax.lax.fori_loop(0, y_ref.shape[0] // ROWS, step, [rows.before(first - past + i) for i in range(past)])


def _backward_kernel(x_ref, kernel_ref, bias_ref, dy_ref, *refs, initial, segments, silu, dot):
  rows, (dx_ref, sums_ref) = _rows(x_ref, kernel_ref, refs, initial, segments)
  (T, _), past, span = x_ref.shape, rows.past, dx_ref.shape[0]
  first = pl.program_id(2) * span
  taps, bias = [kernel_ref[i, :] for i in range(past + 1)], bias_ref[...]

  def dz_of(windows, dy):
    if not silu:
      return dy
    z = _weighted(taps, windows, bias)
    sigmoid = jax.nn.sigmoid(z)
    return dy * sigmoid * (1 + z * (1 - sigmoid))

  def after(s):
    """dz of a token behind the span, 0 behind the last token."""
    t, end = first + span + s, jnp.minimum(first + span, T - ROWS)
    found = [rows.inside(jnp.maximum(end + s - past + i, 0)) for i in range(past + 1)]
    dz = dz_of(rows.windows(found, end + s), dy_ref[end + s, :].astype(jnp.float32))
    return jnp.where(t < T, dz, 0.0)

  def step(i, carry):
    above, behind, dtaps, dbias = carry
    t0 = first + span - (i + 1) * ROWS
    loaded = [*(rows.before(t0 - past + j) for j in range(ROWS)), *above]
    dys = [dy_ref[t0 + j, :].astype(jnp.float32) for j in range(ROWS)]
    for j in reversed(range(ROWS)):
      t, windows = t0 + j, rows.windows(loaded[j:], t0 + j)
      behind = [dz_of(windows, dys[j]), *behind[:past]]
      dtaps = [total + behind[0] * x for total, x in zip(dtaps, windows)]
      dbias = dbias + behind[0]
      seen = [behind[0]] + [rows.visible(behind[s], t + s, t) for s in range(1, past + 1)]
      dx_ref[span - (i + 1) * ROWS + j, :] = _weighted(taps[::-1], seen, 0.0).astype(dx_ref.dtype)
    return loaded[:past], behind[:past], dtaps, dbias

  zeros = jnp.zeros(bias.shape, jnp.float32)
  start = ([rows.inside(first + span - past + i) for i in range(past)], [after(s) for s in range(past)],
           [zeros] * (past + 1), zeros)
  _, _, dtaps, dbias = jax.lax.fori_loop(0, span // ROWS, step, start)
  for i, total in enumerate([*dtaps, dbias]):
    sums_ref[i, :] = total


def _rows(x_ref, kernel_ref, refs, initial, segments):
  """The reader of the inputs, and the refs of the results."""
  refs = list(refs)
  initial_ref = refs.pop(0) if initial else None
  return Rows(x_ref, initial_ref, refs.pop(0) if segments else None, kernel_ref.shape[0] - 1), refs


def _weighted(taps, rows, bias):
  return sum((tap * row for tap, row in zip(taps, rows)), bias)


# Launches.


def _launch_forward(x, kernel, bias, initial_inputs, runs, *, silu):
  span, grid, blocks = _blocks(x, kernel, initial_inputs, runs)
  return triton_blocks.launch(
      functools.partial(_forward_kernel, initial=initial_inputs is not None, segments=runs is not None, silu=silu),
      name="short_convolution_forward", grid=grid, num_warps=1, num_stages=1,
      in_specs=[blocks["x"], *blocks["weights"], *blocks["optional"]], out_specs=span,
      out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype))(x, kernel, bias, *_given(initial_inputs, runs))


def _launch_backward(x, kernel, bias, initial_inputs, runs, dy, *, silu):
  (B, _, C), taps = x.shape, kernel.shape[0]
  span, grid, blocks = _blocks(x, kernel, initial_inputs, runs)
  sums = pl.BlockSpec((None, None, taps + 1, C // grid[0]), lambda c, b, t: (b, t, 0, c))
  dx, sums = triton_blocks.launch(
      functools.partial(_backward_kernel, initial=initial_inputs is not None, segments=runs is not None, silu=silu),
      name="short_convolution_backward", grid=grid, num_warps=1, num_stages=1,
      in_specs=[blocks["x"], *blocks["weights"], blocks["x"], *blocks["optional"]], out_specs=[span, sums],
      out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype),
                 jax.ShapeDtypeStruct((B, grid[2], taps + 1, C), jnp.float32)])(
          x, kernel, bias, dy, *_given(initial_inputs, runs))
  sums = jnp.sum(sums, axis=(0, 1))
  return dx, sums[:-1], sums[-1]


def _blocks(x, kernel, initial_inputs, runs):
  """The block of a program's results, the grid of channels, sequences and spans, and the blocks of the inputs."""
  (B, T, C), taps = x.shape, kernel.shape[0]
  channels, span = min(C & -C, CHANNELS), min(T, SPAN)
  whole = lambda size: pl.BlockSpec((None, size, channels), lambda c, b, t: (b, 0, c))
  optional = [*given(initial_inputs is not None, whole(taps - 1)),
              *given(runs is not None, pl.BlockSpec((None, T + 2 * (taps - 1)), lambda c, b, t: (b, 0)))]
  weights = [pl.BlockSpec((taps, channels), lambda c, b, t: (0, c)), pl.BlockSpec((channels,), lambda c, b, t: (c,))]
  return (pl.BlockSpec((None, span, channels), lambda c, b, t: (b, t, c)), (C // channels, B, T // span),
          {"x": whole(T), "weights": weights, "optional": optional})


def _given(*arrays):
  return [a for a in arrays if a is not None]
