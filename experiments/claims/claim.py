"""A claim of a paper, and the finding by which records decide on it."""

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Callable, Iterable

from kernel_bench.records import Records

HOLDS, IN_PART, FAILS, NOT_RUN = "holds", "holds in part", "does not hold", "not run"


@dataclasses.dataclass(frozen=True)
class Finding:
  """The records' answer to a claim.

  Attributes:
    text: the obtained numbers.
    points: for each point of the claim whether it holds (None for no record).
    close: for each point whether it rests on a difference smaller than that of two seeds (empty if none does).
  """

  text: str
  points: tuple[bool | None, ...]
  close: tuple[bool, ...] = ()

  @property
  def verdict(self) -> str:
    """A claim holds when all its points were run and hold, and in part when some hold."""
    if all(point is None for point in self.points):
      return NOT_RUN
    if all(self.points):
      return HOLDS
    return IN_PART if any(self.points) else FAILS

  @property
  def decided(self) -> bool:
    """Whether the points that are not close give the same verdict."""
    close = self.close or (False,) * len(self.points)
    clear = tuple(None if near else point for point, near in zip(self.points, close, strict=True))
    return self.verdict == Finding(self.text, clear).verdict != NOT_RUN

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
