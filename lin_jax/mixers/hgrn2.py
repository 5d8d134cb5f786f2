"""HGRN2: a gated linear RNN with state expansion (Qin et al. 2024, arXiv:2404.07904, equation 3).

Per head, with i_t the input and f_t the forget gate, bounded from below by beta:
  f_t = beta + (1 - beta) sigmoid(x_t W_f),   i_t = x_t W_i,   q_t = swish(x_t W_q)
  S_t = diag(f_t) S_{t-1} + (1 - f_t)^T i_t,   o_t = q_t S_t / sqrt(K),   y_t = RMSNorm(o_t) W_o
The outer product with the tied input gate 1 - f_t makes the state K times that of an elementwise gated RNN, without
parameters. The swish of the output gate q_t, its scale (which matters only beside the norm's eps), the input without an
activation, and the RMSNorm over all heads at once with one scale a channel are those of flash-linear-attention's layer;
weights start as everywhere in `lin_jax.layers`.

beta is learned per channel, and ties the HGRN2 layers l = 0 ... L - 1 of a model together through logits G [L, D]:
  P = softmax(G) over layers,   beta_l = P_1 + ... + P_l
It is 0 in the first layer, grows with depth, and starts at l / L from logits of zero. That the sum leaves out P_0 is as
the code of HGRN (Qin et al. 2023, arXiv:2311.04823) and flash-linear-attention have it; a sum of the first l terms is
the same model with its logits in another order. In hybrids only HGRN2 layers have terms (in flash-linear-attention the
others do as well), and G_0 is zero where the model's layer 0 is another mixer. A mixer outside a model is a layer above
such a one: beta = sigmoid(G).
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, Int

from kernels import gla
from kernels.gla import step as gla_step
from lin_jax.layers import Linear, RMSNorm, ShortConvolution, convolve, param
from lin_jax.mixers import register, require
from lin_jax.sharding import shard_heads


@dataclasses.dataclass
class HGRN2Config:
  """Defaults are those of the published 340M layer at width 1024: the state is expanded width / heads = 128 times."""

  heads: int = 8
  learned_bound: bool = True  # of the forget gate, from below; without it the bound is 0
  norm_eps: float = 0.0  # of the layer's own norm, 1e-5 in flash-linear-attention; 0 is that of the model
  conv_width: int = 0  # taps of a short convolution on q, f and i; 0 is none
  chunk_size: int = 0  # tokens per chunk of the parallel form; 0 lets the op choose
  implementation: str = ""  # of the op; "" takes the first that supports the inputs

  @staticmethod
  def examples() -> list["HGRN2Config"]:
    return [HGRN2Config(heads=2, learned_bound=False), HGRN2Config(heads=4, conv_width=3)]


@register("hgrn2")
class HGRN2(nnx.Module):
  """The HGRN2 token mixer. Its state is the float32 matrix memory and, with a convolution, its last inputs."""

  Config = HGRN2Config

  def __init__(self, config: HGRN2Config, *, width: int, norm_eps: float, dtype, rngs: nnx.Rngs):
    require(config, "heads", config.heads >= 1, "must be at least 1")
    require(config, "heads", width % config.heads == 0, f"must divide the width {width}")
    require(config, "norm_eps", config.norm_eps >= 0, "must not be negative")
    self.heads = config.heads
    self.chunk_size = config.chunk_size or None
    self.implementation = config.implementation or None
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
    """The bounds of all layers, from the logits of all layers."""
    bounded = [pair for pair in zip(mixers, layers, strict=True) if pair[0].bound_logits is not None]
    if bounded:
      numbers = np.concatenate([own for _, own in bounded])
      order = np.argsort(numbers)
      logits = jnp.concatenate([mixer.bound_logits[...] for mixer, _ in bounded])[order]
      bounds = lower_bounds(logits) if 0 in numbers else lower_bounds(jnp.pad(logits, ((1, 0), (0, 0))))[1:]
      for mixer, own in bounded:
        mixer.lower_bound = bounds[np.searchsorted(numbers[order], own)]

  def __call__(self, x: Float[Array, "B T D"], state: dict | None = None,
               segment_ids: Int[Array, "B T"] | None = None) -> tuple[Float[Array, "B T D"], dict | None]:
    q, k, v, log_decay, inputs = self._project(x, state, segment_ids)

    def attend(q, k, v, log_decay, memory, segment_ids):
      return gla(q, k, v, log_decay, initial_state=memory, segment_ids=segment_ids, chunk_size=self.chunk_size,
                 implementation=self.implementation)

    attend = shard_heads(attend, "bthk,bthk,bthv,bthk,bhkv,bt->bthv,bhkv")
    o, memory = attend(q, k, v, log_decay, None if state is None else state["memory"], segment_ids)
    y = self._finish(checkpoint_name(o, "mixer_output"))
    return y, None if state is None else {"memory": memory, "inputs": inputs}

  def step(self, x: Float[Array, "B D"], state: dict) -> tuple[Float[Array, "B D"], dict]:
    *arrays, inputs = self._project(x[:, None], state, None)
    q, k, v, log_decay = (a[:, 0] for a in arrays)
    memory, o = gla_step(state["memory"], q, k, v, log_decay)
    o = (o * q.shape[-1] ** -0.5).astype(v.dtype)
    return self._finish(o[:, None])[:, 0], {"memory": memory, "inputs": inputs}

  def init_state(self, batch: int, max_length: int) -> dict:
    """An empty memory, the same for any `max_length`."""
    head_dim = self.input.kernel.shape[-1] // self.heads
    memory = jnp.zeros((batch, self.heads, head_dim, head_dim), jnp.float32)
    return {"memory": memory, "inputs": [conv.init_state(batch) for conv in self.convolutions]}

  def flops_per_token(self, sequence_length: int) -> int:
    """Projections, and the recurrence's write and read; the chunked form's extra scores are not counted."""
    layers = self.query, self.forget, self.input, self.output, *self.convolutions
    return sum(layer.flops_per_token() for layer in layers) + 4 * self.input.kernel.shape[-1]**2 // self.heads

  def _project(self, x, state, segment_ids):
    """q, k, v and log_decay [B,T,H,K], and the convolutions' new states."""
    projected, inputs = convolve(self.convolutions, [self.query(x), self.forget(x), self.input(x)],
                                 None if state is None else state["inputs"], segment_ids)
    q, f, v = (a.reshape(*a.shape[:2], self.heads, -1) for a in projected)
    k, log_decay = gates(f, self._bound())
    return jax.nn.silu(q), k.astype(v.dtype), v, log_decay, inputs

  def _bound(self):
    """[1,1,H,K], or None without one."""
    if self.bound_logits is None:
      return None
    bound = jax.nn.sigmoid(self.bound_logits[...]) if self.lower_bound is None else self.lower_bound
    return bound.reshape(1, 1, self.heads, -1)

  def _finish(self, o):
    """Norm over all heads and output projection: o [B,T,H,V] -> [B,T,D]."""
    return self.output(self.norm(o.reshape(*o.shape[:2], -1)))


def lower_bounds(logits: Float[Array, "L D"]) -> Float[Array, "L D"]:
  """Bounds of layers in their order: P_1 + ... + P_l of P = softmax(logits) over layers."""
  share = jax.nn.softmax(logits, axis=0)
  return jnp.cumsum(share.at[0].set(0.0), axis=0)


def gates(f: Float[Array, "*x"], bound: Float[Array, "*x"] | None) -> tuple[Float[Array, "*x"], Float[Array, "*x"]]:
  """1 - forget gate and log(forget gate), in float32 and each to its own relative precision."""
  if bound is None:
    return jax.nn.sigmoid(-f), jax.nn.log_sigmoid(f)
  # Neither logarithm below has an infinite derivative, whose product with zero would be none.
  bound = jnp.clip(bound, 1e-37, 1 - 1e-7)
  k = (1 - bound) * jax.nn.sigmoid(-f)
  # log(1 - k) loses what is left of a gate that is all but closed, the log of a sum the rest of one all but open.
  opened = jnp.log1p(-jnp.minimum(k, 0.5))
  closed = jnp.logaddexp(jnp.log(bound), jnp.log1p(-bound) + jax.nn.log_sigmoid(f))
  return k, jnp.where(k < 0.5, opened, closed)
