"""The error measure and the bounds of `kernels.accuracy` as assertions that print or record their numbers."""

import numpy as np

from kernels.accuracy import relative_error, tolerance

__all__ = ["assert_bounds", "assert_close", "assert_uniform", "relative_error", "tolerance"]


def assert_close(name: str, actual, expected, ratio: float) -> None:
  """Fails when the relative error exceeds `ratio`; prints the number either way."""
  error = relative_error(actual, expected)
  print(f"{name}: relative error {error:.1e}, bound {ratio:.0e}")
  assert error <= ratio, f"{name}: relative error {error:.2e} exceeds {ratio:.0e}"


def assert_bounds(label: str, dtype: str, errors: dict[str, float], record_property) -> None:
  """Records the kernels' errors by tensor, and fails when one exceeds its bound for inputs of `dtype`."""
  record_property("errors", errors)
  bad = {name: f"{error:.1e} > {bound:.0e}" for name, error in errors.items()
         if not error <= (bound := tolerance(name, dtype, multi_pass=True))}
  assert not bad, f"{label}: {bad}"


def assert_uniform(name, values, low, high):
  """Fails unless the values spread over the range as a uniform sample does."""
  margin = 1e-4 * (high - low)
  assert values.min() >= low - margin and values.max() <= high + margin, name
  # Mean in the middle, within 5 standard errors, and standard deviation of range / sqrt(12).
  assert abs(values.mean() - (low + high) / 2) < 5 * (high - low) / np.sqrt(12 * len(values)), name
  assert abs(values.std() * np.sqrt(12) / (high - low) - 1) < 0.1, name
