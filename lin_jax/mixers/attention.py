"""Softmax attention of Transformer++ (LLaMA) and of released hybrids: y_t = (softmax(q_t K^T / sqrt(K)) V * g_t) W_o.

Positions are rotary, on all or on the first channels of a head, or absent. Key-value heads may be shared by groups of
query heads, and a window may bound what a query sees. Queries and keys may be normalised before the rotation: each
head by itself, as in Qwen3, or all heads jointly, as in Olmo 2. The output gate g_t = sigmoid(x_t W_g) of Qwen3-Next
and Qwen3.5 has one value per channel; without it g_t is 1.

The parallel form is `jax.nn.dot_product_attention`. On a GPU it runs cuDNN's flash kernels where they apply, which is
for 16-bit dtypes, head sizes that are multiples of 8 up to 128 (from Hopper on up to 256) and, with a mask, even
lengths. In all other cases XLA's form runs, which stores scores [B,H,T,T]. Packed documents take cuDNN's own layout for
them (`packed_attention.py`) on GPUs from Hopper on. With a window and elsewhere they pass a boolean mask [B,1,T,T]
shared by all heads, which cuDNN reads as a bias, for all pairs of tokens. So do sequences that are split over devices,
for the tokens of a part and the keys of two parts or of all.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, Int

from kernels import dispatch
from lin_jax.context import before
from lin_jax.layers import Linear, RMSNorm, rotary, segment_runs
from lin_jax.mixers import packed_attention, register, require
from lin_jax.sharding import context_shards, map_over_heads

QK_NORMS = ("none", "head", "heads")


@dataclasses.dataclass
class AttentionConfig:
  """The defaults are the GLA paper's 340M Transformer++."""

  heads: int = 16
  kv_heads: int = 0  # 0 means one per head
  window: int = 0  # tokens that a query sees, the current one included; 0 means all
  rope_base: float = 10000.0  # 0 means no positions
  rope_fraction: float = 1.0  # part of a head's channels that is rotated, the first ones
  head_dim: int = 0  # 0 means width / heads
  qk_norm: str = "none"  # RMSNorm of queries and keys: of each "head" by itself, or of all "heads" jointly
  qk_norm_offset: bool = False  # these norms multiply by 1 + scale, as the norm "rms_offset" of a ModelConfig
  output_gate: bool = False  # sigmoid gate on each channel before the output projection

  @staticmethod
  def examples() -> list["AttentionConfig"]:
    return [AttentionConfig(heads=4), AttentionConfig(heads=4, kv_heads=2, window=5),
            AttentionConfig(heads=2, qk_norm="head", qk_norm_offset=True, rope_base=0.0),
            AttentionConfig(heads=4, kv_heads=2, window=5, head_dim=12, rope_fraction=0.5, qk_norm="heads",
                            output_gate=True)]


