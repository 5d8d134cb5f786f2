"""Settings of every test: eight fake CPU devices, strict promotion, and GPU tests only where there is a GPU."""

import os

# Read once, when JAX starts its CPU backend.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


def pytest_collection_modifyitems(config, items):
  if jax.default_backend() == "gpu":
    return
  needs_gpu = [item for item in items if item.get_closest_marker("gpu")]
  config.hook.pytest_deselected(items=needs_gpu)
  items[:] = [item for item in items if not item.get_closest_marker("gpu")]
