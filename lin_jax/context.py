"""The ops on sequences whose tokens are split over the mesh axis `context`: each device holds one part of each row.

These functions take the arguments of the ops in `kernels`, and are the ops themselves where time is whole. Under a
shard_map over `context`, as `lin_jax.sharding.map_over_heads` makes it, an array of tokens is one device's part, while
initial and final states belong to the whole row and are equal on all devices. Implementations are chosen as elsewhere.

A part maps the state S that enters it to D S + U. Each device finds U, the part's update from a zero state, and D, its
decay. One all-gather brings them to all devices, in bytes that do not depend on the length: K (V + 1) numbers per row,
head and part for `gla` and `linear_attention`, K (V + K) for `delta_rule`, 2 N per channel for `selective_scan`. Each
device then follows the state from part to part and takes the one that enters its own. In the backward pass, which JAX
derives, a reduce-scatter stands in the place of the all-gather. `kernels/README.md` counts the work that is done twice.

A part that begins with a new segment is entered by zeros, and a part in which a segment starts passes on U alone. Both
are selections, so that a value that is not finite stays in its segment across parts too.

Source: the one all-gather of states is LASP-2's for linear attention (Sun et al. 2025, arXiv:2502.07563, section 3).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

import kernels
from kernels import chunks
from kernels.selective_scan import FASTEST
from lin_jax.sharding import TIME_AXIS, time_parts

__all__ = ["delta_rule", "gla", "linear_attention", "selective_scan", "short_convolution"]


def gla(q: Float[Array, "B T G K"], k: Float[Array, "B T G K"], v: Float[Array, "B T H V"],
        log_decay: Float[Array, "B T G K"], *, initial_state: Float[Array, "B H K V"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None, **options,
        ) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
  """`kernels.gla` on a part. U is one product of decayed keys with values, so the op runs once."""

  def run(initial_state):
    return kernels.gla(q, k, v, log_decay, initial_state=initial_state, segment_ids=segment_ids, **options)

  if time_parts() == 1:
    return run(initial_state)
  last = _last_segment(segment_ids)
  gates = _select(last, chunks.bounded(log_decay.astype(jnp.float32)))
  keys = _weighted(jnp.exp(_sums_after(gates)), k, last)
  decay = jnp.exp(jnp.sum(gates, axis=1))[..., None]
  decay = jnp.repeat(decay, v.shape[2] // q.shape[2], axis=1)
  entry, final_state = _follow(chunks.decayed, _written(keys, v, last), decay, initial_state, segment_ids)
  return run(entry)[0], final_state


def linear_attention(
    q: Float[Array, "B T G K"], k: Float[Array, "B T G K"], v: Float[Array, "B T H V"],
    log_decay: Float[Array, "H"] | Float[Array, "B T H"] | None = None, *,
    initial_state: Float[Array, "B H K V"] | None = None, segment_ids: Int[Array, "B T"] | None = None, **options,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
  """`kernels.linear_attention` on a part. U is one product of keys with decayed values, so the op runs once."""

  def run(initial_state):
    return kernels.linear_attention(q, k, v, log_decay, initial_state=initial_state, segment_ids=segment_ids, **options)

  if time_parts() == 1:
    return run(initial_state)
  last = _last_segment(segment_ids)
  gates = jnp.zeros(v.shape[2:3]) if log_decay is None else chunks.bounded(log_decay.astype(jnp.float32))
  gates = _select(last, jnp.broadcast_to(gates, v.shape[:3]))
  values = v if log_decay is None else _weighted(jnp.exp(_sums_after(gates))[..., None], v, last)
  decay = jnp.exp(jnp.sum(gates, axis=1))[..., None, None]
  decay = jnp.broadcast_to(decay, (*decay.shape[:2], q.shape[3], 1))
  entry, final_state = _follow(chunks.decayed, _written(k, values, last), decay, initial_state, segment_ids)
  return run(entry)[0], final_state


def delta_rule(
    q: Float[Array, "B T G K"], k: Float[Array, "B T G K"], v: Float[Array, "B T H V"], beta: Float[Array, "B T H"],
    log_decay: Float[Array, "B T H"] | Float[Array, "B T H K"] | None = None, *,
    initial_state: Float[Array, "B H K V"] | None = None, segment_ids: Int[Array, "B T"] | None = None, **options,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
  """`kernels.delta_rule` on a part, where D is a matrix. The op runs once, on K more value channels.

  From the state [0, I] and the values [v, 0] it finds [U, D], and in place of the outputs [o, r]. The row r_t reads the
  state that enters the part, S, through all that tokens up to t have done to it. The output is o + r S.
  """

  def run(v, initial_state):
    return kernels.delta_rule(q, k, v, beta, log_decay, initial_state=initial_state, segment_ids=segment_ids, **options)

  if time_parts() == 1:
    return run(v, initial_state)
  (B, T, H, V), K = v.shape, q.shape[3]
  identity = jnp.broadcast_to(jnp.eye(K, dtype=jnp.float32), (B, H, K, K))
  start = _joined(jnp.zeros((B, H, K, V), jnp.float32), identity)
  output, summary = run(_joined(v, jnp.zeros((B, T, H, K), v.dtype)), start)
  through = lambda decay, state: chunks.einsum("bhij,bhjv->bhiv", decay, state)
  entry, final_state = _follow(through, summary[..., :V], summary[..., V:], initial_state, segment_ids)
  first = None if segment_ids is None else _runs(segment_ids) == 0
  read = chunks.product(v.dtype)("bthk,bhkv->bthv", _select(first, output[..., V:]), entry)
  return (chunks.wide(output[..., :V]) + _select(first, read)).astype(v.dtype), final_state


def selective_scan(
    x: Float[Array, "B T D"], step_size: Float[Array, "B T D"], a: Float[Array, "D N"], b: Float[Array, "B T N"],
    c: Float[Array, "B T N"], *, initial_state: Float[Array, "B D N"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None, **options,
) -> tuple[Float[Array, "B T D"], Float[Array, "B D N"]]:
  """`kernels.selective_scan` on a part. The op runs twice, first for U alone, because no product of matrices forms U.

  To correct the output of one run would move more bytes (`kernels/README.md`).
  """

  def run(initial_state):
    return kernels.selective_scan(x, step_size, a, b, c, initial_state=initial_state, segment_ids=segment_ids,
                                  **options)

  if time_parts() == 1:
    return run(initial_state)
  elapsed = jnp.sum(_select(_last_segment(segment_ids), step_size), axis=1)
  decay = jnp.exp(elapsed[..., None] * jnp.where(a < FASTEST, FASTEST, a)[None])
  entry, final_state = _follow(chunks.decayed, run(None)[1], decay, initial_state, segment_ids)
  return run(entry)[0], final_state


def short_convolution(
    x: Float[Array, "B T C"], kernel: Float[Array, "taps C"], bias: Float[Array, "C"] | None = None, *,
    initial_inputs: Float[Array, "B past C"] | None = None, segment_ids: Int[Array, "B T"] | None = None, **options,
) -> tuple[Float[Array, "B T C"], Float[Array, "B past C"]]:
  """`kernels.short_convolution` on a part, which takes the last taps - 1 inputs and their ids from the part before it.

  Raises ValueError if a part has fewer tokens than that.
  """

  def run(inputs):
    return kernels.short_convolution(x, kernel, bias, initial_inputs=inputs, segment_ids=segment_ids, **options)

  if time_parts() == 1:
    return run(initial_inputs)
  past = kernel.shape[0] - 1
  inputs = before(x, past)
  if segment_ids is not None:
    same = (before(segment_ids, past) == segment_ids[:, :1]).astype(jnp.int32)
    inputs = _select(jax.lax.cummin(same, axis=1, reverse=True) > 0, inputs)
  number = jax.lax.axis_index(TIME_AXIS)
  inputs = jnp.where(number == 0, jnp.zeros_like(inputs) if initial_inputs is None else initial_inputs, inputs)
  y, kept = run(inputs)
  return y, jax.lax.psum(jnp.where(number == time_parts() - 1, kept, 0), TIME_AXIS)


def before(x: Shaped[Array, "B T ..."], count: int) -> Shaped[Array, "B {count} ..."]:
  """The last `count` tokens `[B, count, ...]` of the part before this one, zeros in the first part.

  Raises ValueError if a part has fewer tokens.
  """
  if x.shape[1] < count:
    raise ValueError(f"a part of {x.shape[1]} tokens: must have the {count} tokens that the next part needs, so use a "
                     f"smaller mesh axis {TIME_AXIS}={time_parts()}")
  return jax.lax.ppermute(x[:, x.shape[1] - count:], TIME_AXIS, [(p, p + 1) for p in range(time_parts() - 1)])


def _follow(through: Callable, update, decay, initial_state, segment_ids):
  """The state that enters this part, and the state that leaves the last one, where `through(decay, state)` is D S."""
  if initial_state is None:
    initial_state = jnp.zeros_like(update)
  parts = jax.lax.all_gather(_joined(update, decay), TIME_AXIS)
  width = update.shape[-1]

  def follow(state, part):
    summary, borders = part
    enters, passes = (None, None) if borders is None else borders
    entry = _select(enters, state)
    passed = through(summary[..., width:], _select(passes, entry))
    return passed + summary[..., :width], entry

  final_state, entries = jax.lax.scan(follow, initial_state, (parts, _borders(segment_ids)))
  return jax.lax.dynamic_index_in_dim(entries, jax.lax.axis_index(TIME_AXIS), keepdims=False), final_state


def _borders(segment_ids):
  """Whether a segment goes on into each part, and whether it goes on to its end: two arrays [parts, B]."""
  if segment_ids is None:
    return None
  inside = jnp.any(chunks.segment_starts(segment_ids), axis=1)
  own = jnp.stack([segment_ids[:, 0], segment_ids[:, -1], inside.astype(segment_ids.dtype)])
  first, last, inside = jnp.moveaxis(jax.lax.all_gather(own, TIME_AXIS), 1, 0)
  return jnp.pad(first[1:] == last[:-1], ((1, 0), (0, 0)), constant_values=True), inside == 0


def _runs(segment_ids):
  """Number of segments that started in the part up to each token."""
  return jnp.cumsum(chunks.segment_starts(segment_ids), axis=1, dtype=jnp.int32)


def _last_segment(segment_ids):
  """The tokens of the part's last segment, or None if all are."""
  if segment_ids is None:
    return None
  runs = _runs(segment_ids)
  return runs == runs[:, -1:]


