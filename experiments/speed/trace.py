"""The events of a trace that jax.profiler wrote, each with the HLO instruction that it ran."""

import pathlib
import re

from jax.profiler import ProfileData

from .profile import Event

_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = .*? ([a-z][\w\-]*)\(")
_SCOPES = re.compile(r'op_name="([^"]*)"')
_CALLS = "while", "call", "conditional"  # their events contain those of the instructions inside


def instructions(hlo: str) -> dict[str, tuple[str, str]]:
  """Returns the opcode and the scopes of each instruction of a compiled program's text, by its name."""
  found = {}
  for line in hlo.splitlines():
    if match := _INSTRUCTION.match(line):
      scopes = _SCOPES.search(line)
      found[match[1]] = match[2], scopes[1] if scopes else ""
  return found


def events(folder: pathlib.Path, hlo: str, gpu: bool) -> list[Event]:
  """Returns what ran on the device. On a CPU, it is what ran in the threads of the compiled program.

  Args:
    folder: where `jax.profiler.trace` wrote its files.
    hlo: text of the compiled program, for the instruction of each kernel.
  """
  known = instructions(hlo)
  by_kernel = {re.sub(r"\W", "_", name): name for name in known}
  found = []
  for name, instruction, start, duration in _raw(folder, gpu):
    for candidate in (instruction, instruction.rsplit(".", 1)[0], by_kernel.get(re.sub(r"\W", "_", name), ""),
                      by_kernel.get(re.sub(r"__\d+$", "", name), "")):  # a number after "__" is a second copy's
      if candidate in known:
        break
    opcode, scopes = known.get(candidate, ("", ""))
    if opcode not in _CALLS:
      found.append(Event(name, start, duration, opcode, scopes))
  return found


def _raw(folder, gpu):
  """Yields (name, name of the instruction or "", start, duration) of all events of the device."""
  path = max(folder.rglob("*.xplane.pb"))
  for plane in ProfileData.from_file(str(path)).planes:
    if not plane.name.startswith("/device:GPU" if gpu else "/host:CPU"):
      continue
    lines = [line for line in plane.lines if not gpu or line.name.startswith("Stream")]  # others are derived from these
    for line in lines:
      for event in line.events:
        instruction = str(dict(event.stats).get("hlo_op", ""))
        if gpu or (instruction and not event.name.startswith("end:")):
          yield event.name, instruction, event.start_ns, event.duration_ns
