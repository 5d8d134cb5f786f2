"""Settings of every test: eight fake CPU devices, strict promotion, and GPU tests only where there is a GPU."""

import json
import os
import pathlib
import sys

# Read once, when JAX starts its CPU backend.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"

import jax  # noqa: E402
import jaxlib  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


def pytest_collection_modifyitems(config, items):
  if jax.default_backend() == "gpu":
    return
  needs_gpu = [item for item in items if item.get_closest_marker("gpu")]
  config.hook.pytest_deselected(items=needs_gpu)
  items[:] = [item for item in items if not item.get_closest_marker("gpu")]


def pytest_addoption(parser):
  parser.addoption("--record", metavar="FILE", help="write every recorded property of the run to FILE, as JSON")


def pytest_configure(config):
  if config.getoption("--record") and not hasattr(config, "workerinput"):
    config.pluginmanager.register(Record(config.getoption("--record")))


class Record:
  """Collects what tests pass to `record_property`, from all worker processes, and writes it when the run ends."""

  def __init__(self, path):
    self.path, self.tests = pathlib.Path(path), {}

  def pytest_runtest_logreport(self, report):
    if report.when == "call":
      self.tests[report.nodeid] = {"outcome": report.outcome, **dict(report.user_properties)}

  def pytest_sessionfinish(self):
    device = jax.devices()[0]
    record = {"command": " ".join(["pytest", *sys.argv[1:]]), "device": device.device_kind, "jax": jax.__version__,
              "jaxlib": jaxlib.__version__, "passed": sum(t["outcome"] == "passed" for t in self.tests.values()),
              "failed": sum(t["outcome"] == "failed" for t in self.tests.values()), "tests": self.tests}
    self.path.write_text(json.dumps(record, indent=1, default=str) + "\n")
