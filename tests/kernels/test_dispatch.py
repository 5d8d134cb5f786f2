"""Which implementation runs, the text that explains it, and the cost of importing the package."""

import logging
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import pytest

import kernels
from kernels import dispatch

X = jax.ShapeDtypeStruct((1, 20, 2, 16), jnp.float32)


def test_every_entry_of_the_table_keeps_the_contract():
  for op, names in dispatch.TABLE.items():
    assert names[-1] == "reference" and ("xla_chunked" in names) == (op in dispatch.RECURRENT)
    for name in names:
      x = jax.ShapeDtypeStruct(X.shape, jnp.bfloat16)  # the one dtype that all of them take
      assert callable(dispatch.choose(op, name, x, x, x, x))


def test_none_takes_the_first_that_the_platform_allows(monkeypatch):
  monkeypatch.setattr(dispatch, "platform", lambda: "cpu")
  assert dispatch.choose("gla", None, X, X, X, X).__module__ == "kernels.gla.xla_chunked"
  assert kernels.explain("gla", X, X, X, X).splitlines() == [
      "gla runs as xla_chunked on cpu",
      "  pallas_triton: the default backend is cpu, it needs cuda",
      "  reference: can run, xla_chunked comes first",
  ]


def test_on_a_gpu_the_reasons_of_an_implementation_count(monkeypatch):
  monkeypatch.setattr(dispatch, "platform", lambda: "cuda")
  assert dispatch.choose("gla", None, X, X, X, X).__module__ == "kernels.gla.pallas_triton"
  assert dispatch.choose("gla", None, X, X, X, X, chunk_size=128).__module__ == "kernels.gla.xla_chunked"
  assert "pallas_triton: chunk_size=128 is not one of" in kernels.explain("gla", X, X, X, X, chunk_size=128)


@pytest.mark.parametrize("version, name", [("PJRT C API\ncuda 13000", "cuda"), ("PJRT C API\nrocm 60300", "rocm"),
                                           ("something new", "gpu")])
def test_only_a_gpu_of_cuda_takes_the_triton_kernels(monkeypatch, version, name):
  """JAX calls every maker's GPU "gpu", and interprets kernels there unless it lowers for CUDA."""
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  client = types.SimpleNamespace(platform_version=version)
  monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(client=client, device_kind="")])
  chosen = "pallas_triton" if name == "cuda" else "xla_chunked"
  assert dispatch.choose("gla", None, X, X, X, X).__module__ == f"kernels.gla.{chosen}"
  assert kernels.explain("gla", X, X, X, X).startswith(f"gla runs as {chosen} on {name}")
  assert name == "cuda" or f"the default backend is {name}, it needs cuda" in kernels.explain("gla", X, X, X, X)


def test_a_named_implementation_runs_or_raises():
  x = jnp.zeros(X.shape)
  with pytest.raises(NotImplementedError, match="'pallas_triton' declines these inputs: chunk_size=128"):
    kernels.gla(x, x, x, x, implementation="pallas_triton", chunk_size=128)
  with pytest.raises(ValueError, match="'triton' is unknown; known: pallas_triton, xla_chunked, reference"):
    kernels.gla(x, x, x, x, implementation="triton")
  with pytest.raises(ValueError, match="op='attention' is unknown; known: delta_rule, gla, linear_attention"):
    kernels.explain("attention", X, X, X, X)


def test_the_choice_is_logged_once(caplog):
  dispatch._log_once.cache_clear()
  with caplog.at_level(logging.INFO, logger="kernels.dispatch"):
    for _ in range(2):
      dispatch.choose("gla", None, X, X, X, X)
  assert len(caplog.messages) == 1 and caplog.messages[0].startswith("gla runs as ")


def test_import_is_light():
  """No device is started, no Pallas loaded, and the package is ours rather than Hugging Face's of the same name."""
  code = ("import sys, kernels, jax._src.xla_bridge as bridge; assert not bridge._backends; "
          "assert not any('pallas' in name for name in sys.modules if name.startswith(('jax', 'kernels'))); "
          "assert not hasattr(kernels, '__version__'); "
          "assert kernels.__all__ == ['delta_rule', 'explain', 'gla', 'linear_attention', 'rms_norm', "
          "'selective_scan', 'short_convolution', 'skip_gate_norm', 'swiglu']; "
          "import lin_jax.model; assert 'jax.experimental.pallas' not in sys.modules; "
          "assert not any('triton' in name for name in sys.modules if name.startswith('kernels'))")
  subprocess.run([sys.executable, "-c", code], check=True)
