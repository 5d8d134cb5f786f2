"""The error measure and the bounds of `kernels.accuracy` as assertions that print or record their numbers."""

from kernels.accuracy import relative_error, tolerance

__all__ = ["assert_bounds", "assert_close", "relative_error", "tolerance"]


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
