"""Compares the end of a command that met a fault with the end that it must have."""

import dataclasses
import pathlib
import re
from collections.abc import Callable

from .runner import Ended, Inputs


class Impossible(Exception):
  """This machine lacks the rights to make the fault."""


@dataclasses.dataclass(frozen=True)
class Case:
  """A fault in a command, which `inject` makes in an empty folder; it returns the ended command."""

  name: str
  inject: Callable[[Inputs, pathlib.Path], Ended]
  code: int
  message: str  # a regular expression that must match a part of stderr

  def problem(self, ended: Ended) -> str:
    """Says what is wrong with the end first, or returns ""."""
    lines = [line for line in ended.err.splitlines() if re.match(r"\w+\.py: ", line)]
    if "Traceback" in ended.err:
      return f"traceback: {ended.err.splitlines()[-1]}"
    if ended.code != self.code:
      return f"exit code {ended.code}, not {self.code}: {ended.err[-300:]}"
    if len(lines) > 1 or not re.search(self.message, ended.err):
      return f"not the one message {self.message!r}: {ended.err[-300:]}"
    return ""


def outcome(case: Case, inputs: Inputs, folder: pathlib.Path) -> dict:
  """Returns the row of a case: its `outcome` is passed, failed, or skipped if this machine cannot make the fault."""
  folder.mkdir()
  try:
    ended = case.inject(inputs, folder)
  except AssertionError as e:
    return {"case": case.name, "outcome": "failed", "exit_code": None, "message": str(e)}
  except Impossible as e:
    return {"case": case.name, "outcome": "skipped", "exit_code": None, "message": str(e)}
  problem, lines = case.problem(ended), ended.err.strip().splitlines() or [""]
  message = (problem or lines[-1]).replace(str(folder), "FOLDER").replace(str(inputs.folder), "INPUTS")
  return {"case": case.name, "outcome": "failed" if problem else "passed", "exit_code": ended.code, "message": message}
