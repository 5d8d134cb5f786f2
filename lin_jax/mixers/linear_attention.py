"""Linear attention without decay (Katharopoulos et al. 2020, arXiv:2006.16236, section 3).

Per head, with phi applied to each channel of q_t, k_t in R^K, and v_t in R^V:
  S_t = S_{t-1} + phi(k_t)^T v_t,   z_t = z_{t-1} + phi(k_t)
  o_t = phi(q_t) S_t / sqrt(K), which the normaliser divides by phi(q_t) . z_t / sqrt(K) + 1e-10
  y_t = RMSNorm(o_t) W_o
The 2020 paper has phi = elu + 1, the normaliser, and no norm. The GLA and DeltaNet papers (arXiv:2312.06635 and
arXiv:2406.06484, section 2) describe linear attention as it is used today, with phi = identity, no normaliser, and a
norm in its place (Qin et al. 2022, arXiv:2210.10340), here per head. These are the defaults. The layout, the 1e-10 and
the start from N(0, 0.02) follow flash-linear-attention. A head norm undoes the normaliser except for its epsilon.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, Int

from kernels.linear_attention import step as linear_attention_step
from lin_jax.context import linear_attention
from lin_jax.layers import Linear, RMSNorm
from lin_jax.mixers import head_widths, register, require
from lin_jax.mixers.matrix_memory import OpConfig
from lin_jax.sharding import map_over_heads

EPSILON = 1e-10


def elu1(x: Array) -> Array:
  """elu(x) + 1, formed without the difference that would round it to 0 below -5 in bfloat16."""
  return jnp.where(x > 0, x + 1, jnp.exp(jnp.where(x > 0, 0, x)))


FEATURE_MAPS = {"identity": lambda x: x, "elu1": elu1, "relu": jax.nn.relu}
NONNEGATIVE = ("elu1", "relu")


@dataclasses.dataclass
class LinearAttentionConfig(OpConfig):
  """The defaults are a baseline's beside GLA: 4 heads, and q, k and v of the full width."""

  heads: int = 4
  expand_k: float = 1.0  # key width of all heads / model width
  expand_v: float = 1.0
  feature_map: str = "identity"  # or "elu1", "relu"
  normalizer: bool = False  # divides by the query times the sum of keys
  head_norm: bool = True

  @staticmethod
  def examples() -> list["LinearAttentionConfig"]:
    return [LinearAttentionConfig(heads=2, expand_v=2.0),
            LinearAttentionConfig(heads=4, feature_map="elu1", normalizer=True, head_norm=False)]


@register("linear_attention")
class LinearAttention(nnx.Module):
  """The layer. Its state is the float32 matrix memory and, with the normaliser, the float32 sum of keys."""

  Config = LinearAttentionConfig

  def __init__(self, config: LinearAttentionConfig, *, width: int, norm_eps: float, dtype, rngs: nnx.Rngs):
    require(config, "feature_map", config.feature_map in FEATURE_MAPS, f"must be one of {', '.join(FEATURE_MAPS)}")
    require(config, "normalizer", not config.normalizer or config.feature_map in NONNEGATIVE,
            f"needs a feature_map without negative values ({', '.join(NONNEGATIVE)}), not {config.feature_map!r}")
    key_width, value_width = head_widths(config, width)
    self.heads, self.feature_map, self.normalizer = config.heads, config.feature_map, config.normalizer
    self.chunk_size = config.chunk_size or None
    self.implementation = config.implementation or None
    linear = dict(dtype=dtype, rngs=rngs)
    self.query = Linear(width, key_width, ("embed", "heads"), **linear)
    self.key = Linear(width, key_width, ("embed", "heads"), **linear)
    self.value = Linear(width, value_width, ("embed", "heads"), **linear)
    self.norm = RMSNorm(value_width // config.heads, eps=norm_eps, rngs=rngs) if config.head_norm else None
    self.output = Linear(value_width, width, ("heads", "embed"), **linear)

  def __call__(self, x: Float[Array, "B T D"], state: dict | None = None,
               segment_ids: Int[Array, "B T"] | None = None) -> tuple[Float[Array, "B T D"], dict | None]:
    def attend(q, k, v, memory, segment_ids):
      return linear_attention(q, k, v, initial_state=memory, segment_ids=segment_ids, chunk_size=self.chunk_size,
                              implementation=self.implementation)

    attend = map_over_heads(attend, "bthk,bthk,bthv,bhkv,bt->bthv,bhkv")
    q, k, values = self._project(x)
    mixed = {name: attend(q, k, v, None if state is None else state[name], segment_ids) for name, v in values.items()}
    y = self._finish({name: checkpoint_name(o, "mixer_output") for name, (o, _) in mixed.items()})
    return y, None if state is None else {name: memory for name, (_, memory) in mixed.items()}

  def step(self, x: Float[Array, "B D"], state: dict) -> tuple[Float[Array, "B D"], dict]:
    q, k, values = self._project(x[:, None])
    mixed = {name: linear_attention_step(state[name], q[:, 0], k[:, 0], v[:, 0]) for name, v in values.items()}
    outputs = {name: (o * q.shape[-1] ** -0.5).astype(q.dtype)[:, None] for name, (_, o) in mixed.items()}
    return self._finish(outputs)[:, 0], {name: memory for name, (memory, _) in mixed.items()}

  def init_state(self, batch: int, max_length: int) -> dict:
    """An empty memory. It is the same for any `max_length`."""
    key_dim, value_dim = (linear.kernel.shape[-1] // self.heads for linear in (self.key, self.value))
    widths = {"memory": value_dim} | ({"normalizer": 1} if self.normalizer else {})
    return {name: jnp.zeros((batch, self.heads, key_dim, size), jnp.float32) for name, size in widths.items()}

  def flops_per_token(self, sequence_length: int) -> int:
    """FLOPs of projections and of the recurrence's write and read. The chunked form's extra scores are not counted."""
    key_width, value_width = self.key.kernel.shape[-1], self.value.kernel.shape[-1]
    linears = (self.query, self.key, self.value, self.output)
    mixing = 4 * key_width * (value_width // self.heads + self.normalizer)
    return sum(linear.flops_per_token() for linear in linears) + mixing

  def _project(self, x):
    """Returns q, k [B,T,H,K] and the two factors that the state sums with k.

    The memory sums v [B,T,H,V], and the normaliser sums 1.
    """
    q, k, v = (linear(x).reshape(*x.shape[:2], self.heads, -1) for linear in (self.query, self.key, self.value))
    q, k = map(FEATURE_MAPS[self.feature_map], (q, k))
    return q, k, {"memory": v} | ({"normalizer": jnp.ones_like(v[..., :1])} if self.normalizer else {})

  def _finish(self, outputs):
    """Normaliser, head norm and output projection: [B,T,H,V] and [B,T,H,1] -> [B,T,D]."""
    o = outputs["memory"]
    if self.normalizer:
      o = (o.astype(jnp.float32) / (outputs["normalizer"].astype(jnp.float32) + EPSILON)).astype(o.dtype)
    return self.output(o.reshape(*o.shape[:2], -1) if self.norm is None else self.norm.gated(o))
