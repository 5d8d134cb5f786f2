"""Gated DeltaProduct (Siems et al. 2025, arXiv:2502.10297, section 4): several steps of the delta rule per token.

Token t has one query and n keys, values and betas, j = 1 .. n, each projected, convolved and normalised as in
`lin_jax.mixers.gated_delta_net`. Per head, with H_0 = a_t S_{t-1} and S_t = H_n:
  H_j = H_{j-1} + b_tj k_tj^T (v_tj - k_tj H_{j-1}),   o_t = q_t S_t / sqrt(K)
So a token's transition is the decay a_t times a product of n generalised Householder matrices, whereas a single
key allows only one. With betas up to 2, products of two are rotations. n = 1 is Gated DeltaNet, and a_t = 1 is plain
DeltaProduct.

The parallel form is one call of the delta rule on n T steps. The steps of a token follow each other. The decay comes
with the first step and the query with the last. In all steps before, the query is zero.
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx

from lin_jax.layers import Linear
from lin_jax.mixers import register, require
from lin_jax.mixers.gated_delta_net import GatedDeltaNet, GatedDeltaNetConfig
from lin_jax.mixers.matrix_memory import short_convolutions


@dataclasses.dataclass
class DeltaProductConfig(GatedDeltaNetConfig):
  """The fields of Gated DeltaNet, and the steps per token. There are as many heads of values as of keys."""

  householders: int = 2  # steps of the delta rule per token
  decay: bool = True  # False is plain DeltaProduct
  allow_neg_eigval: bool = True

  @staticmethod
  def examples() -> list["DeltaProductConfig"]:
    return [DeltaProductConfig(heads=2, head_dim=8, expand_v=1.5),
            DeltaProductConfig(heads=2, head_dim=8, conv_width=0, householders=3, decay=False, output_gate=False)]


@register("delta_product")
class GatedDeltaProduct(GatedDeltaNet):
  """The Gated DeltaProduct layer. Its state is Gated DeltaNet's, with the wider inputs of its own convolutions."""

  Config = DeltaProductConfig
  layout = "btnhk,btnhk,btnhv,btnh,btnh"

  def __init__(self, config: DeltaProductConfig, *, width: int, norm_eps: float, dtype, rngs: nnx.Rngs):
    require(config, "householders", config.householders >= 1, "must be at least 1")
    require(config, "value_heads", config.value_heads in (0, config.heads), f"must be heads={config.heads}, or 0")
    super().__init__(config, width=width, norm_eps=norm_eps, dtype=dtype, rngs=rngs)
    self.householders = n = config.householders
    self.flops_per_entry = 4 * n + 2  # a read and a write per step, and the output's read
    key_width, value_width = self.query.kernel.shape[-1], self.output.kernel.shape[-2]
    linear = dict(dtype=dtype, rngs=rngs)
    self.key = Linear(width, n * key_width, ("embed", "heads"), **linear)
    self.value = Linear(width, n * value_width, ("embed", "heads"), **linear)
    self.beta = Linear(width, n * config.heads, ("embed", "heads"), output_dtype=jnp.float32, **linear)
    if not config.decay:
      self.decay = self.A_log = self.dt_bias = None
    channels = (key_width, n * key_width, n * value_width)
    self.convolutions = short_convolutions(channels, config.conv_width, **linear)

  def mix(self, *arrays, segment_ids, **options):
    n = self.householders
    arrays = (None if a is None else a.reshape(a.shape[0], -1, *a.shape[3:]) for a in arrays)
    segment_ids = None if segment_ids is None else jnp.repeat(segment_ids, n, axis=1)
    o, memory = super().mix(*arrays, segment_ids=segment_ids, **options)
    return o[:, n - 1::n], memory

  def mix_step(self, memory, *arrays):
    for j in range(self.householders):
      memory, o = super().mix_step(memory, *(None if a is None else a[:, j] for a in arrays))
    return memory, o

  def project(self, x, state, segment_ids):
    """Returns q, k [B,T,n,H,K] before their L2 norm, v [B,T,n,H,V], and beta and log_decay [B,T,n,H] or None."""
    n = self.householders
    q, k, v, kept = self._project(x, state, segment_ids)
    # The steps of a head lie side by side among the channels, so that the heads can be sharded over devices.
    k, v, beta = (jnp.moveaxis(a.reshape(*x.shape[:2], self.heads, n, -1), 3, 2) for a in (k, v, self._beta(x)))
    steps = jnp.arange(n)[:, None]
    log_decay = None if self.decay is None else jnp.where(steps == 0, self._log_decay(x)[:, :, None], 0.0)
    q = jnp.where(steps[..., None] == n - 1, q[:, :, None], jnp.zeros_like(q[:, :, None]))
    return (q, k, v, beta[..., 0], log_decay), kept
