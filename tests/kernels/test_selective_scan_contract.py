"""Arrays that the selective scan refuses, and inputs that its kernels decline."""

import jax.numpy as jnp
import pytest

from kernels import selective_scan
from tests.kernels.selective_scan_cases import PALLAS, Case, make_inputs

BAD = {
    "rank of x": (dict(x=(2, 8)), r"x has shape \(2, 8\); it must be \[batch, time, channels\]"),
    "no tokens": (dict(x=(2, 0, 4)), r"x has shape \(2, 0, 4\).*none of them 0"),
    "step_size": (dict(step_size=(2, 8, 1)), r"step_size has shape \(2, 8, 1\); it must equal x's \(2, 8, 4\)"),
    "a": (dict(a=(5, 3)), r"a has shape \(5, 3\); it must be \[channels, state\], with x's 4 channels"),
    "b": (dict(b=(2, 8, 4)), r"b has shape \(2, 8, 4\); it must be \[batch, time, state\] \(2, 8, 3\)"),
    "c": (dict(c=(2, 7, 3)), r"c has shape \(2, 7, 3\); it must be \[batch, time, state\] \(2, 8, 3\)"),
    "state": (dict(initial_state=(2, 3, 4)),
              r"initial_state is float32\(2, 3, 4\); it must be float32\(2, 4, 3\)"),
    "segments": (dict(segment_ids=(2, 8)), r"segment_ids is float32\(2, 8\); it must be integers of shape \(2, 8\)"),
}
SHAPES = dict(x=(2, 8, 4), step_size=(2, 8, 4), a=(4, 3), b=(2, 8, 3), c=(2, 8, 3))


@pytest.mark.parametrize("name", BAD)
def test_bad_shapes_are_named(name, unchecked_arrays):
  changed, message = BAD[name]
  with pytest.raises(ValueError, match=f"selective_scan: .*{message}"):
    selective_scan(**{key: jnp.zeros(shape) for key, shape in (SHAPES | changed).items()})


@pytest.mark.parametrize("changed, message", [
    (dict(x="int32"), "x has dtype int32; it must be bfloat16, float16 or float32"),
    (dict(b="bfloat16"), "x, b, c have dtypes float32, bfloat16, float32; they must be equal"),
    (dict(step_size="bfloat16"), "step_size has dtype bfloat16; it must be float32"),
    (dict(a="bfloat16"), "a has dtype bfloat16; it must be float32"),
], ids=str)
def test_bad_dtypes_are_named(changed, message, unchecked_arrays):
  arrays = {name: jnp.zeros(shape, changed.get(name, "float32")) for name, shape in SHAPES.items()}
  with pytest.raises(ValueError, match=message):
    selective_scan(**arrays)


def test_pallas_declines():
  arrays, _, _ = make_inputs(Case(T=4, N=33))
  with pytest.raises(NotImplementedError, match="'pallas_triton' declines these inputs: a state of 33 is more than 32"):
    PALLAS(**arrays)
