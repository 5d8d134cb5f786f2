"""The token mixer of TransNormerLLM on lightning attention (Qin et al. 2024, arXiv:2405.17381, section 4).

Per head h = 0 ... H - 1 of layer l = 0 ... L - 1, with q_t and k_t in R^K and v_t in R^V:
  q_t = swish(x_t W_q),   k_t = swish(x_t W_k),   v_t = x_t W_v,   u_t = x_t W_u
  S_t = lambda S_{t-1} + k_t^T v_t,   o_t = q_t S_t,   y_t = (SRMSNorm(o_t) * u_t) W_o
The norm has no parameters and spans all heads. The decay lambda is a constant, for which sources disagree:
  "alibi"  lambda = exp(-s_h (1 - l / (L - 1) + 1e-5)) with the slopes s_h of ALiBi, 2^(-8 (h + 1) / H) where H is a
           power of two. This is the authors' code. The last layer hardly decays.
  "paper"  lambda = exp(-8 h / H (1 - l / L)), which is equation 10 counted from 0. The first head does not decay.
A mixer outside a model has the decay of layer 0.

With `lrpe` (LRPE-d, equation 9), scores turn with distance by learnable angles theta in R^K per head:
  q_t k_s^T = Re sum_i q_ti k_si exp(i theta_i (t - s)),   as x_t -> [x_t cos(t theta), x_t sin(t theta)] of q and k
The paper's "Mix" has LRPE-d in layer 0 alone. Two choices follow the authors' code: the angles start from
10000^(-2 i / D) over the D channels of all heads, and q lacks the usual 1 / sqrt(K), which matters only beside the
norm's eps.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kernels.linear_attention import step as linear_attention_step
from lin_jax.context import linear_attention
from lin_jax.layers import Linear, SimpleRMSNorm, param
from lin_jax.mixers import register, require
from lin_jax.mixers.matrix_memory import MatrixMemory, OpConfig, by_heads


@dataclasses.dataclass
class LightningAttentionConfig(OpConfig):
  """The defaults are the 385M model's at width 1024: heads of 128 channels."""

  heads: int = 8
  lrpe: bool = False  # learnable rotary angles, which double the state
  decay: str = "alibi"  # or "paper"

  @staticmethod
  def examples() -> list["LightningAttentionConfig"]:
    return [LightningAttentionConfig(heads=2), LightningAttentionConfig(heads=4, lrpe=True, decay="paper")]


@register("lightning_attention")
class LightningAttention(MatrixMemory):
  """The layer. Its state is the float32 matrix memory and, with angles, the number of tokens seen."""

  Config = LightningAttentionConfig
  layout, scale = "bthk,bthk,bthv,h", 1.0
  mix, mix_step = staticmethod(linear_attention), staticmethod(linear_attention_step)

  def __init__(self, config: LightningAttentionConfig, *, width: int, norm_eps: float, dtype, rngs: nnx.Rngs):
    require(config, "heads", config.heads >= 1, "must be at least 1")
    require(config, "heads", width % config.heads == 0, f"must divide the width {width}")
    require(config, "decay", config.decay in DECAYS, f"must be one of {', '.join(DECAYS)}")
    head_dim = width // config.heads
    super().__init__(config, (config.heads, 2 * head_dim if config.lrpe else head_dim, head_dim))
    self.heads, self.decay = config.heads, config.decay
    self.query, self.key, self.value, self.gate = (
        Linear(width, width, ("embed", "heads"), dtype=dtype, rngs=rngs) for _ in range(4))
    self.norm = SimpleRMSNorm(eps=norm_eps)
    self.output = Linear(width, width, ("heads", "embed"), dtype=dtype, rngs=rngs)
    self.theta = param(rngs, _theta_start, (width,), ("heads",)) if config.lrpe else None
    self.log_decay = nnx.data(None)  # [H], while a model runs

  @staticmethod
  def set_layers(mixers: Sequence["LightningAttention"], layers: Sequence[Sequence[int]], depth: int) -> None:
    """Sets the decays [layers, H]. They are constants, which no optimizer or checkpoint sees."""
    for mixer, numbers in zip(mixers, layers, strict=True):
      decays = [DECAYS[mixer.decay](mixer.heads, layer, depth) for layer in numbers]
      mixer.log_decay = jnp.asarray(np.stack(decays), jnp.float32)

  def init_state(self, batch: int, max_length: int) -> dict:
    """An empty memory. It is the same for any `max_length`."""
    length = {} if self.theta is None else {"length": jnp.zeros(batch, jnp.int32)}
    return {"memory": self.empty_memory(batch), **length}

  def project(self, x, state, segment_ids):
    projected = jax.nn.silu(self.query(x)), jax.nn.silu(self.key(x)), self.value(x)
    q, k, v = (by_heads(a, self.heads) for a in projected)
    if self.theta is None:
      return (q, k, v, self._log_decay()), {}
    # Only differences of positions count, so positions run on across segments.
    length = jnp.zeros(x.shape[:1], jnp.int32) if state is None else state["length"]
    positions = (length[:, None] + jnp.arange(x.shape[1])[None]).astype(jnp.float32)
    angles = positions[..., None, None] * self.theta[...].reshape(1, 1, self.heads, -1)
    wave = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
    q, k = ((jnp.tile(a.astype(jnp.float32), 2) * wave).astype(a.dtype) for a in (q, k))
    return (q, k, v, self._log_decay()), {"length": length + x.shape[1]}

  def _log_decay(self):
    return jnp.asarray(DECAYS[self.decay](self.heads, 0, 2), jnp.float32) if self.log_decay is None else self.log_decay

  def finish(self, x, o, v):
    """Norm over all heads, output gate and output projection: o [B,T,H,V] -> [B,T,D]."""
    return self.output(self.norm.gated(o.reshape(*x.shape[:2], -1), self.gate(x), "identity"))


def alibi_slopes(heads: int) -> np.ndarray:
  """Slopes of Press et al. 2022 (arXiv:2108.12409), a geometric sequence.

  If the number of heads lies above a power of two, that power's slopes are followed by every second slope of twice it.
  """
  power = 1 << heads.bit_length() - 1
  slopes = 2.0 ** (-8 * np.arange(1, power + 1) / power)
  return slopes if power == heads else np.concatenate([slopes, alibi_slopes(2 * power)[::2][:heads - power]])


def _alibi_log_decay(heads, layer, depth):
  return -alibi_slopes(heads) * (1 - layer / max(1, depth - 1) + 1e-5)


def _paper_log_decay(heads, layer, depth):
  return -8 * np.arange(heads) / heads * (1 - layer / depth)


DECAYS = {"alibi": _alibi_log_decay, "paper": _paper_log_decay}


def _theta_start(key, shape, dtype):
  """Initializer of the angles: from 1 in the first channel of the first head to about 1e-8 in the last head's last."""
  return jnp.asarray(10000.0 ** (-2 * np.arange(shape[0]) / shape[0]), dtype)
