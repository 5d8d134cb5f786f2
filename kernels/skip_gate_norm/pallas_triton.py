"""Skip connection, gate and RMSNorm as Pallas kernels for the Triton backend, with their `custom_vjp`.

Arrays are [R, G, C]. A program of the forward kernel holds a tile of a few rows of one group. A program of the backward
kernel walks over several tiles and sums dskip and dscale of its rows in float32, and XLA adds up the sums of all
programs. With p = x + skip v, a the activated gate, h = p a, r the inverse root of h and n = r h:
  dn = dy scale,   dh = r (dn - n mean(dn n)),   dx = dh a,   dgate = dh p a',   dv = skip dx
  dscale = sum of dy n,   dskip = sum of dx v
dv is left to XLA, which multiplies dx where it is read. Rows are handled in parts as in `kernels.rms_norm`.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels import derivatives, triton_blocks
from kernels.rms_norm.pallas_triton import STEPS, activated, inverse_root, largest_power, tile_of, wide
from kernels.rms_norm.pallas_triton import supports as supports_width
from kernels.skip_gate_norm import reference


def supports(x, *others, chunk_size=None) -> str | None:
  """Why these inputs cannot run here, or None."""
  return supports_width(x)


def skip_gate_norm(x, v, gate, skip, scale, eps):
  """See `kernels.skip_gate_norm`."""
  rows = lambda a: a.reshape(-1, *a.shape[-2:])
  return _skip_gate_norm(rows(x), rows(v), rows(gate), skip, scale, eps).reshape(x.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _skip_gate_norm(x, v, gate, skip, scale, eps):
  return _forward(x, v, gate, skip, scale, eps)[0]


def _forward(x, v, gate, skip, scale, eps):
  arrays = x, v, gate, skip, scale
  launch = functools.partial(_launch_forward, eps=eps)
  return derivatives.of_definition(launch, functools.partial(reference.skip_gate_norm, eps=eps))(*arrays), arrays


def _backward(eps, residuals, dy):

  def definition(*arrays):
    *arrays, dy = arrays
    dx, _, *others = jax.vjp(functools.partial(reference.skip_gate_norm, eps=eps), *arrays)[1](dy)
    return dx, *others

  dx, dgate, dskip, dscale = derivatives.of_definition(functools.partial(_launch_backward, eps=eps), definition)(
      *residuals, dy)
  skip = residuals[3]
  return dx, (skip[None] * dx.astype(jnp.float32)).astype(dx.dtype), dgate, dskip, dscale


_skip_gate_norm.defvjp(_forward, _backward)


# Kernel bodies.


def _forward_kernel(x_ref, v_ref, gate_ref, skip_ref, scale_ref, y_ref, *, eps, part, dot):
  parts = [pl.ds(i, part) for i in range(0, x_ref.shape[1], part)]
  row = [(wide(x_ref, at) + skip_ref[at][None] * wide(v_ref, at)) * activated(wide(gate_ref, at), "swish")[0]
         for at in parts]
  r = inverse_root(row, eps)
  for h, at in zip(row, parts):
    y_ref[:, at] = (h * r * scale_ref[at][None]).astype(y_ref.dtype)


def _backward_kernel(x_ref, v_ref, gate_ref, skip_ref, scale_ref, dy_ref, dx_ref, dgate_ref, dskip_ref, dscale_ref, *,
                     eps, tile, dot):
  rows, part = tile
  parts, count = [pl.ds(i, part) for i in range(0, x_ref.shape[1], part)], x_ref.shape[0] // rows

  def load(i):
    at_rows = pl.ds(i * rows, rows)
    return [[ref[at_rows, at] for ref in (x_ref, v_ref, gate_ref, dy_ref)] for at in parts]

  def step(i, carry):
    arrays, sums = carry
    # The next tile is on its way while this one is worked on, because few programs fit on a multiprocessor.
    following = load(jnp.minimum(i + 1, count - 1))
    found, sums = _gradients(arrays, sums, [skip_ref[at][None] for at in parts], [scale_ref[at][None] for at in parts],
                             eps)
    for (dx, dgate), at in zip(found, parts):
      dx_ref[pl.ds(i * rows, rows), at] = dx.astype(dx_ref.dtype)
      dgate_ref[pl.ds(i * rows, rows), at] = dgate.astype(dgate_ref.dtype)
    return following, sums

  zeros = jnp.zeros((rows, part), jnp.float32)
  _, sums = jax.lax.fori_loop(0, count, step, (load(0), [(zeros, zeros) for _ in parts]))
  for (dskip, dscale), at in zip(sums, parts):
    dskip_ref[at], dscale_ref[at] = jnp.sum(dskip, axis=0), jnp.sum(dscale, axis=0)


def _gradients(arrays, sums, skip, scale, eps):
  """dx and dgate of each part of a tile, and its `sums` of dskip and dscale with those of the tile."""
  row, normed, dnormed, found, after = [], [], [], [], []
  for (x, v, gate, dy), d in zip(arrays, skip):
    x, v, gate, dy = (array.astype(jnp.float32) for array in (x, v, gate, dy))
    row.append((x + d * v, v, *activated(gate, "swish"), dy))
  r = inverse_root([p * a for p, _, a, _, _ in row], eps)
  for (p, _, a, _, dy), s in zip(row, scale):
    normed.append(p * a * r)
    dnormed.append(dy * s)
  C = sum(n.shape[1] for n in normed)
  mean = sum(jnp.sum(dn * n, axis=1, keepdims=True) for dn, n in zip(dnormed, normed)) * (1 / C)
  for (p, v, a, slope, dy), n, dn, (dskip, dscale) in zip(row, normed, dnormed, sums):
    dh = r * (dn - n * mean)
    dx = dh * a
    found.append((dx, dh * p * slope))
    after.append((dskip + dx * v, dscale + dy * n))
  return found, after


# Launches: one program per tile, or several tiles, and group.


def _launch_forward(x, v, gate, skip, scale, *, eps):
  R, G, C = x.shape
  rows, part, num_warps = tile_of(R, C)
  block, vector = pl.BlockSpec((rows, None, C), lambda g, i: (i, g, 0)), pl.BlockSpec((None, C), lambda g, i: (g, 0))
  return triton_blocks.launch(
      functools.partial(_forward_kernel, eps=eps, part=part), name="skip_gate_norm_forward", grid=(G, R // rows),
      num_warps=num_warps, num_stages=1, in_specs=[block] * 3 + [vector] * 2, out_specs=block,
      out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype))(x, v, gate, skip, scale)


def _launch_backward(x, v, gate, skip, scale, dy, *, eps):
  R, G, C = x.shape
  rows, part, num_warps = tile_of(R, C)
  programs = R // rows // largest_power(R // rows, STEPS)
  block = pl.BlockSpec((R // programs, None, C), lambda g, i: (i, g, 0))
  vector = pl.BlockSpec((None, C), lambda g, i: (g, 0))
  array, sums = jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct((programs, G, C), jnp.float32)
  dx, dgate, dskip, dscale = triton_blocks.launch(
      functools.partial(_backward_kernel, eps=eps, tile=(rows, part)), name="skip_gate_norm_backward",
      grid=(G, programs), num_warps=num_warps, num_stages=1,
      in_specs=[block] * 3 + [vector] * 2 + [block],
      out_specs=[block] * 2 + [pl.BlockSpec((None, None, C), lambda g, i: (i, g, 0))] * 2,
      out_shape=[array, array, sums, sums])(x, v, gate, skip, scale, dy)
  return dx, dgate, jnp.sum(dskip, axis=0), jnp.sum(dscale, axis=0)
