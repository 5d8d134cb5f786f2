"""The kernel of one token against the definition: interpreted everywhere, lowered for CUDA, and on a GPU its widths.

On a GPU: `pytest tests/kernels/test_steps.py -m gpu`.
"""

import functools
import importlib
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from kernels import dispatch, pallas_triton_step, steps
from kernels.delta_rule import reference as delta_rule
from kernels.gla import reference as gla
from kernels.linear_attention import reference as linear_attention
from tests.close import assert_close

OPS = {linear_attention.step: "linear_attention", gla.step: "gla", delta_rule.step: "delta_rule"}
A100 = AbstractMesh((), (), abstract_device=AbstractDevice("NVIDIA A100-SXM4-80GB", 108, "gpu"))
# Definition, decay, and options.
CASES = {"none": (linear_attention.step, None, {}), "constant": (linear_attention.step, "h", {}),
         "token": (linear_attention.step, "bh", {}), "channel": (gla.step, "bhk", {}),
         "delta": (delta_rule.step, None, {"normalize_qk": True}), "gated": (delta_rule.step, "bh", {}),
         "gated channels": (delta_rule.step, "bhk", {"normalize_qk": True})}
WIDTHS = [(64, 64), (128, 128), (256, 512)]


def arguments(case, K, V, B=2, H=3):
  definition, decay, options = CASES[case]
  rng = np.random.default_rng(0)  # of NumPy, which compiles nothing
  draw = lambda axes: rng.standard_normal([dict(b=B, h=H, k=K, v=V)[axis] for axis in axes])
  state = jnp.asarray(draw("bhkv"), "float32")
  q, k, v = (jnp.asarray(draw(axes), "bfloat16") for axes in ("bhk", "bhk", "bhv"))
  gates = [jnp.asarray(rng.random((B, H)), "float32")] if definition is delta_rule.step else []
  log_decay = None
  if decay is not None:
    log_decay = -np.abs(draw(decay)).astype("float32")
    log_decay[..., 0] = -np.inf  # the first head, or channel, forgets its state
    log_decay = jnp.asarray(log_decay)
  return definition, (state, q, k, v, *gates, log_decay), options


def check(case, K, V, run, bound):
  definition, args, options = arguments(case, K, V)
  expected = jax.jit(functools.partial(definition, **options))(*args)
  for name, actual, one in zip(("state", "output"), jax.jit(functools.partial(run, **options))(*args), expected,
                               strict=True):
    assert actual.dtype == jnp.float32
    assert_close(name, actual, one, bound)


@pytest.mark.parametrize("case", CASES)
def test_the_interpreted_kernel_is_the_definition(case):
  check(case, 32, 48, functools.partial(steps.launch, inspect.signature(CASES[case][0])), 1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("K, V", WIDTHS)
@pytest.mark.parametrize("case", CASES)
def test_the_compiled_kernel_is_the_definition(case, K, V):
  check(case, K, V, importlib.import_module(f"kernels.{OPS[CASES[case][0]]}").step, 1e-5)


def lowered(case, K, V, monkeypatch):
  monkeypatch.setattr(dispatch, "platform", lambda: "cuda")
  definition, args, options = arguments(case, K, V)
  step = functools.partial(steps.on_gpu(definition), **options)
  with use_abstract_mesh(A100):
    return jax.jit(step).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("case, K, V", [(case, *WIDTHS[-1]) for case in CASES] + [("token", *WIDTHS[0])])
def test_lowers_to_one_kernel_in_place(case, K, V, monkeypatch):
  text = lowered(case, K, V, monkeypatch)
  assert text.count('name = "recurrent_step"') == 1 and "output_operand_aliases" in text
  assert "stablehlo.while" not in text and "dot_general" not in text


def test_other_shapes_take_the_definition(monkeypatch):
  for K, V in ((48, 64), (64, 40), (8, 64), (1024, 64)):
    assert pallas_triton_step.declines(jnp.zeros((1, 1, K, V)))
    assert "recurrent_step" not in lowered("token", K, V, monkeypatch)


def test_a_cpu_takes_the_definition():
  text = jax.jit(importlib.import_module("kernels.gla").step).lower(*arguments("channel", 64, 64)[1]).as_text()
  assert "dot_general" in text and "while" not in text


def test_derivatives_are_the_definition_s(monkeypatch):
  definition, args, options = arguments("gated", 16, 16)
  gradient = lambda step: jax.grad(lambda *args: sum(jnp.sum(jnp.sin(x)) for x in step(*args, **options)),
                                   argnums=tuple(range(len(args))))
  expected = jax.jit(gradient(definition))(*args)
  monkeypatch.setattr(dispatch, "platform", lambda: "cuda")
  for name, actual, one in zip("Sqkvba", jax.jit(gradient(steps.on_gpu(definition)))(*args), expected, strict=True):
    assert_close(name, actual, one, 1e-5 if actual.dtype == jnp.float32 else 5e-3)
