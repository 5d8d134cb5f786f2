"""Makes the page of claims, experiments/results/README.md, and its plots. --check says whether it is up to date.

  python experiments/report_claims.py
"""

import pathlib
import sys

from absl import flags

from claims import Results
from claims.page import render
from claims.plots import PLOTS
from lin_jax import files
from running import commands

_RESULTS = pathlib.Path(__file__).resolve().parent / "results"
_FOLDER = flags.DEFINE_string("results", str(_RESULTS), "Folder of the records, where the page is written.")
_CHECK = flags.DEFINE_bool("check", False, "Writes nothing; exits with 1 when the records give another page.")


def main(_):
  results = Results(_FOLDER.value)
  if not results.folder.is_dir():
    raise ValueError(f"--results={results.folder}: no such folder")
  page, text = results.folder / "README.md", render(results)
  if _CHECK.value:
    if not page.exists() or page.read_text(encoding="utf-8") != text:
      print(f"{page} is not what the records give: run report_claims.py", file=sys.stderr)
      sys.exit(1)
    return
  files.write(page, text)
  print(page)
  for plot in PLOTS:
    if plot.drawn(results):
      print(plot.draw(results, results.folder))


if __name__ == "__main__":
  commands.run(main)
