"""Settings of every test: eight fake CPU devices, strict promotion, and GPU tests only where there is a GPU."""

import gc
import json
import os
import pathlib
import platform
import re
import sys

from tests.environment import QUICK_COMPILATION

# Read once, when JAX starts its CPU backend. XLA_FLAGS of the caller, even empty ones, replace these.
if os.environ.get("JAX_PLATFORMS") == "cpu":
  os.environ.setdefault("XLA_FLAGS", QUICK_COMPILATION)
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"

import jax  # noqa: E402
import jaxlib  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402

import tests.shapes  # noqa: E402, F401  (for the next line, which looks it up by name)

# Every function of these packages checks the arrays that it takes and returns against its annotations.
jaxtyping.install_import_hook(["kernels", "lin_jax"], "tests.shapes.check")

from kernel_tuning import assembler  # noqa: E402
from kernels import cpu_compiler  # noqa: E402

cpu_compiler.switch_off()
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
# Otherwise every program is hashed, although there is no folder to keep it in.
jax.config.update("jax_enable_compilation_cache", False)
# No program of this process says from which lines of Python its instructions come. Where a test compiles much, that
# saves about 4% of its time.
jax.config.update("jax_traceback_in_locations_limit", 0)


@pytest.fixture
def unchecked_arrays():
  """Arrays of wrong shapes reach the errors that the packages raise themselves, as they do for users."""
  jaxtyping.config.update("jaxtyping_disable", True)
  yield
  jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True, scope="module")
def drop_compiled_programs():
  """Every program on a CPU maps three pieces of memory, and Linux ends a process that has more than 65,530 of them.

  Until then the programs and their traces live on, and the collector need not walk through them again and again.
  """
  yield
  maps = pathlib.Path("/proc/self/maps")
  if maps.exists() and maps.read_bytes().count(b"\n") > 30_000:
    gc.unfreeze()
    jax.clear_caches()
  gc.collect()
  gc.freeze()


# Their tests take 5 to 30 s each: one that began last would leave the other cores without work.
LONGEST = ("test_processes.py", "test_differential.py", "test_cpu_compiler.py", "test_notebooks.py",
           "test_train_cli.py", "test_synthetic_training.py", "test_harness_cli.py", "test_cli.py")


def pytest_collection_modifyitems(config, items):
  items.sort(key=lambda item: item.path.name not in LONGEST)
  if jax.default_backend() == "gpu":
    return
  needs_gpu = [item for item in items if item.get_closest_marker("gpu")]
  config.hook.pytest_deselected(items=needs_gpu)
  items[:] = [item for item in items if not item.get_closest_marker("gpu")]


def pytest_collection_finish():
  """What the imports left lives until the end; the collector need not walk through it again and again.

  Nor need it walk through all that a trace leaves each time that another trace has added a quarter to it.
  """
  gc.collect()
  gc.freeze()
  gc.set_threshold(5_000, 20, 20)


def pytest_addoption(parser):
  parser.addoption("--record", metavar="FILE", help="write every recorded property of the run to FILE, as JSON")


def pytest_configure(config):
  if config.getoption("--record") and not hasattr(config, "workerinput"):
    config.pluginmanager.register(Record(config.getoption("--record")))


def cpu_name():
  """The processor's model, as Linux names it."""
  models = re.findall(r"^model name\s*: (.*)", pathlib.Path("/proc/cpuinfo").read_text(), re.MULTILINE)
  return models[0] if models else platform.machine()


class Record:
  """Collects what tests pass to `record_property`, errors and configurations, from all workers, and writes it."""

  def __init__(self, path):
    self.path, self.tests = pathlib.Path(path), {}

  def pytest_runtest_logreport(self, report):
    if report.when == "call":
      found = dict(report.user_properties)
      errors = {name: float(f"{e:.1e}") for name, e in found.pop("errors", {}).items()}
      self.tests[report.nodeid] = {"outcome": report.outcome, **found, **errors}
      self.write()  # a time limit may end the run before its end

  def write(self):
    outcomes = [test["outcome"] for test in self.tests.values()]
    head = {"command": " ".join(["pytest", *(x for x in sys.argv[1:] if not x.startswith("--record"))]),
            "device": jax.devices()[0].device_kind, "jax": jax.__version__, "jaxlib": jaxlib.__version__,
            "ptxas": assembler.version() if jax.default_backend() == "gpu" else None, "cpu": cpu_name(),
            "xla_flags": os.environ["XLA_FLAGS"],
            "passed": outcomes.count("passed"), "failed": outcomes.count("failed")}
    tests = ",\n".join(f"  {json.dumps(name)}: {json.dumps(test)}" for name, test in sorted(self.tests.items()))
    self.path.write_text(f'{json.dumps(head)[:-1]}, "tests": {{\n{tests}\n}}}}\n')
