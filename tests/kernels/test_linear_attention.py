"""xla_chunked against the scan over the cases, all forms of decay against each other and gla; bad input."""

import dataclasses
import functools
import math
import re

import jax.numpy as jnp
import numpy as np
import pytest

from kernels import gla, linear_attention
from kernels.linear_attention import step
from tests.close import assert_close, tolerance
from tests.kernels import cases
from tests.kernels.cases import check, make_inputs, per_channel

CHUNKED = functools.partial(linear_attention, implementation="xla_chunked")
Case = functools.partial(cases.Case, decay="token")

SMALL = [
    # One token, a part of a chunk, the edges of a chunk, and many chunks with and without a part of another.
    *(Case(T=T, H=3, K=8, V=16) for T in (1, 15, 63, 64, 65, 500, 2048)),
    *(Case(T=T, H=3, K=8, V=16, decay="constant") for T in (1, 65, 1024)),
    *(Case(T=T, H=3, K=8, V=16, decay="none") for T in (1, 65, 500)),
    *(Case(B=1, T=40, K=K, V=V) for K, V in [(60, 32), (100, 128), (64, 512)]),
    Case(T=40, H=1, gate="near_zero"),
    *(Case(T=40, H=4, key_heads=2, decay=decay) for decay in ("token", "constant", "none")),
    *(Case(T=70, gate=gate) for gate in ("zero", "logit_-20", "logit_-30", "-20", "-30")),
    *(Case(T=70, gate=gate, decay="constant") for gate in ("zero", "near_zero", "logit_-30", "-20", "-30")),
    *(Case(T=40, initial_state=False, decay=decay) for decay in ("token", "constant")),
    *(Case(T=sum(cases.PACKED), K=8, V=8, segments=cases.PACKED, decay=decay) for decay in ("token", "none")),
    Case(T=70, segments=(1,) * 70),
    *(Case(T=70, gate="-20", segments=(1, 30, 1, 1, 32, 4, 1), decay=decay) for decay in ("token", "constant")),
    *(Case(T=T, chunk_size=C) for T, C in ((40, 16), (70, 32), (70, 128))),
    Case(T=40, chunk_size=16, decay="constant"),
    *(Case(T=100, K=32, V=64, dtype="bfloat16", decay=decay) for decay in ("token", "constant", "none")),
    Case(T=100, K=32, V=64, dtype="float16"),
    Case(T=sum(cases.PACKED), K=16, V=16, dtype="bfloat16", gate="near_zero", segments=cases.PACKED),
    *(Case(T=70, dtype="bfloat16", gate="-20", decay=decay) for decay in ("token", "constant")),
]


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_chunked_equals_scan(case):
  check(case, CHUNKED)


@pytest.mark.parametrize("decay", ["token", "constant", "none"])
def test_reference_behind_the_contract_equals_scan(decay):
  case = Case(T=9, K=4, V=6, H=4, key_heads=2, decay=decay)
  reference = functools.partial(linear_attention, implementation="reference")
  check(case, reference)
  check(dataclasses.replace(case, segments=(2, 1, 6)), reference)


@pytest.mark.parametrize("decay", ["token", "constant", "none"])
def test_steps_equal_one_call(decay):
  """`step` token by token, as in decoding."""
  x = make_inputs(Case(T=7, K=4, V=6, decay=decay)).arrays
  state, outputs, log_decay = x["initial_state"], [], x["log_decay"]
  for t in range(7):
    now = log_decay[:, t] if decay == "token" else log_decay
    state, output = step(state, *(x[name][:, t] for name in "qkv"), now)
    outputs.append(output)
  output, final_state = CHUNKED(**x, scale=1.0)
  assert_close("output", output, jnp.stack(outputs, axis=1), tolerance("output", "float32"))
  assert_close("final_state", final_state, state, tolerance("final_state", "float32"))


