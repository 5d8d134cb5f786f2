"""Kimi Delta Attention, the linear layer of Kimi Linear (Kimi Team 2025, arXiv:2510.26692).

Per value head, with rows q_t, k_t in R^K of its key head, v_t in R^V, and conv a short causal convolution:
  S_t = diag(a_t) S_{t-1} + b_t k_t^T (v_t - k_t diag(a_t) S_{t-1}),   o_t = q_t S_t / sqrt(K)
  log a_t = -exp(A_log) softplus(x_t W_1 W_2 + dt_bias),   b_t = sigmoid(x_t W_b)
  q_t, k_t = L2 norm per head of silu(conv(x W)_t),   v_t = silu(conv(x W_v)_t)
  y_t = (RMSNorm(o_t) * sigmoid(x_t W_3 W_4)) W_o
It is `lin_jax.mixers.gated_delta_net` with a decay for each key channel and a sigmoid in the output gate. Each channel
has its own dt_bias, and the channels of a head share A_log. Both gates have K channels between their two matrices. A
starts uniform in [1, 16), and beta may be doubled, as in flash-linear-attention. That library adds a bias to the second
matrix of the output gate. Kimi Linear has none, and neither has this layer.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from lin_jax.layers import Linear, align, param, time_step_biases
from lin_jax.mixers import register
from lin_jax.mixers.gated_delta_net import GatedDeltaNet, GatedDeltaNetConfig
from lin_jax.mixers.matrix_memory import by_heads


@dataclasses.dataclass
class KDAConfig(GatedDeltaNetConfig):
  """The fields of Gated DeltaNet. The defaults are Kimi Linear's: 32 heads of 128 channels at width 2304."""

  heads: int = 32
  head_dim: int = 128
  expand_v: float = 1.0

  @staticmethod
  def examples() -> list["KDAConfig"]:
    return [KDAConfig(heads=2, head_dim=8),
            KDAConfig(heads=2, value_heads=4, head_dim=8, expand_v=1.5, conv_width=0, output_gate=False,
                      allow_neg_eigval=True)]


@register("kda")
class KimiDeltaAttention(GatedDeltaNet):
  """The Kimi Delta Attention layer. Its state is Gated DeltaNet's."""

  Config = KDAConfig
  layout = "btgk,btgk,bthv,bth,bthk"

  def __init__(self, config: KDAConfig, *, width: int, norm_eps: float, dtype, rngs: nnx.Rngs):
    super().__init__(config, width=width, norm_eps=norm_eps, dtype=dtype, rngs=rngs)
    rank, channels, value_width = config.head_dim, self.value_heads * config.head_dim, self.output.kernel.shape[-2]
    self.decay = self.gate = None
    # The decay leaves the compute dtype at its first product: rounded gates compound over thousands of tokens.
    self.decay_in = Linear(width, rank, ("embed", None), output_dtype=jnp.float32, dtype=dtype, rngs=rngs)
    self.decay_out = Linear(rank, channels, (None, "heads"), dtype=jnp.float32, rngs=rngs)
    self.A_log = param(rngs, log_rates, (self.value_heads,), ("heads",))
    self.dt_bias = param(rngs, time_step_biases, (channels,), ("heads",))
    gated, linear = config.output_gate, dict(dtype=dtype, rngs=rngs)
    self.gate_in = Linear(width, rank, ("embed", None), **linear) if gated else None
    self.gate_out = Linear(rank, value_width, (None, "heads"), **linear) if gated else None

  def finish(self, x, o, v):
    gate = None if self.gate_in is None else jax.nn.sigmoid(self.gate_out(self.gate_in(x)))
    return self.output(self.norm.gated(o, gate, "identity"))

  def _log_decay(self, x):
    logits = self.decay_out(self.decay_in(x))
    steps = by_heads(jax.nn.softplus(logits + align(self.dt_bias[...], logits)), self.value_heads)
    return -jnp.exp(self.A_log[...].reshape(1, 1, -1, 1)) * steps


def log_rates(key: Array, shape: tuple[int, ...], dtype) -> Array:
  """Initializer of A_log: the log of a uniform sample of [1, 16)."""
  return jnp.log(jax.random.uniform(key, shape, dtype, 1.0, 16.0))
