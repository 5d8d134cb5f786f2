"""A claim of a paper, and the finding by which records decide on it."""

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Callable, Iterable

from kernel_bench.records import Records

HOLDS, IN_PART, FAILS, UNDECIDED, NOT_RUN = "holds", "holds in part", "does not hold", "undecided", "not run"
NOT_COUNTED = "not counted"  # of a point: it was not run, or what it compares says nothing


@dataclasses.dataclass(frozen=True)
class Finding:
  """The records' answer to a claim.

  Attributes:
    text: the obtained numbers.
    points: for each point of the claim whether it holds (None if it does not count).
    close: for each point whether it rests on a difference below two standard errors (empty if none does).
    labels: a name for each point, by which the page says what decided (empty if the claim has none).
  """

  text: str
  points: tuple[bool | None, ...]
  close: tuple[bool, ...] = ()
  labels: tuple[str, ...] = ()

  @property
  def verdict(self) -> str:
    """A claim holds when all its points were run and hold, and in part when some hold. It is undecided when that would
    differ if the close points came out the other way."""
    if all(point is None for point in self.points):
      return NOT_RUN
    verdicts = {_verdict([outcome if near else point for point, near in self._points()]) for outcome in (True, False)}
    return verdicts.pop() if len(verdicts) == 1 else UNDECIDED

  def named(self, holds: bool | None) -> list[str]:
    """The labels of the points that hold, that do not, or for None that are close."""
    outcomes = [None if near else point for point, near in self._points()]
    return [label for label, outcome, point in zip(self.labels, outcomes, self.points)
            if outcome is holds and point is not None]

  def counts(self) -> dict[str, int]:
    """How many points hold, do not hold, are undecided and do not count."""
    known = [(point, near) for point, near in self._points() if point is not None]
    clear = [point for point, near in known if not near]
    return {HOLDS: sum(clear), FAILS: len(clear) - sum(clear), UNDECIDED: len(known) - len(clear),
            NOT_COUNTED: len(self.points) - len(known)}

  def _points(self):
    return zip(self.points, self.close or (False,) * len(self.points), strict=True)

  @property
  def run(self) -> int:
    return sum(point is not None for point in self.points)


@dataclasses.dataclass(frozen=True)
class Claim:
  """A sentence of a paper and the experiment that tries it.

  Attributes:
    paper: its arXiv number.
    place: the figure or table.
    printed: the paper's numbers, or its ordering if it prints a curve.
    setting: our setting, in a few words.
    command: writes the records that `judge` reads.
  """

  paper: str
  place: str
  text: str
  printed: str
  setting: str
  command: str
  judge: Callable[["Results"], Finding]


class Results:
  """The records of a results folder. Each file is read once, and a missing file counts as empty."""

  def __init__(self, folder: pathlib.Path | str):
    self.folder = pathlib.Path(folder)
    self._files = {}

  def lines(self, name: str) -> list[dict]:
    """Returns the objects of a JSON lines file. Raises ValueError with the line that is not JSON."""
    if name not in self._files:
      path, rows = self.folder / name, []
      for number, line in enumerate(path.read_text(encoding="utf-8").splitlines() if path.exists() else [], 1):
        try:
          rows.append(json.loads(line))
        except ValueError as e:
          raise ValueError(f"{path}, line {number}: not JSON: {e}") from e
      self._files[name] = rows
    return self._files[name]

  def objects(self, name: str) -> list[dict]:
    """Returns the JSON files of an inner folder, ordered by name. Raises ValueError for one that is not JSON."""
    rows = []
    for path in sorted((self.folder / name).glob("*.json")):
      try:
        rows.append(json.loads(path.read_text(encoding="utf-8")))
      except ValueError as e:
        raise ValueError(f"{path}: not JSON: {e}") from e
    return rows

  @functools.cached_property
  def kernels(self) -> Records:
    path = self.folder / "kernels.jsonl"
    return Records(path if path.exists() else os.devnull)


def _verdict(points):
  return HOLDS if all(points) else IN_PART if any(points) else FAILS


def compared(pairs: Iterable[tuple[str, float | None, float | None]]) -> Finding:
  """Returns a finding of shares (label, left, right), in which a point holds if left >= right."""
  texts, points = [], []
  for label, left, right in pairs:
    known = left is not None and right is not None
    points.append(left >= right if known else None)
    if known:
      texts.append(f"{label}: {percent(left)} and {percent(right)}")
  return Finding("; ".join(texts), tuple(points))


def percent(share: float) -> str:
  return f"{100 * share:.1f}"
