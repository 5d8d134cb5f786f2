"""The record of the compile check belongs to the present kernels, counts what is pending, and has no fault."""

import json

import jax
import pytest

from kernel_tuning import assembler, compiled, hopper
from kernels import tuned

RECORD = json.loads(compiled.SPILLS.with_name("compiled_kernels.json").read_text())
WANTED = {compiled.identity(program.row()): program for program in compiled.programs()}


def test_says_what_is_not_compiled_from_these_kernels():
  found = compiled.pending(RECORD["programs"], RECORD["builds"])
  assert RECORD["pending"] == found, "kernels changed: run experiments/compile_kernels.py, at least for a while"


def test_every_measured_configuration_is_compiled_from_these_kernels():
  fresh = {op: compiled.sources(op) for op in compiled.OPS}
  done = {compiled.identity(entry) for entry in RECORD["programs"]
          if RECORD["builds"][entry["build"]]["sources"] == fresh[entry["op"]]}
  assert [str(program) for key, program in WANTED.items() if program.source == "tuned" and key not in done] == []


def test_every_device_file_is_of_a_gpu_that_is_compiled_for():
  names = {tuned.slug(gpu.device) for gpu in compiled.GPUS.values()}
  assert {path.stem for path in tuned.FOLDER.glob("*.json")} <= names


def test_columns():
  assert RECORD["columns"] == compiled.COLUMNS


@pytest.mark.parametrize("op", compiled.OPS)
def test_no_program_has_a_fault(op):
  entries = [entry for entry in RECORD["programs"] if entry["op"] == op]
  assert entries and all(compiled.identity(entry) in WANTED and entry["kernels"] for entry in entries)
  assert [fault for entry in entries for fault in compiled.faults(entry)] == []


def test_every_known_spill_is_one_of_the_record():
  found = {f"{WANTED[compiled.identity(entry)]} {name}": compiled.kernel(row).spill_bytes
           for entry in RECORD["programs"] for name, row in entry["kernels"].items()}
  assert [name for name, spilled in compiled.known_spills().items() if found.get(name) != spilled] == []


def test_digests_are_those_of_the_kernel_calls():
  """One program per op, where JAX is of the version that compiled it."""
  entries = {entry["op"]: entry for entry in RECORD["programs"] if entry["tokens"] == compiled.SHORT}
  for op, entry in entries.items():
    if RECORD["builds"][entry["build"]]["versions"]["jax"] == jax.__version__:
      assert entry["traced"] == compiled.traced(compiled.calls(WANTED[compiled.identity(entry)])), op
  assert list(entries) == list(compiled.OPS)


def test_the_kernels_for_hopper_keep_their_products():
  """compile_hopper.py wrote the record from the present kernels, and no scan has a fault."""
  record = json.loads(compiled.SPILLS.with_name("compiled_hopper.json").read_text())
  assert record["sources"] == compiled.sources("delta_rule", "mosaic_gpu"), "run experiments/compile_hopper.py"
  programs = [hopper.Program(*(entry[name] for name in ("K", "V", "gated", "normalized", "chunks")))
              for entry in record["programs"]]
  assert programs == list(hopper.programs())
  for program, entry in zip(programs, record["programs"]):
    assert len(entry["scans"]) == 3 and bool(entry["others"]) == (program.chunks == hopper.LONG)
    found = {name: hopper.Scan(**row) for name, row in entry["scans"].items()}
    found |= {name: assembler.Kernel(**row) for name, row in entry["others"].items()}
    assert [f"{program} {fault}" for name, x in found.items() for fault in hopper.faults(name, x)] == []
