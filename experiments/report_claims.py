"""Makes the page of claims, experiments/results/README.md, with its plots, and the tables of our training steps,
beside other libraries' and with packed documents, in experiments/results/training.md. --check says whether both pages
are up to date; it does not look at the plots.

  python experiments/report_claims.py
"""

import pathlib
import sys

from absl import flags

from claims import Results
from claims.page import render
from claims.plots import PLOTS
from claims.speed import TRAINING
from lin_jax import files
from running import commands
from speed.page import with_tables

_RESULTS = pathlib.Path(__file__).resolve().parent / "results"
_FOLDER = flags.DEFINE_string("results", str(_RESULTS), "Folder of the records, where the pages are written.")
_CHECK = flags.DEFINE_bool("check", False, "Writes nothing; exits with 1 when the records give another page.")


def main(_):
  results = Results(_FOLDER.value)
  if not results.folder.is_dir():
    raise ValueError(f"--results={results.folder}: no such folder")
  pages = {results.folder / "README.md": render(results)}
  if (training := results.folder / "training.md").exists():
    pages[training] = with_tables(training.read_text(encoding="utf-8"), results.lines(TRAINING))
  if _CHECK.value:
    old = [page for page, text in pages.items() if not page.exists() or page.read_text(encoding="utf-8") != text]
    for page in old:
      print(f"{page} is not what the records give: run report_claims.py", file=sys.stderr)
    sys.exit(bool(old))
  for page, text in pages.items():
    files.write(page, text)
    print(page)
  for plot in PLOTS:
    if plot.drawn(results):
      print(plot.draw(results, results.folder))


if __name__ == "__main__":
  commands.run(main)
