"""The ops under the compiler's default flags, with its fault for CPUs, and the guard against that fault."""

import os
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import cpu_compiler
from tests import default_flags, differential
from tests.close import tolerance

FORMS = [("gla", "channel"), ("linear_attention", "token"), ("linear_attention", None), ("delta_rule", "channel"),
         ("delta_rule", "token"), ("delta_rule", None), ("selective_scan", None)]


@pytest.mark.parametrize("op, decay", FORMS)
def test_an_op_is_right_under_default_flags(op, decay):
  for name, errors in default_flags.run(differential.op_errors, op, decay).items():
    bound = tolerance("output" if name in ("alone", "repeated") else name, "float32")
    assert not {T: error for T, error in errors.items() if not error <= bound}, name


def plain_jax_is_right():
  """Whether a fusion of the faulty kind, of other shapes than the probe's, gives NumPy's result."""
  x, y = np.random.default_rng(0).standard_normal((2, 4, 2, 16, 32)).astype("float32")
  fused = lambda x, y: x @ jnp.full((4, 2, 32, 64), 0.5) + jnp.sum(x * y, axis=-1, keepdims=True)
  expected = x @ np.full((4, 2, 32, 64), 0.5, np.float32) + np.sum(x * y, axis=-1, keepdims=True)
  return bool(np.allclose(jax.jit(fused)(x, y), expected, rtol=1e-3, atol=1e-3))


def probe_warnings():
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    cpu_compiler.probe.__wrapped__()
  return [str(warning.message) for warning in caught]


def test_the_probe_warns_exactly_where_plain_jax_is_wrong():
  messages = default_flags.run(probe_warnings)
  assert len(messages) == (0 if default_flags.run(plain_jax_is_right) else 1)
  assert all(f"Set XLA_FLAGS=--{cpu_compiler.FLAG}= before" in message for message in messages)


def test_without_the_fusions_the_probe_is_silent_under_a_trace_too():
  assert probe_warnings() == [] and plain_jax_is_right()
  jax.make_jaxpr(lambda x: (cpu_compiler.probe.__wrapped__(), x)[1])(1.0)


@pytest.mark.parametrize("before, known, after", [
    (None, True, f"--{cpu_compiler.FLAG}="), ("--a=1", True, f"--a=1 --{cpu_compiler.FLAG}="),
    ("--a=1", False, "--a=1"),
    (f"--{cpu_compiler.FLAG}=LIBRARY", True, f"--{cpu_compiler.FLAG}=LIBRARY"),
])
def test_the_flag_is_added_unless_the_user_or_an_older_jaxlib_says_otherwise(monkeypatch, before, known, after):
  monkeypatch.delenv("XLA_FLAGS", raising=False)
  if before is not None:
    monkeypatch.setenv("XLA_FLAGS", before)
  monkeypatch.setattr(cpu_compiler, "_known", lambda: known)
  cpu_compiler.switch_off()
  assert os.environ.get("XLA_FLAGS") == after


def test_the_installed_jaxlib_takes_the_flag():
  """A process ends when it starts a device with a flag that its jaxlib does not know."""
  code = "from kernels import cpu_compiler; cpu_compiler.switch_off(); import jax; jax.devices(); print('started')"
  found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                         env={name: x for name, x in os.environ.items() if name != "XLA_FLAGS"})
  assert found.stdout == "started\n" and cpu_compiler._known(), found.stderr
