"""Gated linear attention (Yang et al. 2024, arXiv:2312.06635, section 4.4).

Per head, with rows q_t, k_t in R^K and v_t in R^V:
  S_t = diag(a_t) S_{t-1} + k_t^T v_t,   o_t = q_t S_t / sqrt(K),   log a_t = log_sigmoid(x_t W_1 W_2 + b) / 16
  y_t = (RMSNorm(o_t) * swish(x_t W_r)) W_o
The paper's gate biases start at zero, where every key channel forgets with a time constant of 16 / log 2 = 23 tokens.
The paper normalises heads with LayerNorm. Here it is RMSNorm with one scale shared by all heads, as in the authors'
flash-linear-attention, which trains the published checkpoints.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from kernels.derivatives import RESIDUALS
from kernels.gla import step as gla_step
from lin_jax.context import gla
from lin_jax.layers import Linear, RMSNorm
from lin_jax.mixers import head_widths, register, require
from lin_jax.mixers.matrix_memory import MatrixMemory, OpConfig, by_heads, short_convolutions

# Under `ModelConfig.start` "layers": Xavier with gain 2^-2.5 for queries, keys and the decay's projections, as in the
# authors' training code, and for the output gate, which starts wider there.
SMALL_XAVIER = nnx.initializers.variance_scaling(2**-5, "fan_avg", "uniform")
_SHORTEST_MEMORY = 16.0


@dataclasses.dataclass
class GLAConfig(OpConfig):
  """The defaults are the paper's: 4 heads, keys of half the width, values of the full width, no convolution."""

  heads: int = 4
  expand_k: float = 0.5  # key width of all heads / model width
  expand_v: float = 1.0
  gate_rank: int = 16
  gate_temperature: float = 16.0
  longest_memory: float = 0.0  # tokens: biases of the gate start at time constants from 16 to this; 0 for biases of 0
  conv_width: int = 0  # taps of a short convolution on q, k and v; 0 means no convolution

  @staticmethod
  def examples() -> list["GLAConfig"]:
    return [GLAConfig(heads=2, gate_rank=4), GLAConfig(heads=4, expand_k=1.0, expand_v=2.0, gate_rank=4, conv_width=3)]


@register("gla")
class GatedLinearAttention(MatrixMemory):
  """The GLA layer. Its state is the float32 matrix memory and, with a convolution, its last inputs."""

  Config = GLAConfig
  layout = "bthk,bthk,bthv,bthk"
  mix, mix_step = staticmethod(gla), staticmethod(gla_step)

  def __init__(self, config: GLAConfig, *, width: int, norm_eps: float, dtype, rngs: nnx.Rngs):
    require(config, "gate_rank", config.gate_rank >= 1, "must be at least 1")
    require(config, "gate_temperature", config.gate_temperature > 0, "must be positive")
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
    # The decay leaves the compute dtype at its first product: rounded gates compound over thousands of tokens.
    self.decay_in = Linear(width, config.gate_rank, ("embed", None), output_dtype=jnp.float32, **small)
    self.decay_out = Linear(config.gate_rank, key_width, (None, "heads"), bias=True, dtype=jnp.float32, rngs=rngs,
                            init=SMALL_XAVIER)
    spread_biases(self.decay_out, config, groups=config.heads)
    self.norm = RMSNorm(value_width // config.heads, eps=norm_eps, rngs=rngs)
    self.output = Linear(value_width, width, ("heads", "embed"), dtype=dtype, rngs=rngs)
    channels = (key_width, key_width, value_width)
    self.convolutions = short_convolutions(channels, config.conv_width, dtype=dtype, rngs=rngs)

  def project(self, x, state, segment_ids):
    silu = (bool(self.convolutions),) * 3
    qkv, kept = self.convolved((self.query, self.key, self.value), x, state, segment_ids, silu)
    return (*(by_heads(a, self.heads) for a in qkv), self._log_decay(x)), kept

  def _log_decay(self, x):
    return by_heads(log_decays(self.decay_out(self.decay_in(x)), self.temperature), self.heads)


def require_memory(config: Any) -> None:
  """Raises ValueError unless `config.longest_memory` is 0 or a time constant of which the gate is capable."""
  require(config, "longest_memory", config.longest_memory == 0 or config.longest_memory > _SHORTEST_MEMORY,
          f"must be 0 or more than {_SHORTEST_MEMORY:g} tokens")


def spread_biases(linear: Linear, config: Any, groups: int) -> None:
  """Sets the biases of a gate's `linear` so that its time constants start spread, as `config.longest_memory` says.

  At a logit of b, the decay is sigmoid(b)^(1 / temperature). It forgets as exp(-t / tau) with a time constant of tau
  tokens at b = -log(exp(temperature / tau) - 1). The time constants are a geometric sequence within each of the
  `groups` of channels.
  """
  if config.longest_memory:
    channels = linear.bias.shape[0] // groups
    tau = np.geomspace(_SHORTEST_MEMORY, config.longest_memory, channels)
    biases = np.tile(-np.log(np.expm1(config.gate_temperature / tau)), groups)
    linear.bias[...] = jnp.asarray(biases, jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def log_decays(x: jax.Array, temperature: float) -> jax.Array:
  """log_sigmoid(x) / temperature, with a derivative that is formed from the result.

  The op keeps its gates for its backward pass. So neither x is kept, nor are the gates computed again.
  """
  return jax.nn.log_sigmoid(x) / temperature


def _log_decays_forward(x, temperature):
  log_decay = checkpoint_name(log_decays(x, temperature), RESIDUALS)
  return log_decay, log_decay


def _log_decays_backward(temperature, log_decay, cotangent):
  return (cotangent * (-jnp.expm1(temperature * log_decay) / temperature),)


log_decays.defvjp(_log_decays_forward, _log_decays_backward)
