"""The error measure, and the one table of bounds that every implementation of an op keeps.

The bounds hold for the RMS over many rows, where a row is one token of one head: at least 64 rows for 16-bit inputs. An
entry of the output is a sum over channels, and where that sum cancels, the rounding of its terms stands out. At
K = V = 32 the kernels of gla exceed 5e-3 in a quarter of random draws of one row, in a twentieth of the draws of 4
rows, and in none of 80 draws of 16 or 64 rows. `ENTRY` bounds each single entry. Gradients with one number per row,
dbeta and dlog_decay, are such sums too.
"""

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
    "multi-pass": dict.fromkeys(_TENSORS, 1e-4),  # float32 operands, each product several of fewer bits
}
# Error of one entry of a 16-bit output, over the sum of the magnitudes of its terms. The terms are scale |q| (decay)
# |k| |v| and scale |q| (decay) |state|. In the delta rule, the values that it writes take the place of v. bfloat16
# rounds by at most 2^-9. A term has up to four roundings (the weighted query and key, their product, the output), and
# the rest is second order.
ENTRY = 1e-2


def tolerance(name: str, dtype, *, multi_pass: bool = False) -> float:
  """Bound for the tensor `name` of an op on inputs of `dtype`.

  `multi_pass` is for kernels that multiply float32 operands in several passes of fewer bits.
  """
  precision = "16-bit" if jnp.dtype(dtype).itemsize == 2 else "multi-pass" if multi_pass else "float32"
  return BOUNDS[precision][name]


def relative_error(actual, expected) -> float:
  """RMS of the difference over the RMS of `expected`; infinite for a shape, a NaN, or noise where zero is expected."""
  actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
  if actual.shape != expected.shape or not np.isfinite(actual).all():
    return np.inf
  error, size = (np.sqrt(np.mean(np.square(x))) for x in (actual - expected, expected))
  return 0.0 if error == 0 else np.inf if size == 0 else float(error / size)
