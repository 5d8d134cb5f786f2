"""Says which runs the claims still want: the sweep, its minutes on one GPU, what it would decide, and its command.

  python experiments/next_runs.py
  python experiments/next_runs.py --minutes=8

Minutes are predicted. Every command resumes, so that a longer sweep may be made in parts.
"""

import pathlib

from absl import flags

from language import waiting
from running import commands
from synthetic import sweeps as synthetic

_RESULTS = pathlib.Path(__file__).resolve().parent / "results"
_FOLDER = flags.DEFINE_string("results", str(_RESULTS), "Folder of the records.")
_MINUTES = flags.DEFINE_float("minutes", 0, "Shows only what is done within so many minutes of one GPU; 0 for all.",
                              lower_bound=0)


def main(_):
  folder = pathlib.Path(_FOLDER.value)
  if not folder.is_dir():
    raise ValueError(f"--results={folder}: no such folder")
  items = waiting.queue(folder) + synthetic.queue(folder / "synthetic.jsonl")
  items = [item for item in items if not _MINUTES.value or item.minutes <= _MINUTES.value]
  for item in items:
    print(f"{item.name}: {item.runs_left} runs, {_minutes(item.minutes)}, decides: {item.decides}\n  {item.command}")
  print(f"{len(items)} sweeps, {_minutes(sum(item.minutes for item in items))}")


def _minutes(count):
  return "1 minute" if round(count) == 1 else f"{count:.0f} minutes"


if __name__ == "__main__":
  commands.run(main)