def _sums_after(gates):
  """Sum of the gates after each token. It is no difference of sums, which would cancel beside a strong gate.

  The sums move by one token, not the gates: XLA joins zeros behind a cumulative sum's operand with the sum, which then
  takes a time that is quadratic in the number of tokens on a GPU.
  """
  sums = jax.lax.cumsum(gates, axis=1, reverse=True)
  return jnp.pad(sums[:, 1:], ((0, 0), (0, 1), *((0, 0) for _ in gates.shape[2:])))


def _weighted(weights, x, kept):
  """The tokens of x that are kept, times their weights, in the dtype of x."""
  return (weights * chunks.wide(_select(kept, x))).astype(x.dtype)


def _written(k, v, kept):
  """Sum of k^T v over the tokens that are kept, [B, H, K, V] from key heads [B, T, G, K] and [B, T, H, V]."""
  (B, T, H, V), G = v.shape, k.shape[2]
  k, v = _select(kept, k), _select(kept, v).reshape(B, T, G, H // G, V)
  return chunks.product(v.dtype)("btgk,btgrv->bgrkv", k, v).reshape(B, H, -1, V)


def _joined(first, second):
  return jnp.concatenate([first, second], axis=-1)


def _select(keep, x):
  """x where `keep`, which has leading axes of x or is None for everywhere, and 0 elsewhere."""
  return x if keep is None else jnp.where(keep.reshape(*keep.shape, *(1,) * (x.ndim - keep.ndim)), x, 0)