@register("attention")
class Attention(nnx.Module):
  """Causal attention. Its state is a ring of the last keys and values, with the position that each slot holds."""

  Config = AttentionConfig

  def __init__(self, config: AttentionConfig, *, width: int, norm_eps: float, dtype, rngs: nnx.Rngs):
    self.kv_heads, self.head_dim, self.rotated = _sizes(config, width)
    self.window, self.rope_base, self.qk_norm = config.window, config.rope_base, config.qk_norm
    query_width, key_width = config.heads * self.head_dim, self.kv_heads * self.head_dim
    linear = dict(dtype=dtype, rngs=rngs)
    self.query = Linear(width, query_width, ("embed", "heads"), **linear)
    self.key = Linear(width, key_width, ("embed", "heads"), **linear)
    self.value = Linear(width, key_width, ("embed", "heads"), **linear)
    self.gate = Linear(width, query_width, ("embed", "heads"), **linear) if config.output_gate else None
    norm = functools.partial(RMSNorm, eps=norm_eps, rngs=rngs, offset=int(config.qk_norm_offset))
    sizes = {"none": (), "head": (self.head_dim,) * 2, "heads": (query_width, key_width)}[config.qk_norm]
    self.query_norm, self.key_norm = map(norm, sizes) if sizes else (None, None)
    self.output = Linear(query_width, width, ("heads", "embed"), **linear)

  def __call__(self, x: Float[Array, "B T D"], state: dict | None = None,
               segment_ids: Int[Array, "B T"] | None = None) -> tuple[Float[Array, "B T D"], dict | None]:
    if state is not None:
      return self._extend(x, state, segment_ids)
    positions = jnp.broadcast_to(jnp.arange(x.shape[1])[None], x.shape[:2])
    q, k, v = self._project(x, positions)

    if context_shards() > 1 and x.shape[1] > 1:
      o = self._over_parts(q, k, v, positions, None if segment_ids is None else segment_runs(segment_ids))
    elif segment_ids is None:
      window = (self.window - 1, 0) if self.window else None
      attend = functools.partial(_attention, mask=None, is_causal=True, local_window_size=window)
      o = map_over_heads(attend, "bthk,bshk,bshk->bthk")(q, k, v)
    else:
      o = self._within_documents(q, k, v, segment_runs(segment_ids))
    return self._finish(x, checkpoint_name(o, "mixer_output")), None

  def _within_documents(self, q, k, v, runs):
    if not self.window and dispatch.platform() == "cuda" and packed_attention.supported(q):
      return packed_attention.attend(q, k, v, runs, self._masked)
    return map_over_heads(self._masked, "bthk,bshk,bshk,bt->bthk")(q, k, v, runs)

  def _masked(self, q, k, v, runs):
    # The mask carries the window too: cuDNN does not take a bias and a window together.
    positions = jnp.broadcast_to(jnp.arange(q.shape[1])[None], runs.shape)
    mask = self._visible(positions, positions) & (runs[:, :, None] == runs[:, None, :])
    return _attention(q, k, v, mask[:, None], is_causal=True)

  def _over_parts(self, q, k, v, positions, runs):
    """Attention where each device has the queries of one part: to keys of all parts, or of two if a window allows.

    All pairs of queries and keys are computed. With keys of all parts this is equal work on all devices, and twice the
    work of the pairs that causality leaves. `kernels/README.md` counts it against a zig-zag order.
    """
    runs = jnp.zeros_like(positions) if runs is None else runs
    past = self.window - self.window % 2  # all that a window sees before a part: cuDNN wants even numbers

    def attend(q, k, v, positions, key_positions, runs, key_runs):
      mask = self._visible(positions, key_positions) & (runs[:, :, None] == key_runs[:, None, :])
      return _attention(q, k, v, mask[:, None])

    def attend_near(q, k, v, positions, runs):
      extended = lambda x: jnp.concatenate([before(x, past), x], axis=1)
      key_positions = extended(positions + 1) - 1  # -1 where no part comes before
      return attend(q, extended(k), extended(v), positions, key_positions, runs, extended(runs))

    if 0 < past * context_shards() <= q.shape[1]:
      return map_over_heads(attend_near, "bthk,bthk,bthk,bt,bt->bthk")(q, k, v, positions, runs)
    attend = map_over_heads(attend, "bthk,bshk,bshk,bt,bs,bt,bs->bthk")
    return attend(q, k, v, positions, positions, runs, runs)

  def _extend(self, x, state, segment_ids):
    """Attends to the cache and to `x`. The new state keeps the last keys and values of the last token's segment."""
    time, slots = x.shape[1], state["position"].shape[1]
    if time > slots and slots != self.window:
      raise ValueError(f"{time} tokens do not fit a cache of max_length={slots}")
    positions = state["length"][:, None] + jnp.arange(time)[None]
    q, k, v = self._project(x, positions)
    keys = jnp.concatenate([state["key"], k], axis=1)
    values = jnp.concatenate([state["value"], v], axis=1)
    key_positions = jnp.concatenate([state["position"], positions], axis=1)
    visible = self._visible(positions, key_positions)
    if segment_ids is not None:
      runs = segment_runs(segment_ids)
      key_runs = jnp.pad(runs, ((0, 0), (slots, 0)))
      visible &= runs[:, :, None] == key_runs[:, None, :]
      key_positions = jnp.where(key_runs == runs[:, -1:], key_positions, -1)
    attend = map_over_heads(_attention, "bthk,bshk,bshk,b1ts->bthk")
    y = self._finish(x, attend(q, keys, values, visible[:, None]))
    # Only the last `slots` tokens are written, so that no slot is written twice. Older tokens have left the ring.
    kept = min(time, slots)
    state = dict(state, position=key_positions[:, :slots])
    return y, _write(state, k[:, -kept:], v[:, -kept:], positions[:, -kept:], key_positions[:, -kept:]) | {
        "length": state["length"] + time}

  def step(self, x: Float[Array, "B D"], state: dict) -> tuple[Float[Array, "B D"], dict]:
    positions = state["length"][:, None]
    x = x[:, None]
    q, k, v = self._project(x, positions)
    state = _write(state, k, v, positions, positions) | {"length": state["length"] + 1}
    mask = self._visible(positions, state["position"])[:, None]
    return self._finish(x, _attention(q, state["key"], state["value"], mask, flash=False))[:, 0], state

  def init_state(self, batch: int, max_length: int) -> dict:
    """An empty cache of `max_length` tokens, or of the window if the window is shorter.

    Tokens past `max_length` overwrite the oldest, as in a window of that size. Generation checks the length beforehand.
    """
    slots = min(max_length, self.window or max_length)
    cache = jnp.zeros((batch, slots, self.kv_heads, self.head_dim), self.key.dtype)
    return {"key": cache, "value": cache, "position": jnp.full((batch, slots), -1, jnp.int32),
            "length": jnp.zeros((batch,), jnp.int32)}

  def flops_per_token(self, sequence_length: int) -> int:
    """FLOPs of the projections, and of causal scores and averages over the mean number of tokens that a query sees."""
    channels = self.query.kernel.shape[-1]
    seen = sequence_length if not self.window else min(self.window, sequence_length)
    mean_seen = (seen * (seen + 1) / 2 + (sequence_length - seen) * seen) / sequence_length
    linears = (self.query, self.key, self.value, self.gate, self.output)
    return sum(linear.flops_per_token() for linear in linears if linear) + round(4 * channels * mean_seen)

  def _project(self, x, positions):
    q, k, v = self.query(x), self.key(x), self.value(x)
    if self.qk_norm == "heads":
      q, k = self.query_norm(q), self.key_norm(k)
    q, k, v = (a.reshape(*x.shape[:2], -1, self.head_dim) for a in (q, k, v))
    if self.qk_norm == "head":
      q, k = self.query_norm(q), self.key_norm(k)
    if self.rope_base:
      q, k = (rotary(a, positions, self.rope_base, self.rotated) for a in (q, k))
    return q, k, v

  def _visible(self, positions, key_positions):
    """The keys that each query sees, [B,T,S]: filled slots that are not later than the query and within the window."""
    distance = positions[:, :, None] - key_positions[:, None, :]
    visible = (distance >= 0) & (key_positions >= 0)[:, None, :]
    return visible & (distance < self.window) if self.window else visible

  def _finish(self, x, o):
    o = o.reshape(*o.shape[:2], -1)
    return self.output(o if self.gate is None else o * jax.nn.sigmoid(self.gate(x)))


