"""xla_chunked against the scan over the cases, closed forms of the rule, the triangular inverse; bad input."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import chunks, delta_rule, linear_attention
from kernels.delta_rule import step
from kernels.delta_rule.pallas_triton_norms import launch_through_norm
from tests.close import assert_close, tolerance
from tests.kernels import cases
from tests.kernels.cases import check, make_inputs

CHUNKED = functools.partial(delta_rule, implementation="xla_chunked")
Case = functools.partial(cases.Case, decay="token", beta="double")
# One shape, so that cases which differ in values alone compile once.
SHAPE = dict(T=70, K=8, V=16)

SMALL = [
    *(Case(T=T, K=8, V=16) for T in (1, 64, 65, 2048)),
    *(Case(T=T, K=8, V=16, decay="none") for T in (63, 500)),
    *(Case(B=1, T=40, K=K, V=V) for K, V in [(60, 32), (64, 512)]),
    Case(B=1, T=40, K=100, V=128, decay="none"),
    Case(T=40, H=1, initial_state=False, decay="none"),
    *(Case(gate=gate, **SHAPE) for gate in cases.GATES),
    *cases.delta_rules(**SHAPE, decay="token"),
    *cases.delta_rules(**SHAPE, decay="none", dtype="bfloat16"),
    Case(T=sum(cases.PACKED), K=8, V=8, segments=cases.PACKED),
    Case(T=sum(cases.PACKED), K=8, V=8, segments=cases.PACKED, decay="none", dtype="bfloat16"),
    Case(**SHAPE, segments=(1,) * 70),
    Case(**SHAPE, gate="-20", segments=(1, 30, 1, 1, 32, 4, 1)),
    Case(T=40, H=4, key_heads=2, chunk_size=16),
    Case(T=100, H=4, key_heads=2, chunk_size=32, decay="none"),
    Case(T=200, K=32, V=64, chunk_size=128, dtype="float16"),
    *(Case(**SHAPE, dtype="bfloat16", gate=gate, keys=keys)
      for gate in ("near_zero", "mixed", "-20") for keys in ("correlated", "near_parallel")),
]
# A decay per key channel has factors of its own, but lengths, widths and packing are handled as for the other forms. So
# it leaves out what would compile another program for them alone.
SHARED = [Case(T=T, K=8, V=16) for T in (63, 64, 500)] + [
    Case(B=1, T=40, K=64, V=512), Case(B=1, T=40, K=100, V=128), Case(T=100, H=4, key_heads=2, chunk_size=32),
    Case(T=sum(cases.PACKED), K=8, V=8, segments=cases.PACKED, dtype="bfloat16")]
SMALL += [dataclasses.replace(case, decay="channel") for case in SMALL
          if dataclasses.replace(case, decay="token") not in SHARED]
FORMS = "channel", "token", "none"


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_chunked_equals_scan(case):
  check(case, CHUNKED)


@pytest.mark.parametrize("options", [dict(decay="none"), dict(decay="none", segments=(2, 1, 6)),
                                     dict(decay="token", segments=(2, 1, 6), normalize_qk=True),
                                     dict(decay="channel", segments=(2, 1, 6), normalize_qk=True)], ids=str)
def test_reference_behind_the_contract_equals_scan(options):
  reference = functools.partial(delta_rule, implementation="reference")
  check(Case(T=9, K=4, V=6, H=4, key_heads=2, **options), reference)


@pytest.mark.parametrize("decay", FORMS)
@pytest.mark.parametrize("normalize_qk", [False, True])
def test_steps_equal_one_call(decay, normalize_qk):
  """`step` token by token, as in decoding."""
  x = make_inputs(Case(T=7, K=4, V=6, decay=decay, normalize_qk=normalize_qk)).arrays
  state, outputs = x["initial_state"], []
  for t in range(7):
    now = {name: None if x[name] is None else x[name][:, t] for name in ("q", "k", "v", "beta", "log_decay")}
    state, output = step(state, **now, normalize_qk=normalize_qk)
    outputs.append(output)
  output, final_state = CHUNKED(**x, scale=1.0, normalize_qk=normalize_qk)
  assert_close("output", output, jnp.stack(outputs, axis=1), tolerance("output", "float32"))
  assert_close("final_state", final_state, state, tolerance("final_state", "float32"))


@pytest.mark.parametrize("decay", ["channel", "token"])
@pytest.mark.parametrize("implementation", ["reference", "xla_chunked"])
def test_fully_parallel_form(implementation, decay):
  """One triangular system over the whole sequence (arXiv:2406.06484, section 3), in float64."""
  inputs = make_inputs(Case(B=1, T=37, H=2, K=5, V=3, decay=decay)).arrays
  names = "q", "k", "v", "beta", "log_decay"
  q, k, v, beta, g = (np.moveaxis(np.asarray(inputs[name], np.float64), 2, 1) for name in names)
  state, beta = np.asarray(inputs["initial_state"], np.float64), beta[..., None]
  upto = np.cumsum(g.reshape(1, 2, 37, -1), axis=2)  # [..., K or 1]
  decays = np.exp(np.minimum(upto[:, :, :, None] - upto[:, :, None], 0)) * np.tril(np.ones((37, 37)))[..., None]
  pairs = lambda x, y: np.sum(decays * x[:, :, :, None] * y[:, :, None], axis=-1)
  system = np.eye(37) + np.tril(beta * pairs(k, k), -1)
  writes = np.linalg.solve(system, beta * (v - (np.exp(upto) * k) @ state))
  output = pairs(q, k) @ writes + (np.exp(upto) * q) @ state
  final = np.exp(upto[:, :, -1, :, None]) * state + (decays[:, :, -1] * k).mT @ writes
  actual, actual_final = delta_rule(**inputs, scale=0.5, implementation=implementation)
  assert_close("output", actual, 0.5 * np.moveaxis(output, 1, 2), tolerance("output", "float32"))
  assert_close("final_state", actual_final, final, tolerance("final_state", "float32"))


def run(decay="none", **changes):
  """The op on standard inputs with some of them changed."""
  arrays = make_inputs(Case(B=1, T=70, H=2, K=16, V=8, decay=decay)).arrays
  changes = {name: change(arrays) if callable(change) else change for name, change in changes.items()}
  return arrays | changes, *CHUNKED(**arrays | changes, scale=1.0)


def test_beta_0_keeps_the_state():
  arrays, output, state = run(beta=lambda x: jnp.zeros_like(x["beta"]))
  np.testing.assert_array_equal(state, arrays["initial_state"])
  assert_close("output", output, np.einsum("bthk,bhkv->bthv", arrays["q"], state), tolerance("output", "float32"))


@pytest.mark.parametrize("decay", FORMS)
def test_beta_1_stores_the_value(decay):
  """The key just written reads its value, whatever the state held before and however often it was written."""
  arrays, output, _ = run(decay, beta=lambda x: jnp.ones_like(x["beta"]), q=lambda x: x["k"])
  assert_close("output", output, arrays["v"], tolerance("output", "float32"))
  arrays, output, state = run(decay, beta=lambda x: jnp.ones_like(x["beta"]),
                              k=lambda x: jnp.broadcast_to(x["k"][:, :1], x["k"].shape))
  stored = jnp.einsum("bhk,bhkv->bhv", arrays["k"][:, 0], state)
  assert_close("final_state", stored, arrays["v"][:, -1], tolerance("final_state", "float32"))


def test_beta_2_reflects_the_state():
  """Without values each token turns the state's sign along its key and keeps its norm."""
  arrays, _, state = run(beta=lambda x: jnp.full_like(x["beta"], 2.0), v=lambda x: jnp.zeros_like(x["v"]))
  expected = np.asarray(arrays["initial_state"], np.float64)
  for t in range(70):
    k = np.asarray(arrays["k"][:, t], np.float64)
    expected = expected - 2 * k[..., None] * np.einsum("bhk,bhkv->bhv", k, expected)[..., None, :]
  assert_close("final_state", state, expected, tolerance("final_state", "float32"))
  norms = (np.linalg.norm(x, axis=-2) for x in (state, arrays["initial_state"]))
  np.testing.assert_allclose(*norms, rtol=1e-5)


