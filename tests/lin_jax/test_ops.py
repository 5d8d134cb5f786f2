"""The public door to the ops: names, runnable examples, and the message where another `kernels` hides ours."""

import doctest
import importlib
import pathlib
import subprocess
import sys
import typing

import pytest

from kernels import dispatch
from lin_jax import ops

ROOT = pathlib.Path(ops.__file__).parents[1]


@pytest.mark.parametrize("op", dispatch.TABLE)
def test_every_op_has_an_example_that_runs_and_a_recurrent_one_a_step(op):
  module = importlib.import_module(f"kernels.{op}")
  if op in dispatch.RECURRENT:
    assert getattr(ops, op) is getattr(module, op) and getattr(ops, f"{op}_step") is module.step
  found = doctest.testmod(module)
  assert found.attempted >= 4 and found.failed == 0


def test_implementation_names_are_those_of_the_table():
  names = typing.get_args(ops.Implementation)
  assert all(set(order) <= set(names) for order in dispatch.TABLE.values())
  assert set(names) == {name for order in dispatch.TABLE.values() for name in order}


def test_another_package_named_kernels_is_refused_in_one_message(tmp_path):
  (tmp_path / "kernels").mkdir()
  (tmp_path / "kernels" / "__init__.py").write_text("def get_kernel(name): ...\n")
  code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; import lin_jax.ops"
  run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
  *_, last = run.stderr.strip().splitlines()
  assert run.returncode == 1 and last.startswith("ImportError: lin_jax comes with a package named `kernels`, but ")
  assert f"finds {tmp_path}/kernels. Uninstall the other package" in last
