"""Mamba: a selective state-space layer with N states for each channel (Gu and Dao 2023, arXiv:2312.00752).

With x_t in R^D inside the layer, D = expand times the model width, and b_t, c_t in R^N for all channels (section 3.4):
  x = swish(conv(u W_x) + conv_bias),   z = u W_z
  r_t, b_t, c_t = x_t W_r, x_t W_b, x_t W_c,   dt_t = softplus(r_t W_dt + dt_bias)
  h_t = exp(dt_t A) h_{t-1} + dt_t x_t b_t,   A = -exp(A_log);   y_t = (h_t c_t + skip x_t) swish(z_t) W_o
The ranges at the start are from section 3.6 and the authors' mamba_ssm: A = -(1, ..., N) in every channel, dt
log-uniform in [1e-3, 0.1], W_dt uniform within rank^-1/2, and a skip of one. The other kernels start from N(0, 0.02) as
everywhere in `lin_jax.layers`, not from mamba_ssm's uniform. So that channels can be sharded over devices, mamba_ssm's
input projection is two projections here (x and z, in its order) and its x_proj three (r, b and c), whose results are
then sums over devices.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, Int

from kernels.selective_scan import step as selective_scan_step
from lin_jax.context import selective_scan
from lin_jax.layers import Linear, align, joint_products, param, softplus, time_step_biases
from lin_jax.mixers import register, require
from lin_jax.mixers.mamba2 import BiasedConvolution
from lin_jax.sharding import map_over_heads


@dataclasses.dataclass
class MambaConfig:
  """The defaults are the published ones."""

  state_size: int = 16  # states of each channel
  expand: float = 2.0  # channels / model width
  dt_rank: int = 0  # of the step sizes' projection; 0 means a sixteenth of the model width, rounded up
  conv_width: int = 4  # taps of the short convolution
  implementation: str = ""  # of the op; "" means the first that supports the inputs

  @staticmethod
  def examples() -> list["MambaConfig"]:
    return [MambaConfig(state_size=4), MambaConfig(state_size=3, expand=1.5, dt_rank=5, conv_width=3)]


@register("mamba")
class Mamba(nnx.Module):
  """The Mamba layer. Its state is the float32 memory `[B, D, N]` and the convolution's last inputs."""

  Config = MambaConfig
  keeps_start = True

  def __init__(self, config: MambaConfig, *, width: int, norm_eps: float, dtype, rngs: nnx.Rngs):
    del norm_eps  # the layer has no norm
    require(config, "state_size", config.state_size >= 1, "must be at least 1")
    require(config, "dt_rank", config.dt_rank >= 0, "must not be negative")
    inner, rank = round(width * config.expand), config.dt_rank or -(-width // 16)
    require(config, "expand", inner >= 1, f"of width {width} gives {inner} channels, it must give at least 1")
    self.implementation = config.implementation or None
    self.state_size = config.state_size
    linear = dict(dtype=dtype, rngs=rngs)
    self.value, self.gate = (Linear(width, inner, ("embed", "heads"), **linear) for _ in range(2))
    self.convolution = BiasedConvolution(inner, config.conv_width, axis="heads", **linear)
    self.rank = Linear(inner, rank, ("heads", "embed"), **linear)
    self.key, self.query = (Linear(inner, config.state_size, ("heads", None), **linear) for _ in range(2))
    bound = rank**-0.5
    start = lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)
    # The step size leaves the compute dtype at its last product: rounded decays compound over thousands of tokens.
    self.dt = Linear(rank, inner, ("embed", "heads"), init=start, output_dtype=jnp.float32, **linear)
    self.dt_bias = param(rngs, time_step_biases, (inner,), ("heads",))
    # Stored as a vector, channel by channel, because weight decay applies to matrices only and this is not one.
    self.A_log = param(rngs, _a_log_start(config.state_size), (inner * config.state_size,), ("heads",))
    self.skip = param(rngs, nnx.initializers.ones, (inner,), ("heads",))
    self.output = Linear(inner, width, ("heads", "embed"), **linear)

  def __call__(self, x: Float[Array, "B T D"], state: dict | None = None,
               segment_ids: Int[Array, "B T"] | None = None) -> tuple[Float[Array, "B T D"], dict | None]:
    memory, inputs = (None, None) if state is None else (state["memory"], state["inputs"])
    v, inputs = self._convolve(x, inputs, segment_ids)

    def scan(v, dt, a, k, q, memory, segment_ids):
      return selective_scan(v, dt, a, k, q, initial_state=memory, segment_ids=segment_ids,
                            implementation=self.implementation)

    scan = map_over_heads(scan, "bth,bth,hn,btn,btn,bhn,bt->bth,bhn")
    y, memory = scan(v, *self._projected(v), memory, segment_ids)
    y = self._finish(x, checkpoint_name(y, "mixer_output"), v)
    return y, None if state is None else {"memory": memory, "inputs": inputs}

  def step(self, x: Float[Array, "B D"], state: dict) -> tuple[Float[Array, "B D"], dict]:
    x = x[:, None]
    v, inputs = self._convolve(x, state["inputs"], None)
    dt, rates, k, q = self._projected(v)
    memory, y = selective_scan_step(state["memory"], v[:, 0], dt[:, 0], rates, k[:, 0], q[:, 0])
    return self._finish(x, y[:, None].astype(v.dtype), v)[:, 0], {"memory": memory, "inputs": inputs}

  def init_state(self, batch: int, max_length: int) -> dict:
    """An empty memory. It is the same for any `max_length`."""
    memory = jnp.zeros((batch, self.skip.shape[-1], self.state_size), jnp.float32)
    return {"memory": memory, "inputs": self.convolution.init_state(batch)}

  def flops_per_token(self, sequence_length: int) -> int:
    """FLOPs of the projections, the convolution, and the recurrence's write and read."""
    layers = (self.value, self.gate, self.convolution, self.rank, self.key, self.query, self.dt, self.output)
    return sum(layer.flops_per_token() for layer in layers) + 4 * self.A_log.shape[-1]

  def _convolve(self, x, inputs, segment_ids):
    """Returns x `[B, T, D]` inside the layer, and the convolution's new state."""
    return self.convolution(self.value(x), inputs, segment_ids, silu=True)

  def _projected(self, v):
    """The step sizes dt `[B, T, D]` in float32, the rates A `[D, N]`, and b and c `[B, T, N]`."""
    rank, k, q = joint_products((self.rank, self.key, self.query), v)
    dt = self.dt(rank)
    return softplus(dt + align(self.dt_bias[...], dt)), self._rates(), k, q

  def _rates(self):
    return -jnp.exp(self.A_log[...].reshape(-1, self.state_size))

  def _finish(self, x, y, v):
    """Skip, gate and output projection."""
    return self.output(skip_and_gate(y, v, self.gate(x), self.skip[...]))


