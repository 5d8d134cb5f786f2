"""The shape of the repository: which package may import which."""

import ast
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
COMMANDS = {path.stem for path in (ROOT / "experiments").glob("*.py")}
PACKAGES = {path.parent.name for path in (ROOT / "experiments").glob("*/__init__.py")}
# What each may import of this repository. Nothing imports a command: its flags would be defined a second time.
ALLOWED = {"kernels": {"kernels"}, "lin_jax": {"kernels", "lin_jax"},
           "experiments": {"kernels", "lin_jax"} | PACKAGES}
KERNEL_LIBRARIES = {"jax", "jaxlib", "jaxtyping", "numpy"}


def imports(path):
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name.split(".")[0] for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and not node.level:
      yield node.module.split(".")[0]


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_point_one_way(package):
  files = list((ROOT / package).rglob("*.py"))
  assert files
  ours = ALLOWED["experiments"] | COMMANDS | {"experiments", "tests"}
  for path in files:
    found = set(imports(path))
    assert found & ours <= ALLOWED[package], path
    if package == "kernels":
      assert found - ours <= KERNEL_LIBRARIES | sys.stdlib_module_names, path