def test_orthogonal_keys_are_linear_attention_of_scaled_values():
  """Where no key reads another's value, nothing is overwritten."""
  k = jnp.broadcast_to(jnp.eye(16)[None, :, None], (1, 16, 2, 16))
  arrays = make_inputs(Case(B=1, T=16, H=2, K=16, V=8, initial_state=False)).arrays | {"k": k}
  output, state = CHUNKED(**arrays)
  beta, v = arrays.pop("beta"), arrays.pop("v")
  expected = linear_attention(v=beta[..., None] * v, **arrays, implementation="xla_chunked")
  assert_close("output", output, expected[0], tolerance("output", "float32"))
  assert_close("final_state", state, expected[1], tolerance("final_state", "float32"))


def by_name(fn, inputs, normalize_qk=False, **changes):
  return cases.results(fn, inputs.arrays | changes, inputs.segment_ids, inputs.cotangents, None, normalize_qk)


@pytest.mark.parametrize("decay", ["channel", "token"])
def test_no_decay_equals_a_decay_of_zero(decay):
  inputs = make_inputs(Case(**SHAPE, gate="zero", segments=(15, 1, 54), decay=decay))
  expected = by_name(CHUNKED, inputs, log_decay=None)
  for name, x in by_name(CHUNKED, inputs).items():
    if name != "dlog_decay":
      assert_close(name, x, expected[name], tolerance(name, "float32"))


