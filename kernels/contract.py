"""The rules that every op has for its inputs. The message about a broken rule names the value and the rule."""

import math
import operator

import jax
import jax.numpy as jnp
import numpy as np

from kernels import chunks

DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)


def require(op: str, ok: bool, message: str) -> None:
  """Raises ValueError with `message` under the op's name unless `ok`."""
  if not ok:
    raise ValueError(f"{op}: {message}")


def require_arrays(op: str, optional=("log_decay", "initial_state", "segment_ids"), **arrays) -> None:
  """Raises ValueError unless each argument is an array, or None where it is optional."""
  for name, x in arrays.items():
    missing = " or None" if name in optional else ""
    require(op, hasattr(x, "shape") and hasattr(x, "dtype") or (x is None and missing),
            f"{name} is a {type(x).__name__}; it must be an array{missing}")


def chunk_size_of(op: str, chunk_size) -> int | None:
  """`chunk_size` as a static Python integer, or None. Raises ValueError."""
  if chunk_size is None:
    return None
  try:
    size = None if isinstance(chunk_size, bool | np.bool_) else operator.index(chunk_size)
  except TypeError:  # traced, or no integer
    size = None
  require(op, size in chunks.SIZES,
          f"chunk_size={chunk_size!r}; it must be one of {', '.join(map(str, chunks.SIZES))}, or None")
  return size


def scale_of(op: str, scale, K: int) -> tuple[float, jax.Array | None]:
  """The number that implementations get as their scale, and the factor that their output then lacks, or None.

  A number is static: kernels are compiled with it. An array, which may be traced and differentiated, multiplies the
  output of the default scale. Raises ValueError.
  """
  if scale is None:
    return K**-0.5, None
  rule = "it must be a finite number, an array of no dimensions, or None"
  if isinstance(scale, jax.Array):
    real = jnp.issubdtype(scale.dtype, jnp.floating) or jnp.issubdtype(scale.dtype, jnp.integer)
    require(op, scale.shape == () and real, f"scale is {scale.dtype}{scale.shape}; {rule}")
    return K**-0.5, scale.astype(jnp.float32) * K**0.5
  # numpy gives bfloat16 the kind V.
  number = float(scale) if np.ndim(scale) == 0 and np.asarray(scale).dtype.kind in "iufV" else math.nan
  require(op, abs(number) <= float(jnp.finfo(jnp.float32).max), f"scale={scale!r}; {rule}")
  return number, None


def scaled(output, factor):
  """`output` times a factor of `scale_of`, in the dtype of `output`."""
  return output if factor is None else (output.astype(jnp.float32) * factor).astype(output.dtype)


def check(op: str, q, k, v, log_decay, initial_state, segment_ids) -> None:
  """Checks all but the shape of `log_decay`, which differs between ops. Raises ValueError."""

  def rule(ok, message):
    require(op, ok, message)

  require_arrays(op, q=q, k=k, v=v, log_decay=log_decay, initial_state=initial_state, segment_ids=segment_ids)
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
