"""Layers shared by every mixer and by the model. `B` batch, `T` time, `D` width, `F` MLP width.

Parameters are float32 and are cast to the compute dtype where they are used, or once per step by `with_cast_kernels`.
Each carries one logical axis name per dimension, which `lin_jax.sharding` maps to a mesh axis. Kernels start from N(0,
0.02), as LLaMA-style models do, unless a caller passes an initializer, which `ModelConfig.start` may replace. Residual
output projections are not rescaled by depth, nor are they in the GLA paper's code.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Float, Int

from kernels import rms_norm, swiglu
from kernels.derivatives import RESIDUALS
from kernels.residual_norm import add_and_norm
from lin_jax.context import short_convolution
from lin_jax.sharding import map_over_heads, rows_of, tensor_shards

NORMAL = nnx.initializers.normal(0.02)


def param(rngs: nnx.Rngs, init: Callable, shape: Sequence[int], axes: Sequence[str | None]) -> nnx.Param:
  """A float32 parameter with logical axis names. Its placement is left to the caller's jit (`out_shardings`)."""
  return nnx.Param(init(rngs.params(), tuple(shape), jnp.float32), out_sharding=tuple(axes), eager_sharding=False)


def time_step_biases(key: Array, shape: Sequence[int], dtype) -> Array:
  """Initializer of the bias under the softplus of a time step. The time steps start log-uniform in [1e-3, 1e-1]."""
  dt = jnp.exp(jax.random.uniform(key, shape, dtype, math.log(1e-3), math.log(1e-1)))
  return dt + jnp.log(-jnp.expm1(-dt))


@jax.custom_jvp
def softplus(x: Array) -> Array:
  """log(1 + exp(x)), with a derivative that is formed from the result. From x = 80 on it is 80, and its derivative 1.

  The ops keep their time steps for the backward pass. So neither x is kept, nor are the time steps computed again.
  Without an upper bound the exponential may overflow. `jax.nn.softplus` avoids that by reading x several times, and XLA
  then gives it a pass of its own behind the product that forms x. A chain of operations becomes a part of that product.
  """
  return jnp.log1p(jnp.exp(jnp.minimum(x, 80.0)))


@softplus.defjvp
def _softplus_derivative(primals, tangents):
  y = checkpoint_name(softplus(*primals), RESIDUALS)
  return y, tangents[0] * -jnp.expm1(-y)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def product(x: Float[Array, "*rows inputs"], kernel: Float[Array, "inputs outputs"], dtype,
            ) -> Float[Array, "*rows outputs"]:
  """x @ kernel in `dtype`, accumulated in float32. The products of its gradients have operands in the dtype of x."""
  return jnp.matmul(x, kernel, preferred_element_type=dtype)


def _product_derivative(dtype, primals, tangents):
  # Without this rule, the products of the gradients read the wide cotangent of a wide result.
  (x, kernel), (dx, dkernel) = primals, tangents
  y = jnp.matmul(x, kernel, preferred_element_type=dtype)
  # A frozen kernel has no tangent, and its product with x would cost as much as y.
  terms = [jnp.matmul(a, b) for a, b in ((dx, kernel), (x, dkernel))
           if not any(isinstance(factor, SymbolicZero) for factor in (a, b))]
  return y, sum(terms[1:], terms[0]).astype(dtype)


product.defjvp(_product_derivative, symbolic_zeros=True)


class Linear(nnx.Module):
  """y = x W (+ b), with products in `dtype` and float32 accumulation. y is in `output_dtype` (`dtype` if None)."""

  adapter: nnx.Module | None = None  # of `lin_jax.lora`, whose result is added

  def __init__(self, inputs: int, outputs: int, axes: tuple[str | None, str | None], *, dtype, rngs: nnx.Rngs,
               init: Callable = NORMAL, bias: bool = False, output_dtype=None):
    self.kernel = param(rngs, init, (inputs, outputs), axes)
    self.bias = param(rngs, nnx.initializers.zeros, (outputs,), axes[1:]) if bias else None
    self.dtype = jnp.dtype(dtype)
    self.output_dtype = jnp.dtype(dtype if output_dtype is None else output_dtype)

  def __call__(self, x: Float[Array, "*batch inputs"]) -> Float[Array, "*batch outputs"]:
    rows = rows_of(x).astype(self.dtype)
    y = product(rows, self.kernel[...].astype(self.dtype), self.output_dtype)
    if self.adapter is not None:
      # The sum has a name, so that remat keeps it and not both of its terms.
      y = checkpoint_name(y + self.adapter(rows, self.output_dtype), RESIDUALS)
    y = y.reshape(*x.shape[:-1], -1)
    if self.bias is None:
      return y
    return y + align(self.bias[...].astype(y.dtype), y)

  def flops_per_token(self) -> int:
    own = 2 * self.kernel.shape[-2] * self.kernel.shape[-1]
    return own if self.adapter is None else own + self.adapter.flops_per_token()


