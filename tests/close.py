"""`assert_close`: the error measure and the bounds of `kernels.accuracy` as an assertion that prints its number."""

from kernels.accuracy import relative_error, tolerance

__all__ = ["assert_close", "relative_error", "tolerance"]


def assert_close(name: str, actual, expected, ratio: float) -> None:
  """Fails when the relative error exceeds `ratio`; prints the number either way."""
  error = relative_error(actual, expected)
  print(f"{name}: relative error {error:.1e}, bound {ratio:.0e}")
  assert error <= ratio, f"{name}: relative error {error:.2e} exceeds {ratio:.0e}"
