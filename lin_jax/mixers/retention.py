"""Multi-scale retention (RetNet; Sun et al. 2023, arXiv:2307.08621, sections 2.1 and 2.2).

Per head h = 0 .. H-1, with q_t, k_t in R^K turned by the rotary angle of position t, and v_t in R^V:
  S_t = (1 - 2^(-5-h)) S_{t-1} + k_t^T v_t,   o_t = q_t S_t / sqrt(K)
  y_t = (RMSNorm(o_t) * swish(x_t W_g)) W_o
The paper also rescales scores by a positive number per query and head; the head norm undoes it, so it is left out.

The layout is that of flash-linear-attention, the GLA paper's baseline: rotary pairs (i, i + K/2) with angles
base^(-2i/K), and a head norm with one learned scale shared by all heads. The paper's own code (TorchScale) pairs
neighbours, spaces its angles over one fewer interval and learns no scale. The initialisation is TorchScale's.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, Int

from kernels import linear_attention
from kernels.linear_attention import step as linear_attention_step
from lin_jax.layers import Linear, RMSNorm, ShortConvolution, convolve, rotary
from lin_jax.mixers import head_widths, register, require
from lin_jax.sharding import shard_heads

# Xavier with gain 2^-2.5 for what enters the recurrence and the gate, with gain 2^-1 for what leaves.
INPUT_XAVIER = nnx.initializers.variance_scaling(2**-5, "fan_avg", "uniform")
OUTPUT_XAVIER = nnx.initializers.variance_scaling(2**-2, "fan_avg", "uniform")


@dataclasses.dataclass
class RetentionConfig:
  """Defaults are those of the GLA paper's 340M baseline: at width 1024, heads of 256 key and 512 value channels."""

  heads: int = 4
  expand_k: float = 1.0  # key width / model width, over all heads
  expand_v: float = 2.0
  rope_base: float = 10000.0
  conv_width: int = 0  # taps of a short convolution on q, k and v; 0 is none
  chunk_size: int = 0  # tokens per chunk of the parallel form; 0 lets the op choose
  implementation: str = ""  # of the op; "" takes the first that supports the inputs

  @staticmethod
  def examples() -> list["RetentionConfig"]:
    return [RetentionConfig(heads=2), RetentionConfig(heads=4, expand_k=0.5, expand_v=1.0, conv_width=3)]


@register("retention")
class MultiScaleRetention(nnx.Module):
  """The retention layer. Its state is the float32 matrix memory, the number of tokens seen and, with a convolution,
  its last inputs."""

  Config = RetentionConfig

  def __init__(self, config: RetentionConfig, *, width: int, norm_eps: float, dtype, rngs: nnx.Rngs):
    require(config, "rope_base", config.rope_base > 0, "must be positive")
    key_width, value_width = head_widths(config, width)
    if key_width // config.heads % 2:
      raise ValueError(f"expand_k={config.expand_k} of width {width} gives heads={config.heads} an odd number of "
                       f"channels ({key_width // config.heads}): rotary positions need pairs")
    self.heads, self.rope_base = config.heads, config.rope_base
    self.chunk_size = config.chunk_size or None
    self.implementation = config.implementation or None
    linear = dict(dtype=dtype, rngs=rngs, init=INPUT_XAVIER)
    self.query = Linear(width, key_width, ("embed", "heads"), **linear)
    self.key = Linear(width, key_width, ("embed", "heads"), **linear)
    self.value = Linear(width, value_width, ("embed", "heads"), **linear)
    self.gate = Linear(width, value_width, ("embed", "heads"), **linear)
    self.norm = RMSNorm(value_width // config.heads, eps=norm_eps, rngs=rngs)
    self.output = Linear(value_width, width, ("heads", "embed"), dtype=dtype, rngs=rngs, init=OUTPUT_XAVIER)
    channels = (key_width, key_width, value_width) if config.conv_width else ()
    self.convolutions = nnx.List([ShortConvolution(size, config.conv_width, axis="heads", dtype=dtype, rngs=rngs)
                                  for size in channels])

  def __call__(self, x: Float[Array, "B T D"], state: dict | None = None,
               segment_ids: Int[Array, "B T"] | None = None) -> tuple[Float[Array, "B T D"], dict | None]:
    q, k, v, seen = self._project(x, state, segment_ids)

    def attend(q, k, v, log_decay, memory, segment_ids):
      return linear_attention(q, k, v, log_decay, initial_state=memory, segment_ids=segment_ids,
                              chunk_size=self.chunk_size, implementation=self.implementation)

    attend = shard_heads(attend, "bthk,bthk,bthv,h,bhkv,bt->bthv,bhkv")
    o, memory = attend(q, k, v, self._log_decay(), None if state is None else state["memory"], segment_ids)
    y = self._finish(x, checkpoint_name(o, "mixer_output"))
    return y, None if state is None else {"memory": memory, **seen}

  def step(self, x: Float[Array, "B D"], state: dict) -> tuple[Float[Array, "B D"], dict]:
    x = x[:, None]
    q, k, v, seen = self._project(x, state, None)
    memory, o = linear_attention_step(state["memory"], q[:, 0], k[:, 0], v[:, 0], self._log_decay())
    o = (o * q.shape[-1] ** -0.5).astype(v.dtype)
    return self._finish(x, o[:, None])[:, 0], {"memory": memory, **seen}

  def init_state(self, batch: int, max_length: int) -> dict:
    """An empty memory, the same for any `max_length`."""
    key_width, value_width = self.key.kernel.shape[-1], self.value.kernel.shape[-1]
    memory = jnp.zeros((batch, self.heads, key_width // self.heads, value_width // self.heads), jnp.float32)
    return {"memory": memory, "inputs": [conv.init_state(batch) for conv in self.convolutions],
            "length": jnp.zeros((batch,), jnp.int32)}

  def flops_per_token(self, sequence_length: int) -> int:
    """Projections, and the recurrence's write and read; the chunked form's extra scores are not counted."""
    linears = (self.query, self.key, self.value, self.gate, self.output)
    mixing = 4 * self.key.kernel.shape[-1] * self.value.kernel.shape[-1] // self.heads
    return sum(layer.flops_per_token() for layer in (*linears, *self.convolutions)) + mixing

  def _project(self, x, state, segment_ids):
    """q, k [B,T,H,K] with their positions, v [B,T,H,V], and what the state keeps of the inputs."""
    qkv, inputs = convolve(self.convolutions, [self.query(x), self.key(x), self.value(x)],
                           None if state is None else state["inputs"], segment_ids)
    qkv = map(jax.nn.silu, qkv) if self.convolutions else qkv
    q, k, v = (a.reshape(*a.shape[:2], self.heads, -1) for a in qkv)
    # Only differences of positions count, so they run on across segments.
    length = jnp.zeros(x.shape[:1], jnp.int32) if state is None else state["length"]
    positions = length[:, None] + jnp.arange(x.shape[1])[None]
    q, k = (rotary(a, positions, self.rope_base) for a in (q, k))
    return q, k, v, {"inputs": inputs, "length": length + x.shape[1]}

  def _log_decay(self):
    """[H]: constants, so that no optimizer sees them."""
    return jnp.asarray(np.log1p(-(2.0 ** (-5 - np.arange(self.heads)))), jnp.float32)

  def _finish(self, x, o):
    """Head norm, swish output gate, output projection: o [B,T,H,V] -> [B,T,D]."""
    return self.output(self.norm(o).reshape(*x.shape[:2], -1) * jax.nn.silu(self.gate(x)))
