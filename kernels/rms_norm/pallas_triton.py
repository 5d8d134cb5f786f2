"""RMSNorm with a scale and a gate as Pallas kernels for the Triton backend, with their `custom_vjp`.

`x` is [R, C]. A program of the forward kernel holds a tile of a few whole rows. A program of the backward kernel walks
over several tiles and sums dscale of its rows in float32, and XLA adds up the sums of all programs. With r the inverse
root, n = x r the normalised row, and a the activated gate:
  dn = dy scale a,   dx = r (dn - n mean(dn n)),   dscale = sum of dy a n,   dgate = dy n scale a'
The statistics are formed again from x, which has to be read anyway. C may be any multiple of 16 that consists of at
most `MOST_PARTS` parts of the largest power of two in it, because Triton's arrays have powers of two as sizes.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels import derivatives, triton_blocks
from kernels.rms_norm import reference
from kernels.triton_blocks import given

MOST_CHANNELS, MOST_PARTS, LEAST_PART = 8192, 16, 16
TILE = 2048  # entries, or one row if that is longer
PER_WARP = 512  # entries of a tile per warp: 16 per thread
STEPS = 16  # most tiles per program of the backward kernel


def supports(x, *others, chunk_size=None) -> str | None:
  """Why these inputs cannot run here, or None."""
  C = x.shape[-1]
  part = C & -C  # the largest power of two that divides it
  if C > MOST_CHANNELS or part < LEAST_PART or C // part > MOST_PARTS:
    return (f"{C} channels are not up to {MOST_PARTS} times a power of two from {LEAST_PART} on, "
            f"{MOST_CHANNELS} at most")
  return None


def rms_norm(x, scale, gate, eps, activation):
  """See `kernels.rms_norm`."""
  rows = lambda a: None if a is None else a.reshape(-1, a.shape[-1])
  return _rms_norm(rows(x), scale, rows(gate), eps, activation).reshape(x.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _rms_norm(x, scale, gate, eps, activation):
  return _forward(x, scale, gate, eps, activation)[0]


def _forward(x, scale, gate, eps, activation):
  definition = functools.partial(reference.rms_norm, eps=eps, activation=activation)
  launch = functools.partial(_launch_forward, eps=eps, activation=activation)
  return derivatives.of_definition(launch, definition)(x, scale, gate), (x, scale, gate)


def _backward(eps, activation, residuals, dy):

  def definition(x, scale, gate, dy):
    call = lambda *arrays: reference.rms_norm(*arrays, eps, activation)
    return jax.vjp(call, x, scale, gate)[1](dy)

  launch = functools.partial(_launch_backward, eps=eps, activation=activation)
  return derivatives.of_definition(launch, definition)(*residuals, dy)


_rms_norm.defvjp(_forward, _backward)


# Kernel bodies. A row of C channels is handled in parts, whose sizes are powers of two.


def _forward_kernel(x_ref, *refs, scaled, gated, eps, activation, part, dot):
  *inputs, y_ref = refs
  scale_ref, gate_ref = _optional(inputs, scaled, gated)
  parts = [pl.ds(i, part) for i in range(0, x_ref.shape[1], part)]
  row = [wide(x_ref, at) for at in parts]
  r = inverse_root(row, eps)
  for x, at in zip(row, parts):
    y = x * r
    if scaled:
      y *= scale_ref[at][None]
    if gated:
      y *= activated(wide(gate_ref, at), activation)[0]
    y_ref[:, at] = y.astype(y_ref.dtype)


def _backward_kernel(x_ref, dy_ref, *refs, scaled, gated, eps, activation, tile, dot):
  rows, part = tile
  inputs, (dx_ref, *outputs) = refs[:scaled + gated], refs[scaled + gated:]
  scale_ref, gate_ref = _optional(inputs, scaled, gated)
  dscale_ref, dgate_ref = _optional(outputs, scaled, gated)
  parts = [pl.ds(i, part) for i in range(0, x_ref.shape[1], part)]

  def step(i, dscale):
    at_rows = pl.ds(i * rows, rows)
    row = [wide(x_ref, at, at_rows) for at in parts]
    r = inverse_root(row, eps)
    normed, dnormed, sums = [x * r for x in row], [], []
    for k, at in enumerate(parts):
      dy, scale = wide(dy_ref, at, at_rows), scale_ref[at][None] if scaled else 1.0
      through = dy
      if gated:
        a, slope = activated(wide(gate_ref, at, at_rows), activation)
        through = dy * a
        dgate_ref[at_rows, at] = (dy * normed[k] * scale * slope).astype(dgate_ref.dtype)
      dnormed.append(through * scale)
      sums.append(dscale[k] + through * normed[k] if scaled else dscale[k])
    mean = sum(jnp.sum(dn * n, axis=1, keepdims=True) for dn, n in zip(dnormed, normed)) * (1 / x_ref.shape[1])
    for n, dn, at in zip(normed, dnormed, parts):
      dx_ref[at_rows, at] = (r * (dn - n * mean)).astype(dx_ref.dtype)
    return sums

  start = [jnp.zeros((rows, part) if scaled else (), jnp.float32) for _ in parts]
  dscale = jax.lax.fori_loop(0, x_ref.shape[0] // rows, step, start)
  if scaled:
    for total, at in zip(dscale, parts):
      dscale_ref[at] = jnp.sum(total, axis=0)


def _optional(refs, scaled, gated):
  """The refs of the scale and of the gate, each None where there is none."""
  refs = list(refs)
  return refs.pop(0) if scaled else None, refs.pop(0) if gated else None


def wide(ref, at, rows=slice(None)):
  return ref[rows, at].astype(jnp.float32)


def inverse_root(x, eps):
  """1 / sqrt(mean(x²) + eps) of each row [rows, 1], from its parts."""
  C = sum(part.shape[1] for part in x)
  return jax.lax.rsqrt(sum(jnp.sum(part * part, axis=1, keepdims=True) for part in x) * (1 / C) + eps)


def activated(gate, activation):
  """The activated gate and its derivative."""
  if activation == "identity":
    return gate, 1.0
  sigmoid = jax.nn.sigmoid(gate)
  swish = gate * sigmoid
  return swish, sigmoid + swish * (1 - sigmoid)


# Launches.


def _launch_forward(x, scale, gate, *, eps, activation):
  (R, C), scaled, gated = x.shape, scale is not None, gate is not None
  rows, part, num_warps = tile_of(R, C)
  block, vector = pl.BlockSpec((rows, C), lambda i: (i, 0)), pl.BlockSpec((C,), lambda i: (0,))
  return triton_blocks.launch(
      functools.partial(_forward_kernel, scaled=scaled, gated=gated, eps=eps, activation=activation, part=part),
      name="rms_norm_forward", grid=(R // rows,), num_warps=num_warps, num_stages=1,
      in_specs=[block, *given(scaled, vector), *given(gated, block)], out_specs=block,
      out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype))(x, *given(scaled, scale), *given(gated, gate))


def _launch_backward(x, scale, gate, dy, *, eps, activation):
  (R, C), scaled, gated = x.shape, scale is not None, gate is not None
  rows, part, num_warps = tile_of(R, C)
  programs = R // rows // largest_power(R // rows, STEPS)
  block, vector = pl.BlockSpec((R // programs, C), lambda i: (i, 0)), pl.BlockSpec((C,), lambda i: (0,))
  array = jax.ShapeDtypeStruct(x.shape, x.dtype)
  dx, *found = triton_blocks.launch(
      functools.partial(_backward_kernel, scaled=scaled, gated=gated, eps=eps, activation=activation,
                        tile=(rows, part)),
      name="rms_norm_backward", grid=(programs,), num_warps=num_warps, num_stages=1,
      in_specs=[block, block, *given(scaled, vector), *given(gated, block)],
      out_specs=[block, *given(scaled, pl.BlockSpec((None, C), lambda i: (i, 0))), *given(gated, block)],
      out_shape=[array, *given(scaled, jax.ShapeDtypeStruct((programs, C), jnp.float32)), *given(gated, array)])(
          x, dy, *given(scaled, scale), *given(gated, gate))
  dscale, dgate = _optional(found, scaled, gated)
  return dx, jnp.sum(dscale, axis=0) if scaled else None, dgate


def tile_of(R, C):
  """Rows of a tile, channels of a part of a row, and warps."""
  rows = largest_power(R, max(1, TILE // pl.next_power_of_2(C)))
  return rows, C & -C, max(1, pl.next_power_of_2(rows * C) // PER_WARP)


def largest_power(n, most):
  """The largest power of two that divides n and is at most the power `most`."""
  return min(n & -n, most)