@pytest.mark.parametrize("implementation", ["reference", "xla_chunked"])
@pytest.mark.parametrize("decay", ["token", "constant"])
def test_closed_form(implementation, decay):
  """o_t = scale * (sum_{j<=t} exp(b_t - b_j) (q_t . k_j) v_j + exp(b_t) q_t S_0), b = cumsum(g), in float64."""
  inputs = make_inputs(Case(B=1, T=37, H=2, K=5, V=3, decay=decay)).arrays
  q, k, v, g, state = (np.asarray(inputs[n], np.float64) for n in ("q", "k", "v", "log_decay", "initial_state"))
  b = np.cumsum(np.broadcast_to(g, (1, 37, 2)), axis=1)
  decays = np.exp(b[:, :, None] - b[:, None]) * np.tril(np.ones((37, 37)))[None, :, :, None]
  output = np.einsum("bthk,bjhk,btjh,bjhv->bthv", q, k, decays, v)
  output += np.einsum("bthk,bth,bhkv->bthv", q, np.exp(b), state)
  final = np.einsum("bjhk,bjh,bjhv->bhkv", k, decays[:, -1], v) + np.exp(b[:, -1])[..., None, None] * state
  actual, actual_final = linear_attention(**inputs, scale=0.5, implementation=implementation)
  assert_close("output", actual, 0.5 * output, tolerance("output", "float32"))
  assert_close("final_state", actual_final, final, tolerance("final_state", "float32"))


def test_no_decay_is_plain_linear_attention():
  inputs = make_inputs(Case(T=75, K=16, V=24, decay="none", initial_state=False)).arrays
  q, k, v = (np.asarray(inputs[name], np.float64) for name in "qkv")
  scores = np.einsum("bihk,bjhk->bhij", q, k) * np.tril(np.ones((75, 75)))
  output, state = CHUNKED(**inputs)
  assert_close("output", output, 16**-0.5 * np.einsum("bhij,bjhv->bihv", scores, v), tolerance("output", "float32"))
  assert_close("final_state", state, np.einsum("bthk,bthv->bhkv", k, v), tolerance("final_state", "float32"))


def by_name(fn, inputs):
  return cases.results(fn, inputs.arrays, inputs.segment_ids, inputs.cotangents)


def assert_equal_results(actual, expected):
  for name, x in expected.items():
    assert_close(name, actual[name], x, tolerance(name, "float32"))


@pytest.mark.parametrize("decay", ["token", "constant", "none"])
def test_equals_gla_with_channels_that_share_the_decay(decay):
  inputs = make_inputs(Case(T=40, K=8, V=12, decay=decay, segments=(15, 1, 24)))

  def shared(q, k, v, log_decay, **options):
    return gla(q, k, v, per_channel(log_decay, q.shape), implementation="xla_chunked", **options)

  assert_equal_results(by_name(CHUNKED, inputs), by_name(shared, inputs))


def test_constant_decay_equals_the_same_gate_at_every_token():
  inputs = make_inputs(Case(T=120, K=8, V=12, decay="constant"))

  def by_token(q, k, v, log_decay, **options):
    return CHUNKED(q, k, v, jnp.broadcast_to(log_decay, v.shape[:3]), **options)

  assert_equal_results(by_name(CHUNKED, inputs), by_name(by_token, inputs))


@pytest.mark.parametrize("decay", ["token", "constant", "none"])
def test_only_a_decay_per_token_has_numbers_per_token(decay):
  """Some array of forward and backward has one number per token and head exactly when the decay has."""
  inputs = make_inputs(Case(B=2, T=192, H=3, K=8, V=16, decay=decay))
  program = str(cases.results.trace(CHUNKED, inputs.arrays, None, inputs.cotangents, chunk_size=64).jaxpr)
  sizes = {math.prod(map(int, shape.split(","))) for shape in re.findall(r"f32\[([\d,]+)\]", program)}
  assert 2 * 192 * 3 * 8 in sizes
  assert (2 * 192 * 3 in sizes) == (decay == "token")


@pytest.mark.parametrize("decay", ["token", "constant"])
def test_packed_documents_equal_documents_one_by_one(decay):
  lengths = 15, 85, 30
  case = Case(B=1, T=sum(lengths), K=8, V=8, segments=lengths, decay=decay)
  inputs = make_inputs(case)
  state = inputs.arrays["initial_state"]
  packed, start, dlog_decay = by_name(CHUNKED, inputs), 0, 0.0
  for n, length in enumerate(lengths):
    rows = slice(start, start := start + length)
    # Only the first document reads the initial state, and only the last one writes the final state.
    arrays = {name: x[:, rows] if x is not None and x.ndim > 1 else x for name, x in inputs.arrays.items()}
    arrays["initial_state"] = state if n == 0 else jnp.zeros_like(state)
    last = n == len(lengths) - 1
    dstate = inputs.cotangents[1] if last else jnp.zeros_like(state)
    alone = cases.results(CHUNKED, arrays, None, (inputs.cotangents[0][:, rows], dstate))
    compared = {name: packed[name][:, rows] for name in ("output", "dq", "dk", "dv")}
    compared |= {"dinitial_state": packed["dinitial_state"]} if n == 0 else {}
    compared |= {"final_state": packed["final_state"]} if last else {}
    if decay == "token":
      compared["dlog_decay"] = packed["dlog_decay"][:, rows]
      # The gate of a later document's first token acts on nothing: on a zero state, or on one that is reset.
      assert n == 0 or not np.any(compared["dlog_decay"][:, 0])
    else:
      # Most of the documents' parts cancels in their sum, and with it the digits that float32 leaves them.
      exact = cases.expected(cases.Inputs(arrays, None, (inputs.cotangents[0][:, rows], dstate)))
      dlog_decay += np.asarray(exact["dlog_decay"])
    for name, x in compared.items():
      assert_close(name, x, alone[name], tolerance(name, "float32"))
  if decay == "constant":
    assert_close("dlog_decay", packed["dlog_decay"], dlog_decay, tolerance("dlog_decay", "float32"))


