"""Reads the benchmark's records, and compares them with the project's aims for the kernels."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable

from kernels import dispatch

from . import cases, peers
from .cases import PASSES, Case, named

_FIELDS = [field.name for field in dataclasses.fields(Case)]


class Records:
  """The newest record of every call: a line of the file replaces earlier lines of the same call.

  Attributes:
    sources: the entries of `kernel_sources.json`, which lies beside the records, by digest of the kernel sources. An
      entry has its `date`, `what` was measured, and two lists of ops with their gates. `same_program_as_ships` lists
      the ops whose traced kernels are the present ones. `loop_start_differs` lists the ops for which that was true
      until all loops began to start at an index from memory.
  """

  def __init__(self, path: str | pathlib.Path):
    self._rows, described = {}, pathlib.Path(path).with_name("kernel_sources.json")
    self.sources = json.loads(described.read_text(encoding="utf-8")) if described.exists() else {}
    for number, line in enumerate(pathlib.Path(path).read_text(encoding="utf-8").splitlines(), 1):
      try:
        row = json.loads(line)
        case = Case(**{name: row[name] for name in _FIELDS if name in row})  # older records have no G
        self._rows[row["device"], case, row["implementation"], row["pass"]] = row
      except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{path}, line {number}: not a record of bench_kernels: {e!r}") from e

  def __iter__(self):
    return iter(self._rows.values())

  def devices(self) -> list[str]:
    return list(dict.fromkeys(row["device"] for row in self))

  def cases(self, device: str) -> list[Case]:
    return list(dict.fromkeys(case for where, case, *_ in self._rows if where == device))

  def row(self, device: str, case: Case, implementation: str, label: str) -> dict | None:
    return self._rows.get((device, case, implementation, label))

  def counted(self, device: str, case: Case, implementation: str, label: str) -> dict | None:
    """Returns the record if it has a time and its results were right."""
    row = self.row(device, case, implementation, label)
    return row if row and row["ms"] is not None and row["within_bounds"] else None

  def ours(self, device: str, case: Case, label: str) -> dict | None:
    """Returns the record of the implementation that runs when none is named."""
    found = (self.counted(device, case, name, label) for name in _first(case))
    return next((row for row in found if row), None)

  def rivals(self, device: str, case: Case, label: str) -> dict[str, dict]:
    """Returns records of other libraries for this call; cuDNN's is of softmax attention at the same shape."""
    attention = dataclasses.replace(case, op="attention", gate="none")
    found = {name: self.counted(device, attention if name == "cudnn" else case, name, label)
             for name in peers.RIVALS}
    return {name: row for name, row in found.items() if row}


@functools.cache
def _first(case):
  """The implementations of the case's op, first those that do not decline its shapes."""
  names = dispatch.TABLE.get(case.op, ())
  return sorted(names, key=lambda name: bool(dispatch.declined(case.op, name, cases.arrays(case))))


@dataclasses.dataclass(frozen=True)
class Aim:
  """A number that the project wants on a device whose name contains `device`, or on any of the platform.

  Attributes:
    value: the obtained number, None if it was not measured.
    wanted: the upper bound of the number, or with `at_least` the lower bound.
  """

  text: str
  device: str
  wanted: float
  value: Callable[[Records, str], float | None]
  unit: str = "x"
  at_least: bool = False

  def margin(self, obtained: float) -> float:
    """At least 1 if the aim is met."""
    return obtained / self.wanted if self.at_least else self.wanted / obtained


def aims() -> list[Aim]:
  square, long = (16, 2048, 16, 128, 128), (1, 32768, 16, 128, 128)
  found = []
  for label, gla, token in (("forward", 0.5, 0.21), ("forward_backward", 2.0, 0.95)):
    found += [_at_most("gla", "channel", square, label, gla),
              _at_most("linear_attention", "token", square, label, token)]
  for label in PASSES:
    constant, token = (_case("linear_attention", gate, square) for gate in ("constant", "token"))
    found += [
        _times_fla("gla", "channel", (16, 2048, 4, 256, 512), label),
        _times_fla("linear_attention", "constant", (16, 2048, 8, 256, 512), label),
        _ratio(f"gla {label}, B1 T32768 over B16 T2048, H16 K=V=128", _case("gla", "channel", long),
               _case("gla", "channel", square), label, 1.15),
        _ratio(f"linear_attention {label}, constant over per-token decay, B16 T2048 H16 K=V=128", constant, token,
               label, 1.0)]
    found += [_flat(gate, label) for gate in ("constant", "token")]
  found += [_at_most("gla", "channel", (1, 2048, 4, 64, 64), "forward_backward", 40, "cpu"),
            _at_most("linear_attention", "token", (1, 2048, 4, 64, 64), "forward_backward", 12, "cpu"),
            _at_most("delta_rule", "none", (1, 2048, 4, 64, 64), "forward_backward", 30, "cpu")]
  for label, ms in (("forward", 0.36), ("forward_backward", 1.4)):
    found += [_at_most("delta_rule", "none", square, label, ms),
              _ratio(f"delta_rule {label}, B1 T32768 over B16 T2048, H16 K=V=128", _case("delta_rule", "none", long),
                     _case("delta_rule", "none", square), label, 1.3)]
  return found


def _case(op, gate, shape, dtype="bfloat16"):
  return Case(op, gate, *shape, dtype)


def _milliseconds(records, device, case, label):
  row = records.ours(device, case, label)
  return row and row["ms"]


def _at_most(op, gate, shape, label, ms, device="H100"):
  case = _case(op, gate, shape, "float32" if device == "cpu" else "bfloat16")
  return Aim(f"{case} {label}", device, ms, lambda records, device: _milliseconds(records, device, case, label), "ms")


def _times_fla(op, gate, shape, label):
  case = _case(op, gate, shape)

  def value(records, device):
    ours, fla = _milliseconds(records, device, case, label), records.counted(device, case, "fla", label)
    return ours and fla and fla["ms"] / ours

  return Aim(f"{case} {label}, speed over FLA's", "H100", 2.5, value, at_least=True)


def _ratio(text, above, below, label, bound):
  def value(records, device):
    times = [_milliseconds(records, device, case, label) for case in (above, below)]
    return times[0] / times[1] if all(times) else None

  return Aim(text, "H100", bound, value)


def _flat(gate, label):
  cases = [case for case in named("length", ["linear_attention"]) if case.gate == gate]

  def value(records, device):
    times = [_milliseconds(records, device, case, label) for case in cases]
    return max(times) / min(times) if all(times) else None

  return Aim(f"linear_attention {gate} {label}, slowest over fastest length, 1K to 128K", "H100", 1.03, value)
