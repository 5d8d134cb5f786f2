"""Training on several devices beside one device: meshes by name, the runs to compare, and what their records say."""

import dataclasses
import math
import os
from collections.abc import Callable, Iterable

import jax

from lin_jax import sharding
from lin_jax.config import DataConfig, MeshConfig, OptimConfig, TrainConfig, validate
from running import records
from running.meshes import ONE, name_of, parse, size_of
from speed import packing, training

RESULTS = ("tokens_per_s", "tokens_per_s_per_device", "step_ms", "mfu", "memory_gib", "compile_s", "first_step_s",
           "losses")
"""Fields of every record."""
COMPARED = ("one_device_tokens_per_s", "fraction", "first_loss_difference", "largest_loss_difference")
"""Fields of a record of several devices that compare it with one device."""


@dataclasses.dataclass(frozen=True)
class Size:
  """The steps of each run, and the rows of its batch: `batch` on every device, or `global_batch` on all together."""

  batch: int
  global_batch: int
  steps: int
  timed: int
  remat: str | None
  unroll: int | None
  tiny: bool

  def rows(self, devices: int) -> int:
    return self.global_batch or self.batch * devices


def fitting(meshes: list[str], devices: int) -> list[MeshConfig]:
  """Reads the meshes. One that needs more than `devices` is left out and costs a line. Raises ValueError.

  Without meshes, each axis takes all devices in turn. If no mesh has several devices, one device is measured, which is
  context=1.
  """
  parsed = [parse(text, "meshes") for text in meshes or [f"{axis}={devices}" for axis in sharding.AXES]]
  fit = [mesh for mesh in parsed if size_of(mesh) <= devices]
  for mesh in parsed:
    if mesh not in fit:
      print(f"{name_of(mesh)} is left out: it needs {size_of(mesh)} devices, and this host has {devices}", flush=True)
  if not any(size_of(mesh) > 1 for mesh in fit):
    print(f"{devices} device{'s' * (devices > 1)}: context=1 is measured, on one device", flush=True)
  return list({name_of(mesh): mesh for mesh in fit or [ONE]}.values())


def configured(make: Callable[[], TrainConfig], mesh: MeshConfig, size: Size, rows: int, length: int,
               accumulation: int = 1) -> TrainConfig:
  """Returns a config of `rows` rows on `mesh`. Raises ValueError if they do not fit each other."""
  config = make()
  if size.tiny:
    config = training.shrunk(config)
  config.mesh = mesh
  config.data = DataConfig(sequence_length=length, batch_size=rows)
  config.optim = OptimConfig(steps=size.steps, warmup_steps=min(5, size.steps - 1), accumulation=accumulation)
  config.remat = config.remat if size.remat is None else size.remat
  config.unroll = config.unroll if size.unroll is None else size.unroll
  sharding.validate_mesh(validate(config), size_of(mesh))
  return config


def plan(name: str, make: Callable[[], TrainConfig], meshes: Iterable[MeshConfig], size: Size, length: int,
         ) -> list[tuple[TrainConfig, dict]]:
  """Returns the runs of a model, as pairs of a config and its setting: one device, then each mesh.

  Before a mesh comes one device with its global batch, unless that was there. Where the batch grows with the devices,
  this run accumulates as many microbatches as the mesh has devices.
  """
  runs = {}
  for mesh in [ONE, *meshes]:
    devices = size_of(mesh)
    rows = size.rows(devices)
    microbatches = 1 if size.global_batch else devices
    for config in (configured(make, ONE, size, rows, length, microbatches),
                   configured(make, mesh, size, rows, length)):
      setting = _setting(name, config, size)
      runs.setdefault(records.key(setting), (config, setting))
  return list(runs.values())


def _setting(name, config, size):
  return {"name": name, "tiny": size.tiny, "mesh": name_of(config.mesh), "devices": size_of(config.mesh),
          "host_devices": jax.local_device_count(), **training.description(config),
          "accumulation": config.optim.accumulation, "timed_steps": size.timed, "data": training.ZIPF,
          "documents": packing.DOCUMENTS["one"], "xla_flags": os.environ.get("XLA_FLAGS", "")}


def measured(program: training.Program, size: Size) -> dict:
  """Returns the fields `RESULTS`. Raises MemoryError if the program needs more memory than its device gives."""
  limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", math.inf) / 2**30
  if (needed := training.gibibytes(program.step)) > limit:
    raise MemoryError(f"needs {needed:.1f} GiB on each device, of which {limit:.1f} are available")
  batches = training.drawn_batches(program.config, size.steps, documents=False)
  result = training.measure(program, batches, size.timed)
  if not all(map(math.isfinite, result["losses"])):
    raise ArithmeticError(f"losses {result['losses']}: must be finite")
  each = {"tokens_per_s_per_device": round(result["tokens_per_s"] / size_of(program.config.mesh), 1)}
  return {field: (result | each)[field] for field in RESULTS}


def compared(row: dict, done: Iterable[dict], size: Size) -> dict:
  """Returns the fields `COMPARED` of a record, None where `done` lacks the run on one device or that run failed."""
  setting = row["setting"]
  if setting["devices"] == 1:
    return {}
  speed = _one_device(setting, done, size.rows(1), 1)
  same = _one_device(setting, done, setting["batch_size"], 1 if size.global_batch else setting["devices"])
  differences = [abs(a - b) / abs(b) for a, b in zip(row["losses"], same["losses"], strict=True)] if same else []
  rate = speed and speed["tokens_per_s"]
  return {"one_device_tokens_per_s": rate, "fraction": rate and round(row["tokens_per_s_per_device"] / rate, 4),
          "first_loss_difference": float(f"{differences[0]:.1e}") if same else None,
          "largest_loss_difference": float(f"{max(differences):.1e}") if same else None}


def _one_device(setting, done, rows, accumulation):
  """The record on one device with `rows` rows in `accumulation` microbatches, and else the fields of `setting`."""
  wanted = records.key(setting | {"mesh": name_of(ONE), "devices": 1, "batch_size": rows,
                                  "accumulation": accumulation})
  return next((row for row in done if records.key(row["setting"]) == wanted and not row["reason"]), None)


def line(row: dict) -> str:
  setting = row["setting"]
  beside = "" if row.get("fraction") is None else f", {row['fraction']:.3f} of one device"
  if row.get("largest_loss_difference") is not None:
    beside += f", losses differ by {row['first_loss_difference']:.1e} to {row['largest_loss_difference']:.1e}"
  return (f"{setting['mesh']:<12} {setting['sequence_length']:>9,} x {setting['batch_size']:<3} "
          f"{row['tokens_per_s']:>9,.0f} tokens/s, {row['step_ms']:.1f} ms per step, {row['memory_gib']:.2f} GiB, "
          f"compiled in {row['compile_s']:.1f} s{beside}")
