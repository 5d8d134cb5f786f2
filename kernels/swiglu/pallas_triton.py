"""The gradients of SwiGLU's product as one Pallas kernel for the Triton backend.

With a = g sigmoid(g) and its derivative a' = sigmoid(g) + a (1 - sigmoid(g)):
  dup = dy a,   dgate = dy up a'
The forward pass stays with XLA, which fuses it as well as a kernel could. The two gradients are operands of different
products, for each of which XLA reads the three inputs anew.
"""

import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels import derivatives, triton_blocks
from kernels.swiglu import reference

LEAST, MOST = 128, 1024  # entries per program: a power of two that divides the array, at best 8 per thread


def supports(gate, *others, chunk_size=None) -> str | None:
  """Why these inputs cannot run here, or None."""
  size = math.prod(gate.shape)
  return f"{size} entries are not a multiple of {LEAST}" if size == 0 or size % LEAST else None


@jax.custom_vjp
def swiglu(gate, up):
  """See `kernels.swiglu`."""
  return reference.swiglu(gate, up)


def _forward(gate, up):
  return reference.swiglu(gate, up), (gate, up)


def _backward(residuals, dy):
  return derivatives.of_definition(_launch, lambda gate, up, dy: jax.vjp(reference.swiglu, gate, up)[1](dy))(
      *residuals, dy)


swiglu.defvjp(_forward, _backward)


def _kernel(gate_ref, up_ref, dy_ref, dgate_ref, dup_ref, dot):
  gate, up, dy = (ref[...].astype(jnp.float32) for ref in (gate_ref, up_ref, dy_ref))
  sigmoid = jax.nn.sigmoid(gate)
  swish = gate * sigmoid
  dgate_ref[...] = (dy * up * (sigmoid + swish * (1 - sigmoid))).astype(dgate_ref.dtype)
  dup_ref[...] = (dy * swish).astype(dup_ref.dtype)


def _launch(gate, up, dy):
  columns = min(gate.size & -gate.size, MOST)
  rows = gate.size // columns
  block, array = pl.BlockSpec((None, columns), lambda i: (i, 0)), jax.ShapeDtypeStruct((rows, columns), gate.dtype)
  launch = triton_blocks.launch(
      _kernel, name="swiglu_backward", grid=(rows,), num_warps=max(1, columns // 256), num_stages=1,
      in_specs=[block] * 3, out_specs=[block] * 2, out_shape=[array] * 2)
  dgate, dup = launch(*(a.reshape(rows, columns) for a in (gate, up, dy)))
  return dgate.reshape(gate.shape), dup.reshape(gate.shape)