def joint_products(linears: Sequence[nnx.Module], x: Float[Array, "*batch inputs"]) -> list[Array]:
  """Returns the result of each of the `linears`, which have few outputs, from one product with the columns of all.

  The gradient of x is then one product too, and not a sum of as many arrays as there are layers. Layers that decoding
  has joined already, layers with adapters, and layers whose columns are split over devices, stay as they are.
  """
  if tensor_shards() > 1 or not all(isinstance(linear, Linear) and linear.adapter is None for linear in linears):
    return [linear(x) for linear in linears]
  kernels = [linear.kernel[...].astype(linear.dtype) for linear in linears]
  widest = max((linear.output_dtype for linear in linears), key=lambda dtype: dtype.itemsize)
  y = product(rows_of(x).astype(linears[0].dtype), jnp.concatenate(kernels, axis=1), widest).reshape(*x.shape[:-1], -1)
  ends = list(itertools.accumulate(kernel.shape[1] for kernel in kernels[:-1]))
  parts = jnp.split(y, ends, axis=-1)
  return [part.astype(linear.output_dtype) for part, linear in zip(parts, linears, strict=True)]


def with_cast_kernels(graph: nnx.GraphDef, params: nnx.State) -> nnx.State:
  """`params` of a module, in which the kernels of products and convolutions have the dtype in which they are used.

  The module computes the same from them, and casts nothing again where a layer is repeated or recomputed. Derivatives
  with respect to a kernel have its dtype, which is the dtype of the product that gives them.
  """
  module = nnx.merge(graph, params)
  for _, layer in nnx.iter_modules(module):
    if isinstance(layer, Linear | ShortConvolution):
      layer.kernel = layer.kernel.replace(layer.kernel[...].astype(layer.dtype))
  return nnx.state(module)


class SimpleRMSNorm(nnx.Module):
  """x / sqrt(mean(x²) + eps) over the last axis, without parameters, statistics in float32, result in x's dtype."""

  scale: nnx.Param | None = None

  def __init__(self, *, eps: float):
    self.eps = eps

  def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
    # In jnp, because XLA fuses the norm of a residual stream with the additions around it.
    return rms_norm(x, self._scale(), eps=self.eps, implementation="reference")

  def of_sum(self, x: Float[Array, "B D"], y: Float[Array, "B D"]) -> tuple[Float[Array, "B D"], Float[Array, "B D"]]:
    """x + y and its norm, for one token."""
    return add_and_norm(x, y, self._scale(), self.eps)

  def gated(self, o: Float[Array, "B T *heads width"], gate: Float[Array, "B T _"] | None = None,
            activation: str = "swish") -> Float[Array, "B T _"]:
    """The norm of an op's output times its activated gate, if there is one, with all heads in the last axis.

    It is one kernel on a GPU, except for one token and for a norm over heads that are split over devices.
    """
    gate = None if gate is None else gate.reshape(o.shape)
    whole = o.ndim == 3 and tensor_shards() > 1
    implementation = "reference" if whole or o.shape[1] == 1 else None

    def norm(o, scale, gate):
      # As rows, which XLA on a CPU computes to the same bits whether remat repeats them or not.
      o_rows, gate_rows = (None if a is None else a.reshape(-1, a.shape[-1]) for a in (o, gate))
      y = rms_norm(o_rows, scale, gate_rows, eps=self.eps, activation=activation, implementation=implementation)
      return y.reshape(o.shape)

    if not whole:
      axes = "bthv" if o.ndim == 4 else "btv"
      norm = map_over_heads(norm, f"{axes},v,{axes}->{axes}")
    return norm(o, self._scale(), gate).reshape(*o.shape[:2], -1)

  def _scale(self):
    return None if self.scale is None else self.scale[...].astype(jnp.float32)


class RMSNorm(SimpleRMSNorm):
  """x / sqrt(mean(x²) + eps) * (offset + scale) over the last axis, statistics in float32, result in x's dtype.

  The offset is 0, or 1 as in Gemma and Qwen3.5. The scale starts at 1 - offset.
  """

  def __init__(self, width: int, *, eps: float, rngs: nnx.Rngs, offset: int = 0):
    super().__init__(eps=eps)
    self.offset = offset
    self.scale = param(rngs, nnx.initializers.constant(1.0 - offset), (width,), (None,))

  def absorb_offset(self) -> None:
    """Adds the offset to the scale, so that no later call does."""
    self.scale, self.offset = self.scale.replace(self._scale()), 0

  def _scale(self):
    scale = self.scale[...].astype(jnp.float32)
    return scale + self.offset if self.offset else scale


class SwiGLU(nnx.Module):
  """(swish(x W_gate) * x W_up) W_down (Shazeer 2020, arXiv:2002.05202). No biases."""

  def __init__(self, width: int, hidden: int, *, dtype, rngs: nnx.Rngs):
    self.gate = Linear(width, hidden, ("embed", "mlp"), dtype=dtype, rngs=rngs)
    self.up = Linear(width, hidden, ("embed", "mlp"), dtype=dtype, rngs=rngs)
    self.down = Linear(hidden, width, ("mlp", "embed"), dtype=dtype, rngs=rngs)

  def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
    gate, up = self.gate(x), self.up(x)
    if x.ndim != 3 or gate.shape[-1] % tensor_shards():
      return self.down(swiglu(gate, up, implementation="reference"))
    return self.down(map_over_heads(swiglu, "bth,bth->bth")(gate, up))

  def flops_per_token(self) -> int:
    return sum(linear.flops_per_token() for linear in (self.gate, self.up, self.down))


