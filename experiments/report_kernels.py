"""Makes the kernels' page and plots out of the benchmark's records. --check says whether the page is up to date.

  python experiments/report_kernels.py
"""

import pathlib
import sys

from absl import flags

from kernel_bench import front
from kernel_bench.page import draw, render
from kernel_bench.records import Records
from lin_jax import files
from running import commands

_ROOT = pathlib.Path(__file__).resolve().parent.parent
_RECORDS = flags.DEFINE_string("records", str(_ROOT / "experiments/results/kernels.jsonl"), "File that "
                               "bench_kernels.py wrote.")
_CHECK = flags.DEFINE_bool("check", False, "Writes nothing; exits with 1 when the records give another page.")


def main(_):
  path = pathlib.Path(_RECORDS.value)
  if not path.exists():
    raise ValueError(f"--records={path}: no such file; bench_kernels.py --out={path} writes it")
  records, page = Records(path), path.with_suffix(".md")
  text = render(records)
  if _CHECK.value:
    if not page.exists() or page.read_text(encoding="utf-8") != text:
      print(f"{page} is not what {path} gives: run report_kernels.py", file=sys.stderr)
      sys.exit(1)
    return
  files.write(page, text)
  print(page)
  for device in records.devices():
    if plot := draw(records, device, path.parent):
      print(plot)
  if front.draw(records, picture := path.with_name("front.png")):
    print(picture)


if __name__ == "__main__":
  commands.run(main)