@jax.custom_vjp
def skip_and_gate(y: Float[Array, "B T D"], v: Float[Array, "B T D"], gate: Float[Array, "B T D"],
                  skip: Float[Array, "D"]) -> Float[Array, "B T D"]:
  """(y + skip v) swish(gate), in float32 and rounded once. The gradient of v is formed from the rounded one of y."""
  return _skip_and_gate(y, v, gate, skip)


def _skip_and_gate(y, v, gate, skip):
  y = y.astype(jnp.float32) + align(skip, v) * v.astype(jnp.float32)
  return (y * jax.nn.silu(gate.astype(jnp.float32))).astype(v.dtype)


def _skip_and_gate_forward(*arrays):
  return _skip_and_gate(*arrays), arrays


def _skip_and_gate_backward(arrays, cotangent):
  dy, _, dgate, dskip = jax.vjp(_skip_and_gate, *arrays)[1](cotangent)
  # Together, because XLA would put all but dy off until the scan's gradients are there, and read the arrays again.
  dy, dgate, dskip = jax.lax.optimization_barrier((dy, dgate, dskip))
  return dy, (align(arrays[3], dy) * dy.astype(jnp.float32)).astype(dy.dtype), dgate, dskip


skip_and_gate.defvjp(_skip_and_gate_forward, _skip_and_gate_backward)


def _a_log_start(size):
  """Initializer that repeats log(1), ..., log(size)."""
  return lambda key, shape, dtype: jnp.tile(jnp.log(jnp.arange(1, size + 1, dtype=dtype)), shape[0] // size)
