"""Gated DeltaNet (Yang, Kautz & Hatamizadeh 2024, arXiv:2412.06464, section 3).

Per value head, with rows q_t, k_t in R^K of its key head, v_t in R^V, and conv a short causal convolution:
  S_t = a_t S_{t-1} + b_t k_t^T (v_t - a_t k_t S_{t-1}),   o_t = q_t S_t / sqrt(K)
  log a_t = -exp(A_log) softplus(x_t W_a + dt_bias),   b_t = sigmoid(x_t W_b)
  q_t, k_t = L2 norm per head of silu(conv(x W)_t),   v_t = silu(conv(x W_v)_t)
  y_t = (RMSNorm(o_t) * swish(x_t W_g)) W_o
Where the paper is silent, the layer follows flash-linear-attention. It has no biases except dt_bias, 1e-6 under the L2
norm's root, one head norm scale shared by all heads, and value heads in equal groups that share a key head. At the
start A is uniform in (0, 16] and softplus(dt_bias) log-uniform in [1e-3, 1e-1]. A_log and dt_bias are vectors, to which
the optimizer applies no weight decay. Doubling beta to (0, 2) gives the state's transition negative eigenvalues
(Grazzi et al. 2024, arXiv:2411.12537).
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from kernels.delta_rule import step as delta_step
from lin_jax.context import delta_rule
from lin_jax.layers import Linear, RMSNorm, align, param, time_step_biases
from lin_jax.mixers import register, require
from lin_jax.mixers.matrix_memory import MatrixMemory, OpConfig, by_heads, short_convolutions


@dataclasses.dataclass
class GatedDeltaNetConfig(OpConfig):
  """The defaults are the 1.3B model's: 6 heads with keys of 256 and values of 512 at width 2048, and an output gate."""

  heads: int = 6  # of queries and keys
  value_heads: int = 0  # a multiple of heads; 0 means one per key head
  head_dim: int = 256  # of queries and keys
  expand_v: float = 2.0  # channels of a value head / channels of a key head
  conv_width: int = 4  # taps of the short convolution on q, k and v; 0 means no convolution
  output_gate: bool = True  # swish gate on the normalised output
  allow_neg_eigval: bool = False  # beta in (0, 2) instead of (0, 1)
  norm_eps: float = 0.0  # of the head norm; 0 means the model's

  @staticmethod
  def examples() -> list["GatedDeltaNetConfig"]:
    return [GatedDeltaNetConfig(heads=2, head_dim=8, conv_width=0, output_gate=False, allow_neg_eigval=True),
            GatedDeltaNetConfig(heads=2, value_heads=4, head_dim=8, expand_v=1.5, norm_eps=1e-3)]


@register("gated_delta_net")
class GatedDeltaNet(MatrixMemory):
  """The Gated DeltaNet layer. Its state is the float32 matrix memory and, with convolutions, their last inputs."""

  Config = GatedDeltaNetConfig
  layout = "btgk,btgk,bthv,bth,bth"
  flops_per_entry = 6  # two reads and a write

  def __init__(self, config: GatedDeltaNetConfig, *, width: int, norm_eps: float, dtype, rngs: nnx.Rngs):
    for field in ("heads", "head_dim"):
      require(config, field, getattr(config, field) >= 1, "must be at least 1")
    require(config, "value_heads", config.value_heads >= 0 and config.value_heads % config.heads == 0,
            f"must be a multiple of heads={config.heads}, or 0")
    require(config, "norm_eps", config.norm_eps >= 0, "must not be negative")
    value_dim = round(config.head_dim * config.expand_v, 6)
    require(config, "expand_v", value_dim >= 1 and value_dim % 1 == 0,
            f"gives {value_dim} channels for head_dim={config.head_dim}: must be a whole number, at least 1")
    self.heads, self.value_heads = config.heads, config.value_heads or config.heads
    super().__init__(config, (self.value_heads, config.head_dim, int(value_dim)))
    self.beta_scale = 2.0 if config.allow_neg_eigval else 1.0
    key_width, value_width = config.heads * config.head_dim, self.value_heads * int(value_dim)
    linear = dict(dtype=dtype, rngs=rngs)
    self.query = Linear(width, key_width, ("embed", "heads"), **linear)
    self.key = Linear(width, key_width, ("embed", "heads"), **linear)
    self.value = Linear(width, value_width, ("embed", "heads"), **linear)
    self.beta = Linear(width, self.value_heads, ("embed", "heads"), output_dtype=jnp.float32, **linear)
    # The decay leaves the compute dtype at its first product: rounded gates compound over thousands of tokens.
    self.decay = Linear(width, self.value_heads, ("embed", "heads"), output_dtype=jnp.float32, **linear)
    self.A_log = param(rngs, log_rates, (self.value_heads,), ("heads",))
    self.dt_bias = param(rngs, time_step_biases, (self.value_heads,), ("heads",))
    self.gate = Linear(width, value_width, ("embed", "heads"), **linear) if config.output_gate else None
    self.norm = RMSNorm(int(value_dim), eps=config.norm_eps or norm_eps, rngs=rngs)
    self.output = Linear(value_width, width, ("heads", "embed"), **linear)
    channels = (key_width, key_width, value_width)
    self.convolutions = short_convolutions(channels, config.conv_width, **linear)

  def project(self, x, state, segment_ids):
    q, k, v, kept = self._project(x, state, segment_ids)
    return (q, k, v, self._beta(x), self._log_decay(x)), kept

  def mix(self, *arrays, **options):
    return delta_rule(*arrays, normalize_qk=True, **options)

  def mix_step(self, memory, q, k, *arrays):
    q, k = (jnp.repeat(a, self.value_heads // self.heads, axis=1) for a in (q, k))
    return delta_step(memory, q, k, *arrays, normalize_qk=True)

  def _project(self, x, state, segment_ids):
    """Returns q, k [B,T,G,K] before their L2 norm, v [B,T,H,V], and the inputs that the state keeps."""
    qkv, kept = self.convolved((self.query, self.key, self.value), x, state, segment_ids, (True,) * 3)
    heads = (self.heads, self.heads, self.value_heads)
    return *(by_heads(a, n) for a, n in zip(qkv, heads, strict=True)), kept

  def _beta(self, x):
    return self.beta_scale * jax.nn.sigmoid(self.beta(x))

  def _log_decay(self, x):
    logits = self.decay(x)
    rate = align(jnp.exp(self.A_log[...]), logits)
    return -rate * jax.nn.softplus(logits + align(self.dt_bias[...], logits))


def log_rates(key: Array, shape: tuple[int, ...], dtype) -> Array:
  """Initializer of A_log: the log of a uniform sample of (0, 16]."""
  return jnp.log(16 * (1 - jax.random.uniform(key, shape, dtype)))
