"""Notebooks run, hold to their form, and are stored as a script and an equal `.ipynb` without outputs."""

import pathlib

import jupytext
import nbclient
import nbformat
import pytest

from tests.environment import ENVIRONMENT

NOTEBOOKS = pathlib.Path(__file__).resolve().parents[2] / "experiments" / "notebooks"
NAMES = sorted(path.stem for path in NOTEBOOKS.glob("[0-9]*.py"))
LONGEST_CELL = 8
SECONDS = 60


def cells(notebook):
  return [(cell.cell_type, cell.source) for cell in notebook.cells]


def code_lines(cell):
  return [line for line in cell.source.splitlines() if line.strip()] if cell.cell_type == "code" else []


def test_every_notebook_is_a_pair():
  assert NAMES
  assert NAMES == sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))


@pytest.mark.parametrize("name", NAMES)
def test_stored_notebook_equals_its_script_and_has_no_outputs(name):
  script, stored = (jupytext.read(NOTEBOOKS / f"{name}.{suffix}") for suffix in ("py", "ipynb"))
  nbformat.validate(stored)
  assert cells(stored) == cells(script)
  for cell in stored.cells:
    assert not cell.get("outputs") and cell.get("execution_count") is None


@pytest.mark.parametrize("name", NAMES)
def test_cells_are_short_and_claims_asserted(name):
  notebook = jupytext.read(NOTEBOOKS / f"{name}.py")
  assert max(len(code_lines(cell)) for cell in notebook.cells) <= LONGEST_CELL
  assert any("assert " in line for cell in notebook.cells for line in code_lines(cell))


@pytest.mark.parametrize("name", NAMES)
def test_notebook_runs(name, monkeypatch):
  for variable, value in ENVIRONMENT.items():
    monkeypatch.setenv(variable, value)
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  notebook = jupytext.read(NOTEBOOKS / f"{name}.py")
  client = nbclient.NotebookClient(notebook, timeout=SECONDS, kernel_name="python3",
                                   resources={"metadata": {"path": str(NOTEBOOKS)}})
  client.execute()
