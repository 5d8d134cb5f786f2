"""Multi-scale retention (RetNet; Sun et al. 2023, arXiv:2307.08621, sections 2.1 and 2.2).

Per head h = 0 .. H-1, with q_t, k_t in R^K turned by the rotary angle of position t, and v_t in R^V:
  S_t = (1 - 2^(-5-h)) S_{t-1} + k_t^T v_t,   o_t = q_t S_t / sqrt(K)
  y_t = (RMSNorm(o_t) * swish(x_t W_g)) W_o
With fewer than four heads, the exponents are spread over those of four, -5 to -8, unless `decays` is "consecutive".
Otherwise a model with half the heads would lose the slow half of its memory.
The paper also rescales scores by a positive number per query and head. The head norm undoes it, so it is left out.

The layout is flash-linear-attention's, as in the GLA paper's baseline: rotary pairs (i, i + K/2) with angles
base^(-2i/K), and a head norm with one learned scale shared by all heads. The paper's own code (TorchScale) pairs
neighbours, spaces its angles over one interval fewer and learns no scale. Under `ModelConfig.start` "layers", the
initialisation is TorchScale's.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Float

from kernels.linear_attention import step as linear_attention_step
from lin_jax.context import linear_attention
from lin_jax.layers import Linear, RMSNorm, rotary
from lin_jax.mixers import head_widths, register, require
from lin_jax.mixers.matrix_memory import MatrixMemory, OpConfig, by_heads, short_convolutions

# Xavier with gain 2^-2.5 for the projections into the recurrence and the gate, and with gain 2^-1 for the output.
INPUT_XAVIER = nnx.initializers.variance_scaling(2**-5, "fan_avg", "uniform")
OUTPUT_XAVIER = nnx.initializers.variance_scaling(2**-2, "fan_avg", "uniform")


DECAYS = "spread", "consecutive"


@dataclasses.dataclass
class RetentionConfig(OpConfig):
  """The defaults are the GLA paper's 340M baseline: at width 1024, heads of 256 key and 512 value channels."""

  EARLIER: ClassVar[dict] = {"decays": "consecutive"}  # what a saved config without the field had

  heads: int = 4
  expand_k: float = 1.0  # key width of all heads / model width
  expand_v: float = 2.0
  rope_base: float = 10000.0
  decays: str = "spread"  # over the range of four heads at least, or "consecutive": 1 - 2^(-5-h) for any heads
  conv_width: int = 0  # taps of a short convolution on q, k and v; 0 means no convolution

  @staticmethod
  def examples() -> list["RetentionConfig"]:
    return [RetentionConfig(heads=2), RetentionConfig(heads=4, expand_k=0.5, expand_v=1.0, conv_width=3)]


@register("retention")
class MultiScaleRetention(MatrixMemory):
  """The retention layer.

  Its state is the float32 matrix memory, the number of tokens seen and, with a convolution, its last inputs.
  """

  Config = RetentionConfig
  layout = "bthk,bthk,bthv,h"
  mix, mix_step = staticmethod(linear_attention), staticmethod(linear_attention_step)

  def __init__(self, config: RetentionConfig, *, width: int, norm_eps: float, dtype, rngs: nnx.Rngs):
    require(config, "rope_base", config.rope_base > 0, "must be positive")
    require(config, "decays", config.decays in DECAYS, f"must be one of {', '.join(DECAYS)}")
    key_width, value_width = head_widths(config, width)
    if key_width // config.heads % 2:
      raise ValueError(f"expand_k={config.expand_k} of width {width} gives heads={config.heads} an odd number of "
                       f"channels ({key_width // config.heads}): rotary positions need pairs")
    super().__init__(config, (config.heads, key_width // config.heads, value_width // config.heads))
    self.heads, self.rope_base, self.decays = config.heads, config.rope_base, config.decays
    linear = dict(dtype=dtype, rngs=rngs, init=INPUT_XAVIER)
    self.query = Linear(width, key_width, ("embed", "heads"), **linear)
    self.key = Linear(width, key_width, ("embed", "heads"), **linear)
    self.value = Linear(width, value_width, ("embed", "heads"), **linear)
    self.gate = Linear(width, value_width, ("embed", "heads"), **linear)
    self.norm = RMSNorm(value_width // config.heads, eps=norm_eps, rngs=rngs)
    self.output = Linear(value_width, width, ("heads", "embed"), dtype=dtype, rngs=rngs, init=OUTPUT_XAVIER)
    channels = (key_width, key_width, value_width)
    self.convolutions = short_convolutions(channels, config.conv_width, dtype=dtype, rngs=rngs)

  def init_state(self, batch: int, max_length: int) -> dict:
    return super().init_state(batch, max_length) | {"length": jnp.zeros((batch,), jnp.int32)}

  def project(self, x, state, segment_ids):
    silu = (bool(self.convolutions),) * 3
    qkv, kept = self.convolved((self.query, self.key, self.value), x, state, segment_ids, silu)
    q, k, v = (by_heads(a, self.heads) for a in qkv)
    # Only differences of positions count, so positions run on across segments.
    length = jnp.zeros(x.shape[:1], jnp.int32) if state is None else state["length"]
    positions = length[:, None] + jnp.arange(x.shape[1])[None]
    q, k = (rotary(a, positions, self.rope_base) for a in (q, k))
    return (q, k, v, constant_log_decay(self.heads, self.decays)), kept | {"length": length + x.shape[1]}


def constant_log_decay(heads: int, decays: str) -> Float[Array, "H"]:
  """The logarithm of 1 - 2^(-5-h), or with `decays` "spread" of exponents from -5 to -8 for fewer than four heads. It
  is a constant, so that no optimizer sees it."""
  slowest = 4 + heads if decays == "consecutive" else max(4 + heads, 8)
  return jnp.asarray(np.log1p(-(2.0 ** -np.linspace(5, slowest, heads))), jnp.float32)
