"""The recurrent layer that SUPRA makes of softmax attention (Mercat et al. 2024, arXiv:2405.06640, section 2.3).

Per head h = 1 .. H, with rows q_t, k_t, v_t in R^K as in attention, and R_t the rotation by the angle of position t:
  phi(x) = relu(x W + b),   W in R^(K x K), b in R^K, shared by queries and keys
  S_t = exp(-2^(-8h/H)) S_{t-1} + R_t(phi(k_t))^T v_t,   o_t = R_t(phi(q_t)) S_t / sqrt(K)
  y_t = GroupNorm(o_t) W_o,   GroupNorm(o) = (o - mean(o)) / sqrt(var(o) + eps) over the K channels of a head
The query, key, value and output projections have the names and shapes of `lin_jax.mixers.attention`, so that
`lin_jax.linearize` can keep them. Query heads that share a key-value head share its feature map too.

The paper takes the decay from RetNet in its formula, and from TransNormerLLM (Press et al.'s slopes, as here) in its
runs. The norm without parameters, its eps of 1e-5, and the start of W and b, uniform within 1 / sqrt(inputs), are the
ones of the authors' code (TRI-ML/linear_open_lm). That code has one W for the channels of all heads together, where the
text has one per head.

Where the features of q_t share no channel with the keys' so far, o_t is 0 up to the rounding of the rotation, which the
norm magnifies by up to 1 / sqrt(eps). It happens at the first tokens of a text, and mostly in narrow heads.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from kernels.linear_attention import step as linear_attention_step
from lin_jax.context import linear_attention
from lin_jax.layers import Linear, SimpleRMSNorm, param, rotary
from lin_jax.mixers import register, require
from lin_jax.mixers.lightning_attention import alibi_slopes
from lin_jax.mixers.matrix_memory import MatrixMemory, OpConfig, by_heads

EPSILON = 1e-5  # of the GroupNorm


@dataclasses.dataclass
class SupraConfig(OpConfig):
  """The defaults are the GLA paper's 340M Transformer++, as in `AttentionConfig`."""

  heads: int = 16
  kv_heads: int = 0  # 0 means one per head
  rope_base: float = 10000.0

  @staticmethod
  def examples() -> list["SupraConfig"]:
    return [SupraConfig(heads=1), SupraConfig(heads=2, kv_heads=1)]


class FeatureMap(nnx.Module):
  """relu(x W + b) with a W and a b for each key-value head, which serve all heads of its group."""

  def __init__(self, heads: int, channels: int, *, dtype, rngs: nnx.Rngs):
    uniform = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform", in_axis=1, out_axis=2, batch_axis=0)
    self.kernel = param(rngs, uniform, (heads, channels, channels), ("heads", None, None))
    # One axis for all heads, because parameters with more axes count as matrices, whose weights decay.
    self.bias = param(rngs, _uniform(channels), (heads * channels,), ("heads",))
    self.dtype = jnp.dtype(dtype)

  def __call__(self, x: Float[Array, "B T H K"]) -> Float[Array, "B T H K"]:
    heads = self.kernel.shape[0]
    bias = self.bias[...].astype(self.dtype).reshape(1, 1, heads, 1, -1)
    groups = x.reshape(*x.shape[:2], heads, -1, x.shape[-1])
    y = jnp.einsum("btgrk,gkf->btgrf", groups, self.kernel[...].astype(self.dtype),
                   preferred_element_type=self.dtype)
    return jax.nn.relu(y + bias).reshape(x.shape)


@register("supra")
class Supra(MatrixMemory):
  """The layer. Its state is the float32 matrix memory and the number of tokens seen."""

  Config = SupraConfig
  layout = "bthk,bthk,bthv,h"
  mix, mix_step = staticmethod(linear_attention), staticmethod(linear_attention_step)

  def __init__(self, config: SupraConfig, *, width: int, norm_eps: float, dtype, rngs: nnx.Rngs):
    require(config, "heads", config.heads >= 1, "must be at least 1")
    require(config, "kv_heads", config.kv_heads >= 0, "must not be negative")
    require(config, "rope_base", config.rope_base > 0, "must be positive")
    kv_heads, channels = config.kv_heads or config.heads, width // config.heads
    require(config, "heads", width % config.heads == 0 and channels % 2 == 0,
            f"must divide the width {width} into an even number of channels")
    require(config, "kv_heads", config.heads % kv_heads == 0, f"must divide heads={config.heads}")
    super().__init__(config, (config.heads, channels, channels))
    self.heads, self.kv_heads, self.rope_base = config.heads, kv_heads, config.rope_base
    linear = dict(dtype=dtype, rngs=rngs)
    self.query = Linear(width, width, ("embed", "heads"), **linear)
    self.key = Linear(width, kv_heads * channels, ("embed", "heads"), **linear)
    self.value = Linear(width, kv_heads * channels, ("embed", "heads"), **linear)
    self.feature_map = FeatureMap(kv_heads, channels, **linear)
    self.norm = SimpleRMSNorm(eps=EPSILON)
    self.output = Linear(width, width, ("heads", "embed"), **linear)

  def init_state(self, batch: int, max_length: int) -> dict:
    """An empty memory. It is the same for any `max_length`."""
    return {"memory": self.empty_memory(batch), "length": jnp.zeros((batch,), jnp.int32)}

  def flops_per_token(self, sequence_length: int) -> int:
    maps = 2 * (self.heads + self.kv_heads) * math.prod(self.feature_map.kernel.shape[-2:])
    return super().flops_per_token(sequence_length) + maps

  def project(self, x, state, segment_ids):
    q = by_heads(self.query(x), self.heads)
    k, v = (by_heads(linear(x), self.kv_heads) for linear in (self.key, self.value))
    # Only differences of positions count, so positions run on across segments.
    length = jnp.zeros(x.shape[:1], jnp.int32) if state is None else state["length"]
    positions = length[:, None] + jnp.arange(x.shape[1])[None]
    q, k = (rotary(self.feature_map(a), positions, self.rope_base) for a in (q, k))
    # The mean that GroupNorm takes from an output is the output for the mean of the values.
    v -= v.mean(axis=-1, keepdims=True)
    k, v = (jnp.repeat(a, self.heads // self.kv_heads, axis=2) for a in (k, v))
    log_decay = -jnp.asarray(alibi_slopes(self.heads), jnp.float32)
    return (q, k, v, log_decay), {"length": length + x.shape[1]}


def _uniform(inputs):
  """Initializer: uniform within 1 / sqrt(inputs)."""
  return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -1, 1) / math.sqrt(inputs)
