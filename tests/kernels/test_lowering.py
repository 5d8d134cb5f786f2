"""The Pallas kernels lower for CUDA on a host without a GPU, each exactly as often as the algorithm needs it."""

import collections
import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

import kernels
from kernel_tuning import compiled
from kernels import triton_blocks

# No configuration is listed for it, so the heuristics answer.
A100 = AbstractMesh((), (), abstract_device=AbstractDevice("NVIDIA A100-SXM4-80GB", 108, "gpu"))
FORWARD = {"gla": ["gla_factors", "gla_exact_scores", "gla_scan"],
           "linear_attention": ["linear_attention_sums", "linear_attention_scan"],
           "delta_rule": ["delta_rule_inverse", "delta_rule_scan"]}
BACKWARD = {"gla": ["gla_scan", "gla_dqkg", "gla_exact_dscores", "gla_exact_dqkg"],
            "linear_attention": ["linear_attention_scan", "linear_attention_dqk", "linear_attention_dgates"],
            "delta_rule": ["delta_rule_reverse", "delta_rule_gradients"]}
PER_TOKEN = ["linear_attention_sums", "linear_attention_dgates"]  # of them, only a decay per token needs these
PIECES = {op: [f"{op}_piece"] for op in FORWARD}
# Where float32 keys are so wide that the scan has no registers for P: GLA keeps it for the backward pass.
SCORES = {"gla": ["gla_scores"], "linear_attention": 2 * ["linear_attention_scores"], "delta_rule": []}
OPS = list(FORWARD)


def kernel_counts(fn, op, K=64, V=64, dtype="bfloat16", gate="token", B=16, T=130):
  """How often each kernel appears in `fn` lowered for CUDA."""
  H = 16
  array = lambda *shape, dtype=dtype: jax.ShapeDtypeStruct(shape, dtype)
  gates = {"token": (B, T, H), "constant": (H,), "none": None, "channel": (B, T, H, K)}
  shape = gates["channel" if op == "gla" else gate]
  arguments = (array(B, T, H, K), array(B, T, H, K), array(B, T, H, V),
               None if shape is None else array(*shape, dtype="float32"))
  if op == "delta_rule":
    fn = functools.partial(fn, beta=jnp.full((B, T, H), 0.5))
  with use_abstract_mesh(A100):
    text = jax.jit(functools.partial(fn, op)).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
  assert "stablehlo.while" not in text, "an interpreted kernel is part of the program"
  return collections.Counter(re.findall(rf'name = "({op}_\w+)"', text))


def loss(op, q, k, v, log_decay, **beta):
  output, final_state = getattr(kernels, op)(q, k, v, log_decay=log_decay, **beta, implementation="pallas_triton")
  return jnp.sum(jnp.sin(output.astype(jnp.float32))) + jnp.sum(jnp.sin(final_state))


gradient = jax.grad(loss, argnums=(1, 2, 3, 4))


# Every pair of op, width and dtype once, and every op at the wide float32 keys that have kernels of their own.
@pytest.mark.parametrize("op, K, V, dtype", [
    *((OPS[(i + j) % 3], *width, dtype) for i, width in enumerate([(32, 32), (60, 100), (128, 128), (256, 512)])
      for j, dtype in enumerate(["bfloat16", "float16", "float32"])),
    ("gla", 128, 128, "float32"), ("gla", 256, 512, "float32"), ("linear_attention", 256, 512, "float32"),
    ("delta_rule", 128, 128, "float32")])
def test_every_width_lowers(K, V, dtype, op):
  scores = SCORES[op] if dtype == "float32" and K > 64 else []
  assert kernel_counts(gradient, op, K, V, dtype) == collections.Counter(FORWARD[op] + BACKWARD[op] + scores)


def test_a_decay_per_key_channel_has_kernels_of_its_own():
  """With float32 keys in several tiles, and few long sequences, which are cut into pieces."""
  forward = ["sums", "factors", "inverse", "scan"]
  backward = ["factors", "reverse", "pairs", "gradients"]
  counts = kernel_counts(gradient, "delta_rule", 100, 64, "float32", gate="channel", B=1, T=4096)
  assert counts == collections.Counter(f"delta_rule_channel_{name}" for name in [*forward, *backward, "piece", "piece"])


