"""HGRN2: a gated linear RNN with state expansion (Qin et al. 2024, arXiv:2404.07904, equation 3).

Per head, with i_t the input and f_t the forget gate, bounded from below by beta:
  f_t = beta + (1 - beta) sigmoid(x_t W_f),   i_t = x_t W_i,   q_t = swish(x_t W_q)
  S_t = diag(f_t) S_{t-1} + (1 - f_t)^T i_t,   o_t = q_t S_t / sqrt(K),   y_t = RMSNorm(o_t) W_o
The outer product with the tied input gate 1 - f_t makes the state K times as large as that of an elementwise gated RNN,
without more parameters. Four choices follow flash-linear-attention's layer: the swish of the output gate q_t, its scale
(which matters only beside the norm's eps), the input without an activation, and the RMSNorm over all heads at once with
one scale per channel. Weights start as everywhere in `lin_jax.layers`.

beta is learned per channel. Logits G [L, D] tie together the HGRN2 layers l = 0 ... L - 1 of a model:
  P = softmax(G) over layers,   beta_l = P_1 + ... + P_l
It is 0 in the first layer, grows with depth, and starts at l / L from logits of zero. The sum leaves out P_0, as in the
code of HGRN (Qin et al. 2023, arXiv:2311.04823) and in flash-linear-attention. A sum of the first l terms is the same
model with its logits in another order. In hybrids only HGRN2 layers have terms, whereas in flash-linear-attention the
other layers have terms as well. G_0 is zero where the model's layer 0 is another mixer. A mixer outside a model counts
as the layer above such a layer 0, so beta = sigmoid(G).
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Float

from kernels.gla import step as gla_step
from lin_jax.context import gla
from lin_jax.layers import Linear, RMSNorm, ShortConvolution, param
from lin_jax.mixers import register, require
from lin_jax.mixers.matrix_memory import MatrixMemory, OpConfig, by_heads


@dataclasses.dataclass
class HGRN2Config(OpConfig):
  """The defaults are the published 340M layer at width 1024. It expands the state width / heads = 128 times."""

  heads: int = 8
  learned_bound: bool = True  # bounds the forget gate from below; without it the bound is 0
  norm_eps: float = 0.0  # of the layer's own norm, 1e-5 in flash-linear-attention; 0 means the model's norm_eps
  conv_width: int = 0  # taps of a short convolution on q, f and i; 0 means no convolution

  @staticmethod
  def examples() -> list["HGRN2Config"]:
    return [HGRN2Config(heads=2, learned_bound=False), HGRN2Config(heads=4, conv_width=3)]


@register("hgrn2")
class HGRN2(MatrixMemory):
  """The HGRN2 token mixer. Its state is the float32 matrix memory and, with a convolution, its last inputs."""

  Config = HGRN2Config
  layout = "bthk,bthk,bthv,bthk"
  mix, mix_step = staticmethod(gla), staticmethod(gla_step)

  def __init__(self, config: HGRN2Config, *, width: int, norm_eps: float, dtype, rngs: nnx.Rngs):
    require(config, "heads", config.heads >= 1, "must be at least 1")
    require(config, "heads", width % config.heads == 0, f"must divide the width {width}")
    require(config, "norm_eps", config.norm_eps >= 0, "must not be negative")
    super().__init__(config, (config.heads, width // config.heads, width // config.heads))
    self.heads = config.heads
    # The forget gate leaves the compute dtype at its first product: rounded gates compound over thousands of tokens.
    dtypes = (dtype, jnp.float32, dtype)
    self.query, self.forget, self.input = (
        Linear(width, width, ("embed", "heads"), dtype=dtype, output_dtype=output, rngs=rngs) for output in dtypes)
    self.norm = RMSNorm(width, eps=config.norm_eps or norm_eps, rngs=rngs)
    self.output = Linear(width, width, ("heads", "embed"), dtype=dtype, rngs=rngs)
    self.convolutions = nnx.List([ShortConvolution(width, config.conv_width, axis="heads", dtype=output, rngs=rngs)
                                  for output in dtypes if config.conv_width])
    zeros = nnx.initializers.zeros
    self.bound_logits = param(rngs, zeros, (width,), ("heads",)) if config.learned_bound else None
    self.lower_bound = nnx.data(None)  # [D], while a model runs

  @staticmethod
  def set_layers(mixers: Sequence["HGRN2"], layers: Sequence[Sequence[int]], depth: int) -> None:
    """Sets the bounds of all layers, from the logits of all layers."""
    bounded = [pair for pair in zip(mixers, layers, strict=True) if pair[0].bound_logits is not None]
    if bounded:
      numbers = np.concatenate([own for _, own in bounded])
      order = np.argsort(numbers)
      logits = jnp.concatenate([mixer.bound_logits[...] for mixer, _ in bounded])[order]
      bounds = lower_bounds(logits) if 0 in numbers else lower_bounds(jnp.pad(logits, ((1, 0), (0, 0))))[1:]
      for mixer, own in bounded:
        mixer.lower_bound = bounds[np.searchsorted(numbers[order], own)]

  def project(self, x, state, segment_ids):
    projected, kept = self.convolved((self.query, self.forget, self.input), x, state, segment_ids, (True, False, False))
    q, f, v = (by_heads(a, self.heads) for a in projected)
    k, log_decay = gates(f, self._bound())
    return (q, k.astype(v.dtype), v, log_decay), kept

  def _bound(self):
    """The bound [1,1,H,K], or None without one."""
    if self.bound_logits is None:
      return None
    bound = jax.nn.sigmoid(self.bound_logits[...]) if self.lower_bound is None else self.lower_bound
    return bound.reshape(1, 1, self.heads, -1)

  def finish(self, x, o, v):
    """Norm over all heads and output projection: o [B,T,H,V] -> [B,T,D]."""
    return self.output(self.norm.gated(o.reshape(*o.shape[:2], -1)))


def lower_bounds(logits: Float[Array, "L D"]) -> Float[Array, "L D"]:
  """Bounds of the layers in their order: P_1 + ... + P_l of P = softmax(logits) over layers."""
  share = jax.nn.softmax(logits, axis=0)
  return jnp.cumsum(share.at[0].set(0.0), axis=0)


def gates(f: Float[Array, "*x"], bound: Float[Array, "*#x"] | None) -> tuple[Float[Array, "*x"], Float[Array, "*x"]]:
  """Returns 1 - (forget gate) and log(forget gate) in float32, each accurate to its own relative precision.

  The bound broadcasts to f.
  """
  if bound is None:
    return jax.nn.sigmoid(-f), jax.nn.log_sigmoid(f)
  # Clipping gives both logarithms finite derivatives: an infinite one times zero would be NaN.
  bound = jnp.clip(bound, 1e-37, 1 - 1e-7)
  k = (1 - bound) * jax.nn.sigmoid(-f)
  # log(1 - k) loses the remainder of a nearly closed gate, and the log of a sum that of a nearly open one.
  opened = jnp.log1p(-jnp.minimum(k, 0.5))
  closed = jnp.logaddexp(jnp.log(bound), jnp.log1p(-bound) + jax.nn.log_sigmoid(f))
  return k, jnp.where(k < 0.5, opened, closed)
