"""GLA with one decay per token and head instead of one per key channel ("simple GLA").

This is the data-dependent scalar decay of the GLA paper's ablation (Yang et al. 2024, arXiv:2312.06635, section 5) and
of gated RFA (Peng et al. 2021, arXiv:2103.02143). Mamba-2 has the same recurrence (arXiv:2405.21060, section 6).

Per head, with rows q_t, k_t in R^K and v_t in R^V:
  S_t = a_t S_{t-1} + k_t^T v_t,   o_t = q_t S_t / sqrt(K),   log a_t = log_sigmoid(x_t w + b) / 16
  y_t = (RMSNorm(o_t) * swish(x_t W_r)) W_o
With `decay` "constant", a_t is RetNet's 1 - 2^(-5-h) of head h (arXiv:2307.08621), spread for fewer than four heads as
`lin_jax.mixers.retention` says, and with "none" it is 1. These are two more rows of that ablation, in a layer that is
otherwise the same.

The paper prints no formula for this gate. It is flash-linear-attention's: one projection to H logits with a bias. The
rest, initialisation included, is the GLA layer of `lin_jax.mixers.gla`, so that the two differ in the decay alone.
(Flash-linear-attention's own defaults are keys of the full width and convolutions of 4 taps.)
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from kernels.linear_attention import step as linear_attention_step
from lin_jax.context import linear_attention
from lin_jax.layers import Linear, RMSNorm
from lin_jax.mixers import head_widths, register, require
from lin_jax.mixers.gla import SMALL_XAVIER, require_memory, spread_biases
from lin_jax.mixers.matrix_memory import MatrixMemory, OpConfig, by_heads, short_convolutions
from lin_jax.mixers.retention import DECAYS as RANGES
from lin_jax.mixers.retention import constant_log_decay

DECAYS = ("token", "constant", "none")


@dataclasses.dataclass
class SimpleGLAConfig(OpConfig):
  """The defaults are GLA's: 4 heads, keys of half the width, values of the full width, no convolution."""

  EARLIER: ClassVar[dict] = {"decays": "consecutive"}  # what a saved config without the field had

  heads: int = 4
  expand_k: float = 0.5  # key width of all heads / model width
  expand_v: float = 1.0
  gate_temperature: float = 16.0
  longest_memory: float = 0.0  # of the heads at the start, as in `GLAConfig`
  decay: str = "token"  # or "constant", "none"
  decays: str = "spread"  # of constants, as in `RetentionConfig`
  conv_width: int = 0  # taps of a short convolution on q, k and v; 0 means no convolution

  @staticmethod
  def examples() -> list["SimpleGLAConfig"]:
    return [SimpleGLAConfig(heads=2), SimpleGLAConfig(heads=4, expand_k=1.0, expand_v=2.0, conv_width=4)]


@register("simple_gla")
class SimpleGatedLinearAttention(MatrixMemory):
  """The simple GLA layer. Its state is the float32 matrix memory and, with a convolution, its last inputs."""

  Config = SimpleGLAConfig
  mix, mix_step = staticmethod(linear_attention), staticmethod(linear_attention_step)

  def __init__(self, config: SimpleGLAConfig, *, width: int, norm_eps: float, dtype, rngs: nnx.Rngs):
    require(config, "gate_temperature", config.gate_temperature > 0, "must be positive")
    require(config, "decay", config.decay in DECAYS, f"must be one of {', '.join(DECAYS)}")
    require(config, "decays", config.decays in RANGES, f"must be one of {', '.join(RANGES)}")
    require_memory(config)
    key_width, value_width = head_widths(config, width)
    super().__init__(config, (config.heads, key_width // config.heads, value_width // config.heads))
    self.heads = config.heads
    self.temperature = config.gate_temperature
    small = dict(dtype=dtype, rngs=rngs, init=SMALL_XAVIER)
    self.query = Linear(width, key_width, ("embed", "heads"), **small)
    self.key = Linear(width, key_width, ("embed", "heads"), **small)
    self.value = Linear(width, value_width, ("embed", "heads"), dtype=dtype, rngs=rngs)
    self.gate = Linear(width, value_width, ("embed", "heads"), **small)
    # The decay leaves the compute dtype at its product: rounded gates compound over thousands of tokens.
    self.decay = (Linear(width, config.heads, ("embed", "heads"), bias=True, output_dtype=jnp.float32, **small)
                  if config.decay == "token" else None)
    if self.decay is not None:
      spread_biases(self.decay, config, groups=1)
    self.constant, self.decays = config.decay == "constant", config.decays
    self.layout = f"bthk,bthk,bthv,{'h' if self.constant else 'bth'}"
    self.norm = RMSNorm(value_width // config.heads, eps=norm_eps, rngs=rngs)
    self.output = Linear(value_width, width, ("heads", "embed"), dtype=dtype, rngs=rngs)
    channels = (key_width, key_width, value_width)
    self.convolutions = short_convolutions(channels, config.conv_width, dtype=dtype, rngs=rngs)

  def project(self, x, state, segment_ids):
    silu = (bool(self.convolutions),) * 3
    qkv, kept = self.convolved((self.query, self.key, self.value), x, state, segment_ids, silu)
    return (*(by_heads(a, self.heads) for a in qkv), self._log_decay(x)), kept

  def _log_decay(self, x):
    """The log-decay in float32: [B,T,H] for tokens, [H] for constants, which no optimizer sees, or None."""
    if self.decay is None:
      return constant_log_decay(self.heads, self.decays) if self.constant else None
    return jax.nn.log_sigmoid(self.decay(x)) / self.temperature
