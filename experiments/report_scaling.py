"""Makes the page on rows of a million tokens over many GPUs. --check says whether it is up to date.

  python experiments/report_scaling.py
  python experiments/report_scaling.py --compile --limit_seconds=600

--compile adds the programs that the record lacks for these versions. It needs JAX's CUDA plugin (extra `compile`) and
no GPU, and a program takes about a minute. Exit codes: 0 done, or the time is over; 1 a program did not compile, or the
page is not up to date; 2 a user's error.
"""

import pathlib
import sys
import time

from absl import flags

from kernel_tuning import gpus
from lin_jax import files
from running import commands, records
from speed import compiled, plan, sweeps, training

_RESULTS = pathlib.Path(__file__).resolve().parent / "results"
_COMPILE = flags.DEFINE_bool("compile", False, "Compiles the programs that the record lacks, in place of the page.")
_RECORDS = flags.DEFINE_string("records", str(_RESULTS / "scaling_compiled.jsonl"), "Record of compiled programs.")
_OUT = flags.DEFINE_string("out", str(_RESULTS / "scaling.md"), "File of the page.")
_CHECK = flags.DEFINE_bool("check", False, "Writes nothing; exits with 1 when the records give another page.")
_LIMIT = flags.DEFINE_float("limit_seconds", 0, "Begins no program that would probably end later; 0 for no limit.",
                            lower_bound=0)


def main(_):
  if _COMPILE.value:
    sys.exit(1 if _compile_missing(time.monotonic()) else 0)
  path = pathlib.Path(_OUT.value)
  text = plan.render(_read(pathlib.Path(_RECORDS.value)), *(_read(_RESULTS / name) for name in plan.RECORDS))
  if _CHECK.value:
    if not path.exists() or path.read_text(encoding="utf-8") != text:
      print(f"{path} is not what the records give: run report_scaling.py", file=sys.stderr)
      sys.exit(1)
    return
  files.write(path, text)
  print(path)


def _compile_missing(start):
  path = pathlib.Path(_RECORDS.value)
  common = training.provenance() | {"device": f"{gpus.GPUS[compiled.GPU].device}, compiled without one"}
  runs = sweeps.missing([(what, common | {"setting": setting}) for what, setting in plan.runs()], path)
  return sweeps.run(runs, lambda what: compiled.compile_step(*what), plan.line, plan.FIELDS, path, begun=start,
                    limit=_LIMIT.value)


def _read(path):
  return records.load(path) if path.exists() else []


if __name__ == "__main__":
  commands.run(main)