@pytest.mark.parametrize("normalize_qk", [False, True])
def test_equal_decays_of_all_channels_are_a_decay_per_token(normalize_qk):
  inputs = make_inputs(Case(**SHAPE, segments=(15, 1, 54)))
  expected = by_name(CHUNKED, inputs, normalize_qk)
  repeated = jnp.repeat(inputs.arrays["log_decay"][..., None], SHAPE["K"], axis=3)
  actual = by_name(CHUNKED, inputs, normalize_qk, log_decay=repeated)
  actual["dlog_decay"] = jnp.sum(actual["dlog_decay"], axis=3)
  for name, x in expected.items():
    assert_close(name, actual[name], x, tolerance(name, "float32"))


@pytest.mark.parametrize("implementation", ["reference", "xla_chunked"])
def test_no_decay_costs_nothing(implementation):
  """Nothing is exponentiated, forward or backward, unless there is a decay."""
  for decay in FORMS:
    inputs = make_inputs(Case(**SHAPE, decay=decay))
    fn = functools.partial(delta_rule, implementation=implementation)
    program = str(cases.results.trace(fn, inputs.arrays, None, inputs.cotangents).jaxpr)
    assert "dot_general" in program
    assert ("= exp " in program) == (decay != "none")


def test_normalize_qk_equals_normalised_inputs():
  """Values and gradients, including the gradient of the norm. Scaling q or k changes nothing."""
  inputs = make_inputs(Case(**SHAPE, normalize_qk=True))

  def normalised(q, k, **arrays):
    unit = lambda x: x / jnp.sqrt(jnp.sum(x**2, axis=-1, keepdims=True) + 1e-6)
    return CHUNKED(unit(q), unit(k), **arrays)

  expected = by_name(normalised, inputs)
  for name, x in by_name(CHUNKED, inputs, normalize_qk=True).items():
    assert_close(name, x, expected[name], tolerance(name, "float32"))
  longer = by_name(CHUNKED, inputs, normalize_qk=True, q=4 * inputs.arrays["q"], k=0.5 * inputs.arrays["k"])
  assert_close("output", longer["output"], expected["output"], tolerance("output", "float32"))


def test_normalize_qk_of_zeros_is_zero():
  inputs = make_inputs(Case(**SHAPE, normalize_qk=True))
  zeros = jnp.zeros_like(inputs.arrays["k"])
  actual = by_name(CHUNKED, inputs, normalize_qk=True, q=zeros, k=zeros)
  assert not np.any(actual["output"]) and not np.any(actual["dv"])
  assert all(np.isfinite(x).all() for x in actual.values())


@pytest.mark.parametrize("decay", FORMS)
def test_packed_documents_equal_documents_one_by_one(decay):
  lengths = 15, 85, 15
  inputs = make_inputs(Case(B=1, T=sum(lengths), K=8, V=8, segments=lengths, decay=decay))
  state, packed, start = inputs.arrays["initial_state"], by_name(CHUNKED, inputs), 0
  for n, length in enumerate(lengths):
    rows, last = slice(start, start := start + length), n == len(lengths) - 1
    # Only the first document reads the initial state, and only the last one writes the final state.
    arrays = {name: x if x is None else x[:, rows] for name, x in inputs.arrays.items()}
    arrays["initial_state"] = state if n == 0 else jnp.zeros_like(state)
    dstate = inputs.cotangents[1] if last else jnp.zeros_like(state)
    alone = cases.results(CHUNKED, arrays, None, (inputs.cotangents[0][:, rows], dstate))
    by_token = "output", "dq", "dk", "dv", "dbeta", *([] if decay == "none" else ["dlog_decay"])
    compared = {name: packed[name][:, rows] for name in by_token}
    compared |= {"dinitial_state": packed["dinitial_state"]} if n == 0 else {}
    compared |= {"final_state": packed["final_state"]} if last else {}
    # The gate of a later document's first token acts on nothing: on a zero state, or on one that is reset.
    assert decay == "none" or n == 0 or not np.any(compared["dlog_decay"][:, 0])
    for name, x in compared.items():
      assert_close(name, x, alone[name], tolerance(name, "float32"))


