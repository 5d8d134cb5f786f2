"""The record of the compile check is whole, of the kernels as they are, and without a fault."""

import json
import pathlib

import pytest

import compiled
from kernels import tuned

RECORD = json.loads((pathlib.Path(compiled.__file__).parent / "results" / "compiled_kernels.json").read_text())


@pytest.mark.parametrize("op", compiled.OPS)
def test_was_made_from_these_kernels(op):
  assert RECORD["sources"][op] == compiled.sources(op), f"{op} changed: run experiments/compile_kernels.py --ops={op}"


def test_every_device_file_is_of_a_gpu_that_is_compiled_for():
  names = {tuned.slug(gpu.device) for gpu in compiled.GPUS.values()}
  assert {path.stem for path in tuned.FOLDER.glob("*.json")} <= names


def test_columns():
  assert RECORD["columns"] == compiled.COLUMNS


@pytest.mark.parametrize("gpu", compiled.GPUS)
@pytest.mark.parametrize("op", compiled.OPS)
def test_every_configuration_was_compiled(op, gpu):
  row = lambda entry: json.dumps({name: x for name, x in entry.items() if name not in ("kernels", "errors")})
  entries = {row(entry): entry for entry in RECORD["programs"] if (entry["op"], entry["gpu"]) == (op, gpu)}
  wanted = [json.dumps(program.row()) for program in compiled.programs([op], [gpu])]
  assert [program for program in wanted if program not in entries] == []
  assert all(entries[program]["kernels"] for program in wanted)
  assert [fault for program in wanted for fault in compiled.faults(entries[program])] == []
