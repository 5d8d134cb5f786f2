"""The communication of a compiled program: which collectives run, how often, with how many bytes, and between whom."""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable

import numpy as np

HOST = 8
"""GPUs of a host."""
_KINDS = "all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute"
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(_KINDS)})(-start)?\((.*)")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_CALLEE = re.compile(r"\b(body|calls|to_apply)=%?([\w.-]+)")
_TRIPS = re.compile(r'known_trip_count"?:\{"?n"?:"?(\d+)')
_SHAPE = re.compile(r"\b[a-z]+(\d*)\w*\[([\d,]+)\]")


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


def collectives(text: str) -> list[Collective]:
  """Returns the collectives of a program of several devices, as `compiled.as_text()` has it.

  A collective in a loop counts as often as the loop repeats, and equal ones are joined. Results of a single number
  (losses, counts, norms) add no bytes, and a collective of nothing else is left out. Raises ValueError for a loop with
  collectives whose number of rounds the program does not say.
  """
  computations, calls, name, entry = {}, {}, None, None
  for line in text.splitlines():
    if header := _COMPUTATION.match(line):
      name = header[2]
      entry = name if header[1] else entry
      computations[name], calls[name] = [], []
    elif name:
      if (found := _COLLECTIVE.search(line)) and (collective := _collective(*found.groups()))[1]:
        computations[name].append(collective)
      trips = _TRIPS.search(line)
      calls[name] += [(callee, int(trips[1]) if trips else 0 if role == "body" else 1)
                      for role, callee in _CALLEE.findall(line)]
  found = {}
  _count(entry, 1, computations, calls, found)
  return [Collective(kind, times, *rest) for (kind, *rest), times in found.items()]


def totals(found: Iterable[Collective]) -> dict[str, tuple[int, int]]:
  """Returns by kind how many collectives one device takes part in, and the bytes of the results that it gets."""
  sums = collections.defaultdict(lambda: (0, 0))
  for x in found:
    result = x.bytes // x.group if x.kind == "reduce-scatter" else x.bytes
    count, size = sums[x.kind]
    sums[x.kind] = count + x.times, size + x.times * result
  return dict(sums)


def _count(name, times, computations, calls, found):
  """Adds to `found` how often each collective runs in `times` runs of a computation."""
  for collective in computations[name]:
    if not times:
      raise ValueError(f"a loop of unknown length has the collective {collective}")
    found[collective] = found.get(collective, 0) + times
  for callee, trips in calls[name]:
    _count(callee, times * trips, computations, calls, found)


def _collective(result, kind, start, rest):
  sizes = [_size(*shape) for shape in _SHAPE.findall(result)]
  group, crosses = _groups(rest)
  if start:  # the operands and the results
    size = max(sum(sizes[:len(sizes) // 2]), sum(sizes[len(sizes) // 2:]))
  else:
    size = sum(sizes) * (group if kind == "reduce-scatter" else 1)
  return kind, size, group, crosses


def _size(bits, shape):
  """The bytes of an array; a truth value takes one."""
  return math.prod(map(int, shape.split(","))) * int(bits or 8) // 8


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