@pytest.mark.parametrize("C", chunks.SIZES)
@pytest.mark.parametrize("keys", cases.KEYS)
def test_unit_lower_inverse(C, keys):
  """Against float64 on the same matrix, of which powers exceed the inverse by up to 1e30."""
  rng = np.random.default_rng(C)
  k = cases.KEYS[keys](rng.standard_normal((3, C, 2, 32)))
  k = np.moveaxis(k / np.linalg.norm(k, axis=-1, keepdims=True), 2, 1)
  for beta in ("unit", "double", "0", "1", "2"):
    lower = np.tril(cases.BETAS[beta](rng, (3, 2, C, 1)) * (k @ k.mT), -1).astype(np.float32)
    expected = np.linalg.inv(np.eye(C) + lower.astype(np.float64))
    if (beta, keys) != ("2", "near_parallel"):
      assert_close("inverse", jax.jit(chunks.unit_lower_inverse)(lower), expected, 1e-5)


BAD = {
    "betas of key heads": (dict(beta=(2, 8, 2)), r"beta has shape \(2, 8, 2\); it must be \[batch, time, heads\] "
                                                 r"\(2, 8, 4\)$"),
    "beta a channel": (dict(beta=(2, 8, 4, 6)), r"beta has shape \(2, 8, 4, 6\); it must be"),
    "constant decay": (dict(log_decay=(4,)), r"log_decay has shape \(4,\); it must be \[batch, time, heads\] "
                                             r"\(2, 8, 4\), \[batch, time, heads, key channels\] \(2, 8, 4, 4\), "
                                             "or None"),
    "gates of key heads": (dict(log_decay=(2, 8, 2)), r"log_decay has shape \(2, 8, 2\); it must be"),
    "gates of the channels of key heads": (dict(log_decay=(2, 8, 2, 4)), r"log_decay has shape \(2, 8, 2, 4\); it"),
    "gates of value channels": (dict(log_decay=(2, 8, 4, 6)), r"log_decay has shape \(2, 8, 4, 6\); it must be"),
    "time of v": (dict(v=(2, 9, 4, 6)), r"v has shape \(2, 9, 4, 6\); batch and time must equal q's \(2, 8\)"),
    "heads": (dict(v=(2, 8, 3, 6)), "v has 3 heads; they must be a multiple of q's 2"),
    "state": (dict(initial_state=(2, 4, 6, 4)),
              r"initial_state is float32\(2, 4, 6, 4\); it must be float32\(2, 4, 4, 6\)"),
    "segments": (dict(segment_ids=(2, 8)), r"segment_ids is float32\(2, 8\); it must be integers of shape \(2, 8\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_shapes_are_named(name, unchecked_arrays):
  shapes = dict(q=(2, 8, 2, 4), k=(2, 8, 2, 4), v=(2, 8, 4, 6), beta=(2, 8, 4), log_decay=(2, 8, 4))
  changed, message = BAD[name]
  with pytest.raises(ValueError, match=f"delta_rule: .*{message}"):
    delta_rule(**{key: jnp.zeros(shape) for key, shape in (shapes | changed).items()})


def test_bad_dtypes_and_values_are_named(unchecked_arrays):
  x, beta = jnp.zeros((1, 8, 2, 4)), jnp.zeros((1, 8, 2))
  with pytest.raises(ValueError, match="q, k, v have dtypes float32, bfloat16, float32; they must be equal"):
    delta_rule(x, x.astype(jnp.bfloat16), x, beta)
  with pytest.raises(ValueError, match="beta has dtype int32; it must be bfloat16, float16 or float32"):
    delta_rule(x, x, x, beta.astype(jnp.int32))
  with pytest.raises(ValueError, match="log_decay has dtype int32"):
    delta_rule(x, x, x, beta, beta.astype(jnp.int32))
  with pytest.raises(ValueError, match="chunk_size=48; it must be one of 16, 32, 64, 128, or None"):
    delta_rule(x, x, x, beta, chunk_size=48)
  with pytest.raises(ValueError, match="delta_rule: implementation='triton' is unknown; known: .*reference"):
    delta_rule(x, x, x, beta, implementation="triton")


@pytest.mark.parametrize("dtype, bound", [("float32", 1e-6), ("bfloat16", 5e-3)])
def test_the_gradient_through_the_norms_in_one_kernel(dtype, bound):
  x, dx = (jax.random.normal(key, (2, 16, 3, 64)) for key in jax.random.split(jax.random.key(0)))
  x = x.astype(dtype)
  norm = jax.lax.rsqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-1) + 1e-6)
  found = launch_through_norm(x, norm, norm[..., None] * dx)  # the other factor 1 / norm is in the kernels' weights
  expected = jax.vjp(chunks.normalize, x.astype(jnp.float32))[1](dx)[0]
  assert found.dtype == x.dtype
  assert_close("gradient", found, expected, bound)