class SGLU(SwiGLU):
  """SwiGLU without its activation: (x W_gate * x W_up) W_down (Qin et al. 2024, arXiv:2405.17381, equation 12)."""

  def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
    return self.down(self.gate(x) * self.up(x))


class ShortConvolution(nnx.Module):
  """Depthwise causal convolution: y_t = Σ_i w_i x_{t-taps+1+i}, i < taps. State: the last taps - 1 inputs.

  Inputs of another segment, and inputs before the first token of an empty state, count as zero. After a call the state
  holds only inputs of the last token's segment. With `silu`, y_t goes through SiLU before it is rounded to `dtype`.
  """

  bias: nnx.Param | None = None

  def __init__(self, channels: int, taps: int, *, axis: str | None, dtype, rngs: nnx.Rngs):
    if taps < 2:
      raise ValueError(f"taps={taps}: a short convolution needs at least 2")
    # Uniform with variance 1 / (3 taps), the usual start of a depthwise convolution.
    init = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform", in_axis=0, out_axis=(), batch_axis=1)
    self.kernel = param(rngs, init, (taps, channels), (None, axis))
    self.dtype = jnp.dtype(dtype)
    self.axis = "c" if axis is None else "h"

  def init_state(self, batch: int) -> Float[Array, "B past C"]:
    taps, channels = self.kernel.shape[-2:]
    return jnp.zeros((batch, taps - 1, channels), self.dtype)

  def __call__(self, x: Float[Array, "B T C"], state: Float[Array, "B past C"] | None = None,
               segment_ids: Int[Array, "B T"] | None = None, *, silu: bool = False,
               ) -> tuple[Float[Array, "B T C"], Float[Array, "B past C"]]:
    def convolve(x, kernel, bias, state, segment_ids):
      return short_convolution(x, kernel, bias, silu=silu, initial_inputs=state, segment_ids=segment_ids,
                               implementation="reference" if x.shape[1] == 1 else None)  # one token needs no kernel

    c = self.axis if x.shape[-1] % tensor_shards() == 0 else "c"  # channels that the mesh does not divide stay whole
    convolve = map_over_heads(convolve, f"bt{c},k{c},{c},bk{c},bt->bt{c},bk{c}")
    bias = None if self.bias is None else self.bias[...].astype(jnp.float32)
    return convolve(x.astype(self.dtype), self.kernel[...].astype(jnp.float32), bias, state, segment_ids)

  def flops_per_token(self) -> int:
    return 2 * self.kernel.shape[-2] * self.kernel.shape[-1]


def convolve(convolutions: Sequence[ShortConvolution], inputs: Sequence[Array], states: Sequence[Array] | None,
             segment_ids: Int[Array, "B T"] | None, silu: Sequence[bool]) -> tuple[list[Array], list[Array]]:
  """Returns each of the inputs [B, T, C] after its convolution, and after SiLU where `silu`, and the new states.

  Without convolutions there is only the SiLU.
  """
  if not convolutions:
    return [jax.nn.silu(x) if active else x for x, active in zip(inputs, silu, strict=True)], []
  states = [None] * len(inputs) if states is None else states
  outputs = [conv(x, state, segment_ids, silu=active)
             for conv, x, state, active in zip(convolutions, inputs, states, silu, strict=True)]
  return [y for y, _ in outputs], [state for _, state in outputs]


def segment_runs(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
  """Number of id changes up to each token. It is 0 in the first segment, which is the one that continues a given state.
  """
  changes = segment_ids[:, 1:] != segment_ids[:, :-1]
  return jnp.pad(jnp.cumsum(changes, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))


def rotary(x: Float[Array, "B T H K"], positions: Int[Array, "B T"], base: float, channels: int | None = None,
           ) -> Float[Array, "B T H K"]:
  """Rotates the pairs (i, i + n/2) of the first n channels, n = `channels` or else K, by position * base**(-2i/n).

  The rotation is computed in float32 (Su et al. 2021, arXiv:2104.09864). The other channels stay as they are.
  """
  half = (channels or x.shape[-1]) // 2
  frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angle = positions.astype(jnp.float32)[:, :, None, None] * frequency[None, None, None]
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  first, second, rest = jnp.split(x.astype(jnp.float32), (half, 2 * half), axis=-1)
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1).astype(x.dtype)


def align(vector: Float[Array, "C"], x: Array) -> Array:
  """`vector` with leading axes of size 1, to broadcast along the last axis of `x`."""
  return vector.reshape((1,) * (x.ndim - 1) + vector.shape)
