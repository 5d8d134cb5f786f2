"""GLA with one decay per token and head in place of one per key channel ("simple GLA").

This is the data-dependent scalar decay of the GLA paper's ablation (Yang et al. 2024, arXiv:2312.06635, section 5) and
of gated RFA (Peng et al. 2021, arXiv:2103.02143). Mamba-2 has the same recurrence (arXiv:2405.21060, section 6).

Per head, with rows q_t, k_t in R^K and v_t in R^V:
  S_t = a_t S_{t-1} + k_t^T v_t,   o_t = q_t S_t / sqrt(K),   log a_t = log_sigmoid(x_t w + b) / 16
  y_t = (RMSNorm(o_t) * swish(x_t W_r)) W_o
With `decay` "constant" a_t is RetNet's 1 - 2^(-5-h) of head h (arXiv:2307.08621), with "none" it is 1: two more rows of
that ablation, in a layer that is otherwise the same.

The paper prints no formula for this gate. It is flash-linear-attention's, one projection to H logits with a bias; the
rest, initialisation included, is the GLA layer of `lin_jax.mixers.gla`, so that the two differ in the decay alone.
(Flash-linear-attention's own defaults are keys of the full width and convolutions of 4 taps.)
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
from lin_jax.layers import Linear, RMSNorm, ShortConvolution, convolve
from lin_jax.mixers import head_widths, register, require
from lin_jax.mixers.gla import SMALL_XAVIER
from lin_jax.sharding import shard_heads

DECAYS = ("token", "constant", "none")


@dataclasses.dataclass
class SimpleGLAConfig:
  """Defaults are GLA's: 4 heads, keys of half the width, values of the full width, no convolution."""

  heads: int = 4
  expand_k: float = 0.5  # key width / model width, over all heads
  expand_v: float = 1.0
  gate_temperature: float = 16.0
  decay: str = "token"  # or "constant", "none"
  conv_width: int = 0  # taps of a short convolution on q, k and v; 0 is none
  chunk_size: int = 0  # tokens per chunk of the parallel form; 0 lets the op choose
  implementation: str = ""  # of the op; "" takes the first that supports the inputs

  @staticmethod
  def examples() -> list["SimpleGLAConfig"]:
    return [SimpleGLAConfig(heads=2), SimpleGLAConfig(heads=4, expand_k=1.0, expand_v=2.0, conv_width=4)]


@register("simple_gla")
class SimpleGatedLinearAttention(nnx.Module):
  """The simple GLA layer. Its state is the float32 matrix memory and, with a convolution, its last inputs."""

  Config = SimpleGLAConfig

  def __init__(self, config: SimpleGLAConfig, *, width: int, norm_eps: float, dtype, rngs: nnx.Rngs):
    require(config, "gate_temperature", config.gate_temperature > 0, "must be positive")
    require(config, "decay", config.decay in DECAYS, f"must be one of {', '.join(DECAYS)}")
    key_width, value_width = head_widths(config, width)
    self.heads = config.heads
    self.temperature = config.gate_temperature
    self.chunk_size = config.chunk_size or None
    self.implementation = config.implementation or None
    small = dict(dtype=dtype, rngs=rngs, init=SMALL_XAVIER)
    self.query = Linear(width, key_width, ("embed", "heads"), **small)
    self.key = Linear(width, key_width, ("embed", "heads"), **small)
    self.value = Linear(width, value_width, ("embed", "heads"), dtype=dtype, rngs=rngs)
    self.gate = Linear(width, value_width, ("embed", "heads"), **small)
    # The decay leaves the compute dtype at its product: rounded gates compound over thousands of tokens.
    self.decay = (Linear(width, config.heads, ("embed", "heads"), bias=True, output_dtype=jnp.float32, **small)
                  if config.decay == "token" else None)
    self.constant = config.decay == "constant"
    self.norm = RMSNorm(value_width // config.heads, eps=norm_eps, rngs=rngs)
    self.output = Linear(value_width, width, ("heads", "embed"), dtype=dtype, rngs=rngs)
    channels = (key_width, key_width, value_width) if config.conv_width else ()
    self.convolutions = nnx.List([ShortConvolution(size, config.conv_width, axis="heads", dtype=dtype, rngs=rngs)
                                  for size in channels])

  def __call__(self, x: Float[Array, "B T D"], state: dict | None = None,
               segment_ids: Int[Array, "B T"] | None = None) -> tuple[Float[Array, "B T D"], dict | None]:
    q, k, v, inputs = self._project(x, state, segment_ids)

    def attend(q, k, v, log_decay, memory, segment_ids):
      return linear_attention(q, k, v, log_decay, initial_state=memory, segment_ids=segment_ids,
                              chunk_size=self.chunk_size, implementation=self.implementation)

    attend = shard_heads(attend, f"bthk,bthk,bthv,{'h' if self.constant else 'bth'},bhkv,bt->bthv,bhkv")
    o, memory = attend(q, k, v, self._log_decay(x), None if state is None else state["memory"], segment_ids)
    y = self._finish(x, checkpoint_name(o, "mixer_output"))
    return y, None if state is None else {"memory": memory, "inputs": inputs}

  def step(self, x: Float[Array, "B D"], state: dict) -> tuple[Float[Array, "B D"], dict]:
    x = x[:, None]
    q, k, v, inputs = self._project(x, state, None)
    log_decay = self._log_decay(x) if self.decay is None else self._log_decay(x)[:, 0]
    memory, o = linear_attention_step(state["memory"], *(a[:, 0] for a in (q, k, v)), log_decay)
    o = (o * q.shape[-1] ** -0.5).astype(v.dtype)
    return self._finish(x, o[:, None])[:, 0], {"memory": memory, "inputs": inputs}

  def init_state(self, batch: int, max_length: int) -> dict:
    """An empty memory, the same for any `max_length`."""
    key_width, value_width = self.key.kernel.shape[-1], self.value.kernel.shape[-1]
    memory = jnp.zeros((batch, self.heads, key_width // self.heads, value_width // self.heads), jnp.float32)
    return {"memory": memory, "inputs": [conv.init_state(batch) for conv in self.convolutions]}

  def flops_per_token(self, sequence_length: int) -> int:
    """Projections, and the recurrence's write and read; the chunked form's extra scores are not counted."""
    linears = [self.query, self.key, self.value, self.gate, self.output] + ([self.decay] if self.decay else [])
    mixing = 4 * self.key.kernel.shape[-1] * self.value.kernel.shape[-1] // self.heads
    return sum(layer.flops_per_token() for layer in (*linears, *self.convolutions)) + mixing

  def _project(self, x, state, segment_ids):
    """q, k [B,T,H,K], v [B,T,H,V], and the convolutions' new states."""
    qkv, inputs = convolve(self.convolutions, [self.query(x), self.key(x), self.value(x)],
                           None if state is None else state["inputs"], segment_ids)
    qkv = map(jax.nn.silu, qkv) if self.convolutions else qkv
    return *(a.reshape(*a.shape[:2], self.heads, -1) for a in qkv), inputs

  def _log_decay(self, x):
    """[B,T,H] of tokens, [H] of constants, which no optimizer sees, or None; float32."""
    if self.decay is None:
      return jnp.asarray(np.log1p(-(2.0 ** (-5 - np.arange(self.heads)))), jnp.float32) if self.constant else None
    return jax.nn.log_sigmoid(self.decay(x)) / self.temperature

  def _finish(self, x, o):
    """Head norm, swish output gate, output projection: o [B,T,H,V] -> [B,T,D]."""
    return self.output(self.norm(o).reshape(*x.shape[:2], -1) * jax.nn.silu(self.gate(x)))
