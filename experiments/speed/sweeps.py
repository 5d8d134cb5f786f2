"""Sweeps of speed measurements within a time limit, which skip the measurements that have a record.

A record holds `device`, `versions`, `git_commit`, `command`, `run` (the time of the run), `setting` (everything that
determines the number), `reason` (why it could not run, or "") and the results, which are None if there is a reason.
"""

import gc
import json
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags

from lin_jax import files
from running import records
from speed import training

_IDENTITY = ("device", "versions", "setting")


def chosen(flag: flags.FlagHolder[list[str]], known: Sequence) -> list:
  """Returns the values of `known` that a list flag names, or all if it names none. Raises ValueError for others."""
  names = {str(value): value for value in known}
  for name in flag.value:
    if name not in names:
      raise ValueError(f"--{flag.name}={name}: unknown; known: {', '.join(names)}")
  return [names[name] for name in flag.value] or list(known)


def run(runs: Sequence[tuple[Any, dict]], measure: Callable[[Any], dict], line: Callable[[dict], str],
        fields: Sequence[str], path: pathlib.Path | None, *, begun: float, limit: float) -> list[str]:
  """Measures and prints every run, and appends its record to `path`.

  Args:
    runs: pairs of a thing to measure and its record without results.
    measure: returns the results by `fields`. An exception becomes the reason of a record without results.
    line: formats a record without a reason, to be printed after its name.
    begun, limit: no run begins that would probably end more than `limit` seconds after `begun`, a `time.monotonic`.
  Returns:
    The names of runs that failed.
  """
  failed, left, longest = [], 0, 0.0
  for what, row in runs:
    begin = time.monotonic()
    if limit and begin - begun + longest > limit:
      left += 1
      continue
    try:
      row = row | {"run": records.now(), "reason": ""} | measure(what)
    except files.Unwritable:
      raise  # the next one could not be written either
    except Exception as e:  # a run that does not fit must not cost the others their record
      row = row | {"run": records.now(), "reason": f"{type(e).__name__}: {e}".splitlines()[0][:300]}
      row |= dict.fromkeys(fields)
    gc.collect()
    name = row["setting"]["name"]
    print(f"{name:>18} {f'failed: {row["reason"]}' if row['reason'] else line(row)}", flush=True)
    if row["reason"]:
      failed.append(name)
    if path:
      records.append(path, row)
    longest = max(longest, time.monotonic() - begin)
  if left:
    print(f"stopped after {limit:g} s with {left} left: the same command goes on")
  return failed


def check(measurements: Sequence[Callable[[], dict]], path: pathlib.Path | None, limit: float) -> None:
  """Prints the row of every measurement, and appends it to `path` with where it was made.

  No measurement begins after `limit` seconds, if that is not 0. The process exits with 1 if a row has a
  `within_bounds` that is false.
  """
  begun, wrong, left = time.monotonic(), 0, 0
  for measure in measurements:
    if limit and time.monotonic() - begun > limit:
      left += 1
      continue
    row = measure()
    wrong += not row.get("within_bounds", True)
    print(json.dumps(row), flush=True)
    if path:
      files.append(path, json.dumps(training.provenance() | row) + "\n")
  if left:
    print(f"stopped after {limit:g} s with {left} measurements left")
  if wrong:
    print(f"{wrong} measurements are not exact", file=sys.stderr)
    sys.exit(1)


def missing(runs: Sequence[tuple[Any, dict]], path: pathlib.Path | None) -> list[tuple[Any, dict]]:
  """Returns the runs that lack a record for their device, versions and setting. Raises ValueError as `records.load`.

  A run that a time limit stopped is tried again.
  """
  done = {_key(record) for record in load(path) if not record["reason"].startswith("TimeoutError")} if path else set()
  return [(what, row) for what, row in runs if _key(row) not in done]


def load(path: pathlib.Path) -> list[dict]:
  return records.load(path, *_IDENTITY, "reason")


def _key(record):
  return records.key({name: record[name] for name in _IDENTITY})
