"""What every op requires of its inputs: one message for each broken rule, naming the value and the rule."""

import jax.numpy as jnp

from kernels import chunks

DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)


def require(op: str, ok: bool, message: str) -> None:
  """Raises ValueError with `message` under the op's name unless `ok`."""
  if not ok:
    raise ValueError(f"{op}: {message}")


def check(op: str, q, k, v, log_decay, initial_state, segment_ids, chunk_size) -> None:
  """Checks all but the shape of `log_decay`, which differs between ops. Raises ValueError."""

  def rule(ok, message):
    require(op, ok, message)

  rule(q.ndim == 4 and v.ndim == 4, f"q has shape {q.shape} and v {v.shape}; both must be [batch, time, heads, dim]")
  rule(k.shape == q.shape, f"k has shape {k.shape}; it must equal q's {q.shape}")
  rule(v.shape[:2] == q.shape[:2], f"v has shape {v.shape}; batch and time must equal q's {q.shape[:2]}")
  rule(min(q.shape + v.shape) >= 1, f"q has shape {q.shape} and v {v.shape}; every dimension must be at least 1")
  rule(v.shape[2] % q.shape[2] == 0, f"v has {v.shape[2]} heads; they must be a multiple of q's {q.shape[2]}")
  rule(q.dtype == k.dtype == v.dtype, f"q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}; they must be equal")
  for name, x in (("q", q), ("log_decay", log_decay)):
    if x is not None:
      rule(x.dtype in DTYPES, f"{name} has dtype {x.dtype}; it must be bfloat16, float16 or float32")
  if initial_state is not None:
    expected = (v.shape[0], v.shape[2], q.shape[3], v.shape[3])
    rule(initial_state.shape == expected and initial_state.dtype == jnp.float32,
         f"initial_state is {initial_state.dtype}{initial_state.shape}; it must be float32{expected}")
  if segment_ids is not None:
    rule(segment_ids.shape == q.shape[:2] and jnp.issubdtype(segment_ids.dtype, jnp.integer),
         f"segment_ids is {segment_ids.dtype}{segment_ids.shape}; it must be integers of shape {q.shape[:2]}")
  rule(chunk_size is None or chunk_size in chunks.SIZES,
       f"chunk_size={chunk_size!r}; it must be one of {', '.join(map(str, chunks.SIZES))}, or None")
