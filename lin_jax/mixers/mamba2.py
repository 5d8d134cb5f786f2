"""Mamba-2: a state-space layer with a scalar decay per token and head (Dao and Gu 2024, arXiv:2405.21060, section 7).

Per head, with x_t in R^V, and B_t, C_t in R^N shared by the heads of a group:
  x, B, C = swish(conv(u W_x) + b_x), swish(conv(u W_B) + b_B), swish(conv(u W_C) + b_C)
  dt_t = softplus(u_t W_dt + dt_bias),   log a_t = -exp(A_log) dt_t
  S_t = a_t S_{t-1} + B_t^T (dt_t x_t),   o_t = C_t S_t + D x_t,   y_t = RMSNorm(o_t * swish(u_t W_z)) W_o
In the words of linear attention, q = C, k = B and v = dt x. There are fewer heads of q and k than of v, and q is not
scaled. Four choices follow the authors' mamba_ssm: the order of gate and norm, the norm's statistics over the heads of
a group, the ranges of A and dt at the start, and a convolution with and projections without bias. So that heads can be
sharded over devices, its one input projection is five here, for z, x, B, C and dt in its order, and its one convolution
is three. Kernels start from N(0, 0.02) as everywhere in `lin_jax.layers`, not from mamba_ssm's uniform.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from kernels import skip_gate_norm
from kernels.linear_attention import step as linear_attention_step
from lin_jax.context import linear_attention
from lin_jax.layers import Linear, ShortConvolution, align, convolve, joint_products, param, softplus, time_step_biases
from lin_jax.mixers import register, require
from lin_jax.mixers.matrix_memory import MatrixMemory, OpConfig, by_heads
from lin_jax.sharding import map_over_heads, tensor_shards

A_RANGE = (1.0, 16.0)


@dataclasses.dataclass
class Mamba2Config(OpConfig):
  """The defaults are the published ones at width 1024: 32 heads of 64 channels, one group of B and C with 128 each."""

  heads: int = 32
  groups: int = 1  # groups of heads that share B and C
  state_size: int = 128  # channels of B and C
  expand: float = 2.0  # width of x and z over all heads / model width
  conv_width: int = 4  # taps of the short convolution on x, B and C

  @staticmethod
  def examples() -> list["Mamba2Config"]:
    return [Mamba2Config(heads=4, state_size=8),
            Mamba2Config(heads=4, groups=2, state_size=6, expand=1.5, conv_width=3)]


@register("mamba2")
class Mamba2(MatrixMemory):
  """The Mamba-2 layer. Its state is the float32 matrix memory and the convolutions' last inputs."""

  Config = Mamba2Config
  keeps_start = True
  layout, scale = "btgk,btgk,bthv,bth,bth", 1.0

  def __init__(self, config: Mamba2Config, *, width: int, norm_eps: float, dtype, rngs: nnx.Rngs):
    for field in ("heads", "groups", "state_size"):
      require(config, field, getattr(config, field) >= 1, "must be at least 1")
    require(config, "groups", config.heads % config.groups == 0, f"must divide heads={config.heads}")
    inner = round(width * config.expand)
    if inner < 1 or inner % config.heads:
      raise ValueError(f"expand={config.expand} of width {width} gives {inner} channels: not divisible by "
                       f"heads={config.heads}")
    super().__init__(config, (config.heads, config.state_size, inner // config.heads))
    self.heads, self.groups = config.heads, config.groups
    self.norm_eps = norm_eps
    # A single group serves the heads of every device, so each device computes it whole.
    shared = "heads" if config.groups > 1 else None
    sizes = {"value": (inner, "heads"), "key": (config.groups * config.state_size, shared),
             "query": (config.groups * config.state_size, shared)}
    linear = dict(dtype=dtype, rngs=rngs)
    self.gate = Linear(width, inner, ("embed", "heads"), **linear)
    self.value, self.key, self.query = (Linear(width, size, ("embed", axis), **linear) for size, axis in sizes.values())
    # The decay leaves the compute dtype at its first product: rounded decays compound over thousands of tokens.
    self.dt = Linear(width, config.heads, ("embed", "heads"), output_dtype=jnp.float32, **linear)
    self.convolutions = nnx.List([BiasedConvolution(size, config.conv_width, axis=axis, **linear)
                                  for size, axis in sizes.values()])
    self.A_log = param(rngs, _log_uniform_start(A_RANGE), (config.heads,), ("heads",))
    self.dt_bias = param(rngs, time_step_biases, (config.heads,), ("heads",))
    self.D = param(rngs, nnx.initializers.ones, (config.heads,), ("heads",))
    self.norm_scale = param(rngs, nnx.initializers.ones, (inner,), ("heads",))
    self.output = Linear(inner, width, ("heads", "embed"), **linear)

  def project(self, x, state, segment_ids):
    """Returns q, k [B,T,G,N], v [B,T,H,V] before its time step, and dt and log_decay [B,T,H]."""
    k, q, dt = joint_products((self.key, self.query, self.dt), x)
    states = None if state is None else state["inputs"]
    vkq, inputs = convolve(self.convolutions, (self.value(x), k, q), states, segment_ids, (True,) * 3)
    v, k, q = (by_heads(a, heads)
               for a, heads in zip(vkq, (self.heads, self.groups, self.groups), strict=True))
    return (q, k, v, *self._time_steps(dt)), {"inputs": inputs}

  def mix(self, q, k, v, dt, log_decay, **options):
    return linear_attention(q, k, _scale_heads(dt, v), log_decay, **options)

  def mix_step(self, memory, q, k, v, dt, log_decay):
    q, k = (jnp.repeat(a, self.heads // self.groups, axis=1) for a in (q, k))
    return linear_attention_step(memory, q, k, _scale_heads(dt, v), log_decay)

  def _time_steps(self, dt):
    """Returns dt and log_decay [B,T,H] in float32, from the projection of dt."""
    dt = softplus(dt + align(self.dt_bias[...], dt))
    return dt, -align(jnp.exp(self.A_log[...]), dt) * dt

  def finish(self, x, o, v):
    """Skip, gate, norm over the heads of a group, and output projection: o and v [B,T,H,V] -> [B,T,D]."""
    by_groups = lambda a: a.reshape(*x.shape[:2], self.groups, -1)
    skip = jnp.repeat(self.D[...].astype(jnp.float32), v.shape[-1]).reshape(self.groups, -1)
    scale = self.norm_scale[...].astype(jnp.float32).reshape(self.groups, -1)
    whole = tensor_shards() > 1  # a group's heads may be split over devices

    def norm(o, v, gate, skip, scale):
      return skip_gate_norm(o, v, gate, skip, scale, eps=self.norm_eps,
                            implementation="reference" if whole or o.shape[1] == 1 else None)

    norm = norm if whole else map_over_heads(norm, "btnc,btnc,btnc,nc,nc->btnc")
    y = norm(by_groups(o), by_groups(v), by_groups(self.gate(x)), skip, scale).reshape(*x.shape[:2], -1)
    # Saved, because forming it again reads three arrays of its size.
    return self.output(checkpoint_name(y, "mixer_output"))


class BiasedConvolution(ShortConvolution):
  """A short convolution plus one bias per channel, which starts as PyTorch's does: uniform within 1 / sqrt(taps)."""

  def __init__(self, channels: int, taps: int, *, axis: str | None, dtype, rngs: nnx.Rngs):
    super().__init__(channels, taps, axis=axis, dtype=dtype, rngs=rngs)
    bound = taps**-0.5
    start = lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)
    self.bias = param(rngs, start, (channels,), (axis,))


def _scale_heads(scale, x):
  """`scale` [..., H] times `x` [..., H, V], computed in float32 and returned in the dtype of `x`."""
  return (scale[..., None] * x.astype(jnp.float32)).astype(x.dtype)


def _log_uniform_start(bounds):
  """Initializer that takes the log of a uniform variable."""
  return lambda key, shape, dtype: jnp.log(jax.random.uniform(key, shape, dtype, *bounds))
