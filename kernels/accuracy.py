"""How close is close: the error measure, and the one table of bounds that every implementation of an op keeps."""

import jax.numpy as jnp
import numpy as np

_TENSORS = ("output", "final_state", "dq", "dk", "dv", "dinitial_state", "dlog_decay", "dbeta",
            "dx", "dstep_size", "da", "db", "dc")
# Relative RMS error against the float32 scan on the same (rounded) inputs, by precision and tensor.
BOUNDS = {
    "16-bit": {"output": 5e-3, "final_state": 5e-3, "dq": 8e-3, "dk": 8e-3, "dv": 8e-3, "dinitial_state": 8e-3,
               "dlog_decay": 2e-2, "dbeta": 2e-2,
               "dx": 8e-3, "db": 8e-3, "dc": 8e-3, "dstep_size": 2e-2, "da": 2e-2},
    "float32": dict.fromkeys(_TENSORS, 1e-5),
    "split": dict.fromkeys(_TENSORS, 1e-4),  # float32 operands multiplied in several products of fewer bits
}


def tolerance(name: str, dtype, *, split: bool = False) -> float:
  """Bound for the tensor `name` of an op on inputs of `dtype`; `split` for kernels with split-precision products."""
  precision = "16-bit" if jnp.dtype(dtype).itemsize == 2 else "split" if split else "float32"
  return BOUNDS[precision][name]


def relative_error(actual, expected) -> float:
  """RMS of the difference over the RMS of `expected`; infinite for a shape, a NaN, or noise where zero is expected."""
  actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
  if actual.shape != expected.shape or not np.isfinite(actual).all():
    return np.inf
  error, size = (np.sqrt(np.mean(np.square(x))) for x in (actual - expected, expected))
  return 0.0 if error == 0 else np.inf if size == 0 else float(error / size)
