"""A training step compiled for many GPUs that the machine need not have: memory, and traffic between the GPUs.

The step is the one that trains, with its kernels, compiled for an H100 on a topology of hosts with eight of them. XLA's
autotuning needs a GPU and is left out, so products have the tiles of its rules.
"""

import dataclasses
import math
import re
import time
from unittest import mock

import numpy as np

from kernel_tuning import gpus
from kernels import dispatch
from lin_jax import sharding
from lin_jax.config import TrainConfig
from speed import training

HOST = 8
"""GPUs of a host."""
GPU = "sm_90a"
_KINDS = "all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute"
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(_KINDS)})(-start)?\((.*)")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_CALLEE = re.compile(r"\b(body|calls|to_apply)=%?([\w.-]+)")
_TRIPS = re.compile(r'known_trip_count"?:\{"?n"?:"?(\d+)')
_SHAPE = re.compile(r"\b([a-z]+\d+|pred)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
  """A collective of one device and step: how often it runs, the bytes of the whole array, and who takes part.

  The whole array is what an all-gather returns, a reduce-scatter is given, and the other kinds are given.
  """

  kind: str
  times: int
  bytes: int
  group: int
  crosses_hosts: bool


def compile_step(config: TrainConfig, devices: int) -> dict:
  """Compiles the step of `config`, and returns its memory per GPU in GiB and its collectives.

  Raises ValueError if JAX's CUDA plugin is missing.
  """
  topology = gpus.topology(GPU, max(1, devices // HOST), min(devices, HOST))
  mesh = sharding.make_mesh(config.mesh, topology.devices)
  begin = time.monotonic()
  with mock.patch.object(dispatch, "platform", lambda: "cuda"):  # kernels are chosen as on a GPU
    _, step = training.lower(config, mesh, documents=False)
  step = step.compile()
  memory = step.memory_analysis()
  gib = lambda size: round(size / 2**30, 3)
  return {"memory_gib": training.gibibytes(step), "state_gib": gib(memory.argument_size_in_bytes),
          "temporary_gib": gib(memory.temp_size_in_bytes), "compile_s": round(time.monotonic() - begin, 1),
          "collectives": [dataclasses.asdict(x) for x in collectives(step.as_text())]}


def collectives(text: str) -> list[Collective]:
  """Returns the collectives of a compiled program, and counts the ones in loops as often as their loops run.

  Equal ones are joined. Raises ValueError for a loop with collectives whose number of rounds the program does not say.
  """
  computations, calls, name, entry = {}, {}, None, None
  for line in text.splitlines():
    if header := _COMPUTATION.match(line):
      name = header[2]
      entry = name if header[1] else entry
      computations[name], calls[name] = [], []
    elif name:
      if found := _COLLECTIVE.search(line):
        computations[name].append(_collective(*found.groups()))
      trips = _TRIPS.search(line)
      calls[name] += [(callee, int(trips[1]) if trips else 0 if role == "body" else 1)
                      for role, callee in _CALLEE.findall(line)]
  totals = {}
  _count(entry, 1, computations, calls, totals)
  return [Collective(kind, times, *rest) for (kind, *rest), times in totals.items()]


def _count(name, times, computations, calls, totals):
  for found in computations[name]:
    if not times:
      raise ValueError(f"a loop of unknown length has the collective {found}")
    totals[found] = totals.get(found, 0) + times
  for callee, trips in calls[name]:
    _count(callee, times * trips, computations, calls, totals)


def _collective(result, kind, start, rest):
  sizes = [_size(*shape) for shape in _SHAPE.findall(result)]
  group, crosses = _groups(rest)
  if start:  # the operands and the results
    size = max(sum(sizes[:len(sizes) // 2]), sum(sizes[len(sizes) // 2:]))
  else:
    size = sum(sizes) * (group if kind == "reduce-scatter" else 1)
  return kind, size, group, crosses


def _size(dtype, shape):
  width = 1 if dtype == "pred" else int(re.sub(r"\D", "", dtype)) // 8
  return width * math.prod(map(int, filter(None, shape.split(","))))


def _groups(text):
  """The size of a collective's groups, and whether one has devices of several hosts."""
  if found := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", text):
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
    names, inside = list(sizes), re.findall(r"'(\w+)'", found[2])
    ids = np.arange(math.prod(map(int, sizes.values()))).reshape(list(map(int, sizes.values())))
    groups = np.moveaxis(ids, [names.index(name) for name in inside], range(len(inside)))
    groups = groups.reshape(math.prod(int(sizes[name]) for name in inside), -1).T
  elif found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
    ids = np.arange(int(found[1]) * int(found[2])).reshape(list(map(int, found[3].split(","))))
    groups = ids.transpose(list(map(int, found[4].split(",")))) if found[4] else ids
    groups = groups.reshape(int(found[1]), int(found[2]))
  elif found := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}", text):
    groups = np.array([list(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", found[1])])
  else:
    raise ValueError(f"a collective whose groups are not understood: {text[:300]}")
  return groups.shape[1], bool((groups // HOST != groups[:, :1] // HOST).any())
