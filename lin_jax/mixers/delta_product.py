"""Gated DeltaProduct (Siems et al. 2025, arXiv:2502.10297, section 4): several steps of the delta rule a token.

Token t has one query and n keys, values and betas, j = 1 .. n, each projected, convolved and normalised as in
`lin_jax.mixers.gated_delta_net`. Per head, with H_0 = a_t S_{t-1} and S_t = H_n:
  H_j = H_{j-1} + b_tj k_tj^T (v_tj - k_tj H_{j-1}),   o_t = q_t S_t / sqrt(K)
So a token's transition is the decay a_t times a product of n generalised Householder matrices, of which one key allows
one only: with betas up to 2 products of two are rotations. n = 1 is Gated DeltaNet; a_t = 1 is plain DeltaProduct.

The parallel form is one call of the delta rule on n T steps: the steps of a token follow each other, the decay comes
with the first, and the query, zero before, with the last.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, Int

from kernels import delta_rule
from kernels.delta_rule import step as delta_step
from lin_jax.layers import Linear, ShortConvolution
from lin_jax.mixers import register, require
from lin_jax.mixers.gated_delta_net import GatedDeltaNet, GatedDeltaNetConfig
from lin_jax.sharding import shard_heads


@dataclasses.dataclass
class DeltaProductConfig(GatedDeltaNetConfig):
  """The fields of Gated DeltaNet, and the steps a token; as many heads of values as of keys."""

  householders: int = 2  # steps of the delta rule a token
  decay: bool = True  # False is plain DeltaProduct
  allow_neg_eigval: bool = True

  @staticmethod
  def examples() -> list["DeltaProductConfig"]:
    return [DeltaProductConfig(heads=2, head_dim=8, expand_v=1.5),
            DeltaProductConfig(heads=2, head_dim=8, conv_width=0, householders=3, decay=False, output_gate=False)]


@register("delta_product")
class GatedDeltaProduct(GatedDeltaNet):
  """The Gated DeltaProduct layer. Its state is that of Gated DeltaNet, with the wider inputs of its convolutions."""

  Config = DeltaProductConfig

  def __init__(self, config: DeltaProductConfig, *, width: int, norm_eps: float, dtype, rngs: nnx.Rngs):
    require(config, "householders", config.householders >= 1, "must be at least 1")
    require(config, "value_heads", config.value_heads in (0, config.heads), f"must be heads={config.heads}, or 0")
    super().__init__(config, width=width, norm_eps=norm_eps, dtype=dtype, rngs=rngs)
    self.householders = n = config.householders
    key_width, value_width = self.query.kernel.shape[-1], self.output.kernel.shape[-2]
    linear = dict(dtype=dtype, rngs=rngs)
    self.key = Linear(width, n * key_width, ("embed", "heads"), **linear)
    self.value = Linear(width, n * value_width, ("embed", "heads"), **linear)
    self.beta = Linear(width, n * config.heads, ("embed", "heads"), output_dtype=jnp.float32, **linear)
    if not config.decay:
      self.decay = self.A_log = self.dt_bias = None
    channels = (key_width, n * key_width, n * value_width) if config.conv_width else ()
    self.convolutions = nnx.List([ShortConvolution(size, config.conv_width, axis="heads", **linear)
                                  for size in channels])

  def __call__(self, x: Float[Array, "B T D"], state: dict | None = None,
               segment_ids: Int[Array, "B T"] | None = None) -> tuple[Float[Array, "B T D"], dict | None]:
    n = self.householders
    *arrays, inputs = self._arrays(x, state, segment_ids)

    def attend(q, k, v, beta, log_decay, memory, segment_ids):
      return delta_rule(q, k, v, beta, log_decay, normalize_qk=True, initial_state=memory, segment_ids=segment_ids,
                        chunk_size=self.chunk_size, implementation=self.implementation)

    attend = shard_heads(attend, "bthk,bthk,bthv,bth,bth,bhkv,bt->bthv,bhkv")
    memory = None if state is None else state["memory"]
    o, memory = attend(*arrays, memory, None if segment_ids is None else jnp.repeat(segment_ids, n, axis=1))
    y = self._finish(x, checkpoint_name(o[:, n - 1::n], "mixer_output"))
    return y, None if state is None else {"memory": memory, "inputs": inputs}

  def step(self, x: Float[Array, "B D"], state: dict) -> tuple[Float[Array, "B D"], dict]:
    x, memory = x[:, None], state["memory"]
    *arrays, inputs = self._arrays(x, state, None)
    for j in range(self.householders):
      memory, o = delta_step(memory, *jax.tree.map(lambda a, j=j: a[:, j], arrays), normalize_qk=True)
    q, _, v, *_ = arrays
    o = (o * q.shape[-1] ** -0.5).astype(v.dtype)
    return self._finish(x, o[:, None])[:, 0], {"memory": memory, "inputs": inputs}

  def init_state(self, batch: int, max_length: int) -> dict:
    """An empty memory, the same for any `max_length`."""
    key_dim, value_dim = (size // self.heads for size in (self.query.kernel.shape[-1], self.output.kernel.shape[-2]))
    memory = jnp.zeros((batch, self.heads, key_dim, value_dim), jnp.float32)
    return {"memory": memory, "inputs": [conv.init_state(batch) for conv in self.convolutions]}

  def flops_per_token(self, sequence_length: int) -> int:
    """Projections, two products with the state a step and one that reads it; the chunked form's are not counted."""
    linears = [self.query, self.key, self.value, self.beta, self.decay, self.gate, self.output]
    mixing = (4 * self.householders + 2) * self.query.kernel.shape[-1] // self.heads * self.output.kernel.shape[-2]
    return sum(layer.flops_per_token() for layer in (*linears, *self.convolutions) if layer is not None) + mixing

  def _arrays(self, x, state, segment_ids):
    """q, k [B,nT,H,K] before their L2 norm, v [B,nT,H,V], beta, log_decay [B,nT,H] or None, convolutions' states."""
    n = self.householders
    q, k, v, inputs = self._project(x, state, segment_ids)
    # The steps of a head lie side by side among the channels, so that heads can be split over devices.
    k, v, beta = (jnp.moveaxis(a.reshape(*x.shape[:2], self.heads, n, -1), 3, 2) for a in (k, v, self._beta(x)))
    steps = jnp.arange(n)[:, None]
    log_decay = None if self.decay is None else jnp.where(steps == 0, self._log_decay(x)[:, :, None], 0.0)
    q = jnp.where(steps[..., None] == n - 1, q[:, :, None], jnp.zeros_like(q[:, :, None]))
    arrays = q, k, v, beta[..., 0], log_decay
    return *jax.tree.map(lambda a: a.reshape(x.shape[0], -1, *a.shape[3:]), arrays), inputs
