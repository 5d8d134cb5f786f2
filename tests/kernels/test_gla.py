"""xla_chunked against the scan over the cases, both against formulas that share no code; bad input."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from kernels import gla
from tests.close import assert_close, tolerance
from tests.kernels import cases
from tests.kernels.cases import Case, check, make_inputs

CHUNKED = functools.partial(gla, implementation="xla_chunked")

# One token, a part of a chunk, the edges of several, and many chunks with and without a part of another.
TIMES = (1, 15, 63, 64, 65, 500, 2048)
SMALL = [
    *(Case(T=T, H=3, K=8, V=16) for T in TIMES),
    *(Case(B=1, T=40, K=K, V=V) for K, V in [(60, 32), (100, 128), (256, 256), (64, 512)]),
    Case(T=70, H=1, gate="near_zero"),
    Case(T=70, H=4, key_heads=2),
    *(Case(T=70, gate=gate) for gate in ("zero", "logit_-20", "logit_-30", "-20", "-30")),
    Case(T=70, initial_state=False),
    Case(T=sum(cases.PACKED), K=8, V=8, segments=cases.PACKED),
    Case(T=70, segments=(1,) * 70),
    Case(T=70, gate="-20", segments=(1, 30, 1, 1, 32, 4, 1)),
    *(Case(T=150, chunk_size=C) for C in (16, 64, 128)),
    *(Case(T=100, K=32, V=64, dtype=dtype) for dtype in ("bfloat16", "float16")),
    Case(T=sum(cases.PACKED), K=16, V=16, dtype="bfloat16", gate="near_zero", segments=cases.PACKED),
    Case(T=70, dtype="bfloat16", gate="-20"),
]


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_chunked_equals_scan(case):
  check(case, CHUNKED)


def test_reference_behind_the_contract_equals_scan():
  case = Case(T=9, K=4, V=6, H=4, key_heads=2, segments=(2, 1, 6))
  check(case, functools.partial(gla, implementation="reference"))


@pytest.mark.parametrize("implementation", ["reference", "xla_chunked"])
def test_closed_form(implementation):
  """o_t = scale * (sum_{j<=t} (q_t * exp(b_t - b_j) . k_j) v_j + (q_t * exp(b_t)) S_0), b = cumsum(g), in float64."""
  inputs = make_inputs(Case(B=1, T=37, H=2, K=5, V=3)).arrays
  q, k, v, g, state = (np.asarray(inputs[n], np.float64) for n in ("q", "k", "v", "log_decay", "initial_state"))
  b = np.cumsum(g, axis=1)
  causal = np.tril(np.ones((37, 37)))
  decay = np.exp(b[:, :, None] - b[:, None]) * causal[None, :, :, None, None]
  output = np.einsum("bthk,bjhk,btjhk,bjhv->bthv", q, k, decay, v) + np.einsum("bthk,bhkv->bthv", q * np.exp(b), state)
  final = np.einsum("bjhk,bjhk,bjhv->bhkv", k, decay[:, -1], v) + np.exp(b[:, -1])[..., None] * state
  actual, actual_final = gla(**inputs, scale=0.5, implementation=implementation)
  assert_close("output", actual, 0.5 * output, tolerance("output", "float32"))
  assert_close("final_state", actual_final, final, tolerance("final_state", "float32"))


def test_no_decay_is_plain_linear_attention():
  inputs = make_inputs(Case(T=75, K=16, V=24, gate="zero", initial_state=False)).arrays
  q, k, v = (np.asarray(inputs[name], np.float64) for name in "qkv")
  scores = np.einsum("bihk,bjhk->bhij", q, k) * np.tril(np.ones((75, 75)))
  output, state = CHUNKED(**inputs)
  assert_close("output", output, 16**-0.5 * np.einsum("bhij,bjhv->bihv", scores, v), tolerance("output", "float32"))
  assert_close("final_state", state, np.einsum("bthk,bthv->bhkv", k, v), tolerance("final_state", "float32"))


def test_packed_documents_equal_documents_one_by_one():
  case = Case(B=1, T=sum(cases.PACKED), K=8, V=8, segments=cases.PACKED)
  inputs = make_inputs(case)
  state = inputs.arrays["initial_state"]
  packed = cases.results(CHUNKED, inputs.arrays, inputs.segment_ids, inputs.cotangents)
  start = 0
  for n, length in enumerate(cases.PACKED):
    rows = slice(start, start := start + length)
    # Only the first document reads the initial state, and only the last one writes the final state.
    arrays = {name: x[:, rows] for name, x in inputs.arrays.items() if x is not state}
    arrays["initial_state"] = state if n == 0 else jnp.zeros_like(state)
    last = n == len(cases.PACKED) - 1
    dstate = inputs.cotangents[1] if last else jnp.zeros_like(state)
    alone = cases.results(CHUNKED, arrays, None, (inputs.cotangents[0][:, rows], dstate))
    compared = {name: packed[name][:, rows] for name in ("output", "dq", "dk", "dv", "dlog_decay")}
    compared |= {"dinitial_state": packed["dinitial_state"]} if n == 0 else {}
    compared |= {"final_state": packed["final_state"]} if last else {}
    # The gate of a later document's first token acts on nothing: on a zero state, or on one that is reset.
    assert n == 0 or not np.any(compared["dlog_decay"][:, 0])
    for name, x in compared.items():
      assert_close(name, x, alone[name], tolerance(name, "float32"))


BAD = {
    "shape of q": (dict(q=(2, 8, 4)), r"q has shape \(2, 8, 4\).*\[batch, time, heads, dim\]"),
    "shape of k": (dict(k=(2, 8, 2, 5)), r"k has shape \(2, 8, 2, 5\); it must equal q's \(2, 8, 2, 4\)"),
    "shape of log_decay": (dict(log_decay=(2, 8, 2)), r"log_decay has shape \(2, 8, 2\); it must equal q's"),
    "time of v": (dict(v=(2, 9, 2, 6)), r"v has shape \(2, 9, 2, 6\); batch and time must equal q's \(2, 8\)"),
    "no tokens": (dict(q=(2, 0, 2, 4), k=(2, 0, 2, 4), log_decay=(2, 0, 2, 4), v=(2, 0, 2, 6)), "at least 1"),
    "heads": (dict(v=(2, 8, 3, 6)), "v has 3 heads; they must be a multiple of q's 2"),
    "state": (dict(initial_state=(2, 2, 6, 4)),
              r"initial_state is float32\(2, 2, 6, 4\); it must be float32\(2, 2, 4, 6\)"),
    "segments": (dict(segment_ids=(2, 8)), r"segment_ids is float32\(2, 8\); it must be integers of shape \(2, 8\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_shapes_are_named(name, unchecked_arrays):
  shapes = dict(q=(2, 8, 2, 4), k=(2, 8, 2, 4), v=(2, 8, 2, 6), log_decay=(2, 8, 2, 4))
  changed, message = BAD[name]
  with pytest.raises(ValueError, match=message):
    gla(**{key: jnp.zeros(shape) for key, shape in (shapes | changed).items()})


def test_bad_dtypes_and_values_are_named(unchecked_arrays):
  x = jnp.zeros((1, 8, 2, 4))
  half = x.astype(jnp.bfloat16)
  with pytest.raises(ValueError, match="q, k, v have dtypes float32, bfloat16, float32; they must be equal"):
    gla(x, half, x, x)
  with pytest.raises(ValueError, match="q has dtype int32; it must be bfloat16, float16 or float32"):
    gla(*[x.astype(jnp.int32)] * 3, x)
  with pytest.raises(ValueError, match="log_decay has dtype int32"):
    gla(x, x, x, x.astype(jnp.int32))
  with pytest.raises(ValueError, match="initial_state is bfloat16"):
    gla(x, x, x, x, initial_state=jnp.zeros((1, 2, 4, 4), jnp.bfloat16))
  for size in (0, 8, 48, 256):
    with pytest.raises(ValueError, match=f"chunk_size={size}; it must be one of 16, 32, 64, 128, or None"):
      gla(x, x, x, x, chunk_size=size)