def _sizes(config, width):
  """The numbers of key-value heads, of channels per head and of rotated channels, checked."""
  require(config, "heads", config.heads >= 1, "must be at least 1")
  for field in ("kv_heads", "window", "rope_base", "head_dim"):
    require(config, field, getattr(config, field) >= 0, "must not be negative")
  require(config, "qk_norm", config.qk_norm in QK_NORMS, f"must be one of {', '.join(QK_NORMS)}")
  require(config, "qk_norm_offset", not config.qk_norm_offset or config.qk_norm != "none", "needs a qk_norm")
  require(config, "rope_fraction", 0 < config.rope_fraction <= 1, "must lie above 0 and not above 1")
  kv_heads = config.kv_heads or config.heads
  if config.heads % kv_heads:
    raise ValueError(f"kv_heads={kv_heads} must divide heads={config.heads}")
  if not config.head_dim and width % config.heads:
    raise ValueError(f"heads={config.heads} must divide the width {width}, unless head_dim is given")
  head_dim = config.head_dim or width // config.heads
  rotated = round(config.rope_fraction * head_dim, 6)
  if config.rope_base and (rotated < 2 or rotated % 2):
    raise ValueError(f"rope_fraction={config.rope_fraction} of {head_dim} channels gives {rotated:g} to rotate: "
                     "must be an even number, at least 2")
  return kv_heads, head_dim, int(rotated)


def _write(state, k, v, positions, labels):
  """Puts keys and values into their ring slots and labels them with their position, or with -1 to keep them unseen."""
  rows = jnp.arange(k.shape[0])[:, None]
  slots = positions % state["position"].shape[1]
  new = {"key": k, "value": v, "position": labels}
  return state | {name: state[name].at[rows, slots].set(value) for name, value in new.items()}


def _attention(q, k, v, mask, *, flash=True, **options):
  (_, time, _, head_dim), keys = q.shape, k.shape[1]
  flash &= dispatch.platform() == "cuda" and q.dtype.itemsize == 2 and head_dim % 8 == 0
  flash &= head_dim <= 128 or (head_dim <= 256 and packed_attention.on_hopper())
  flash &= mask is None or (time % 2 == 0 and keys % 2 == 0)
  # JAX's XLA form mixes dtypes, which strict promotion in the caller would refuse.
  with jax.numpy_dtype_promotion("standard"):
    return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn" if flash else "xla", **options)