BAD = {
    "shape of q": (dict(q=(2, 8, 4)), r"q has shape \(2, 8, 4\).*\[batch, time, heads, dim\]"),
    "shape of k": (dict(k=(2, 8, 2, 5)), r"k has shape \(2, 8, 2, 5\); it must equal q's \(2, 8, 2, 4\)"),
    "gate a channel": (dict(log_decay=(2, 8, 2, 4)), r"log_decay has shape \(2, 8, 2, 4\); it must be \[heads\] \(4,\) "
                                                     r"or \[batch, time, heads\] \(2, 8, 4\), or None"),
    "gates of key heads": (dict(log_decay=(2, 8, 2)), r"log_decay has shape \(2, 8, 2\); it must be \[heads\] \(4,\)"),
    "constants of key heads": (dict(log_decay=(2,)), r"log_decay has shape \(2,\); it must be \[heads\] \(4,\)"),
    "time of v": (dict(v=(2, 9, 4, 6)), r"v has shape \(2, 9, 4, 6\); batch and time must equal q's \(2, 8\)"),
    "no tokens": (dict(q=(2, 0, 2, 4), k=(2, 0, 2, 4), log_decay=(2, 0, 4), v=(2, 0, 4, 6)), "at least 1"),
    "heads": (dict(v=(2, 8, 3, 6)), "v has 3 heads; they must be a multiple of q's 2"),
    "state": (dict(initial_state=(2, 4, 6, 4)),
              r"initial_state is float32\(2, 4, 6, 4\); it must be float32\(2, 4, 4, 6\)"),
    "segments": (dict(segment_ids=(2, 8)), r"segment_ids is float32\(2, 8\); it must be integers of shape \(2, 8\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_shapes_are_named(name, unchecked_arrays):
  shapes = dict(q=(2, 8, 2, 4), k=(2, 8, 2, 4), v=(2, 8, 4, 6), log_decay=(2, 8, 4))
  changed, message = BAD[name]
  with pytest.raises(ValueError, match=f"linear_attention: .*{message}"):
    linear_attention(**{key: jnp.zeros(shape) for key, shape in (shapes | changed).items()})


def test_bad_dtypes_and_values_are_named(unchecked_arrays):
  x, g = jnp.zeros((1, 8, 2, 4)), jnp.zeros(2)
  half = x.astype(jnp.bfloat16)
  with pytest.raises(ValueError, match="q, k, v have dtypes float32, bfloat16, float32; they must be equal"):
    linear_attention(x, half, x)
  with pytest.raises(ValueError, match="q has dtype int32; it must be bfloat16, float16 or float32"):
    linear_attention(*[x.astype(jnp.int32)] * 3)
  with pytest.raises(ValueError, match="log_decay has dtype int32"):
    linear_attention(x, x, x, g.astype(jnp.int32))
  with pytest.raises(ValueError, match="initial_state is bfloat16"):
    linear_attention(x, x, x, g, initial_state=jnp.zeros((1, 2, 4, 4), jnp.bfloat16))
  for size in (0, 8, 48, 256):
    with pytest.raises(ValueError, match=f"chunk_size={size}; it must be one of 16, 32, 64, 128, or None"):
      linear_attention(x, x, x, g, chunk_size=size)
  with pytest.raises(ValueError, match="'pallas' is unknown; known: pallas_triton, xla_chunked, reference"):
    linear_attention(x, x, x, g, implementation="pallas")