@pytest.mark.parametrize("op", OPS)
def test_forward_alone(op):
  assert kernel_counts(loss, op) == collections.Counter(FORWARD[op])


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("K, V", [(64, 64), (16, 128)])  # the second's tiles of V are wider than K
def test_few_long_sequences_are_split(K, V, op):
  counts = kernel_counts(gradient, op, K, V, B=1, T=4096)
  assert counts == collections.Counter(FORWARD[op] + BACKWARD[op] + 2 * PIECES[op])


@pytest.mark.parametrize("op, gate, dtype", [
    ("gla", "channel", "bfloat16"), ("gla", "channel", "float32"), ("linear_attention", "token", "float32"),
    ("linear_attention", "constant", "bfloat16"), ("delta_rule", "token", "bfloat16"),
    ("delta_rule", "none", "float32"), ("delta_rule", "channel", "bfloat16"), ("selective_scan", "token", "bfloat16")])
def test_kernels_are_the_same_under_x64(op, gate, dtype):
  """Forward and backward of one long sequence, which is cut into pieces: that launches every kernel."""
  array = lambda *shape, dtype="float32": jax.ShapeDtypeStruct(shape, dtype)
  if op == "selective_scan":
    wide, narrow = array(1, 2048, 16), array(1, 2048, 16, dtype=dtype)
    arrays = dict(x=narrow, step_size=wide, a=array(16, 16), b=narrow, c=narrow)
    options = dict(segment_ids=jnp.zeros((1, 2048), jnp.int32))
  else:
    rows = array(1, 2048, 2, 32, dtype=dtype)
    gates = {"token": array(1, 2048, 2), "constant": array(2), "none": None, "channel": array(1, 2048, 2, 32)}
    arrays = dict(q=rows, k=rows, v=rows, log_decay=gates[gate])
    arrays |= dict(beta=array(1, 2048, 2)) if op == "delta_rule" else {}
    options = dict(normalize_qk=True) if op == "delta_rule" else {}

  def loss(arrays):
    output, final_state = getattr(kernels, op)(**arrays, **options, implementation="pallas_triton")
    return jnp.sum(output.astype(jnp.float32)) + jnp.sum(final_state)

  def launches(x64):
    with jax.enable_x64(x64), use_abstract_mesh(A100):
      jaxpr = jax.make_jaxpr(jax.grad(loss))(arrays).jaxpr
      return [compiled._call(eqn).key for eqn in compiled._launches(jaxpr)]

  found = launches(x64=True)
  assert found == launches(x64=False) and len(found) >= 4


def test_blocks_divide_their_arrays():
  copy = triton_blocks.launch(
      lambda x_ref, y_ref, dot: y_ref.__setitem__(..., x_ref[...]), name="copy", grid=(2,), num_warps=4, num_stages=1,
      in_specs=[pl.BlockSpec((32,), lambda i: (i,))], out_specs=[pl.BlockSpec((32,), lambda i: (i,))],
      out_shape=[jax.ShapeDtypeStruct((48,), "float32")])
  with pytest.raises(AssertionError, match=r"copy: blocks \(32,\) do not divide an array \(48,\)"):
    copy(jnp.zeros(64))


def test_no_decay_has_no_gradient_of_it():
  only_inputs = jax.grad(loss, argnums=(1, 2, 3))
  wanted = collections.Counter(FORWARD["linear_attention"] + BACKWARD["linear_attention"])
  wanted -= collections.Counter(PER_TOKEN)
  for gate in ("none", "constant"):
    assert kernel_counts(only_inputs, "linear_attention", gate=gate, T=128) == wanted


@pytest.mark.parametrize("op", OPS)
def test_remat_repeats_only_the_forward_pass(op):
  # The loss needs the output's value and the backward pass the states, so remat runs the forward pass a second time.
  plain = kernel_counts(jax.value_and_grad(loss, argnums=(1, 2, 3, 4)), op)
  remat = kernel_counts(jax.value_and_grad(jax.checkpoint(loss, static_argnums=0), argnums=(1, 2, 3, 4)), op)
  assert remat == plain + collections.Counter(FORWARD[op])
