"""Makes the page of models, experiments/results/models.md. --check says whether it is up to date.

  python experiments/report_models.py
"""

import pathlib
import sys

from absl import flags

from configs import page
from lin_jax import files
from running import commands

_RESULTS = pathlib.Path(__file__).resolve().parent / "results"
_OUT = flags.DEFINE_string("out", str(_RESULTS / "models.md"), "File of the page.")
_SMOKE = flags.DEFINE_string("smoke", str(_RESULTS / page.SMOKE), "File that smoke_models.py wrote, if it was run.")
_CHECK = flags.DEFINE_bool("check", False, "Writes nothing; exits with 1 when the configs give another page.")


def main(_):
  path, text = pathlib.Path(_OUT.value), page.render(pathlib.Path(_SMOKE.value))
  if _CHECK.value:
    if not path.exists() or path.read_text(encoding="utf-8") != text:
      print(f"{path} is not what the configs give: run report_models.py", file=sys.stderr)
      sys.exit(1)
    return
  files.write(path, text)
  print(path)


if __name__ == "__main__":
  commands.run(main)
