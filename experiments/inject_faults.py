"""Injects faults of the machine and of the user into the commands, which must end with one message and an exit code.

  python experiments/inject_faults.py --out=experiments/results/faults_cpu.json
  python experiments/inject_faults.py --match='train.*disk'

A fault is a full disk, a folder that cannot be written, an output that nobody reads, an encoding without the text's
characters, data that was changed, cut short or does not fit, a second process, a signal, or a kill after which the
command is repeated. `faults/cases.py` lists them, with the exit code and the message that each must give. None may
print a traceback or more than one message, and after a kill the repeated command must end as one that was never killed.
The exit code is 1 when a case ends in another way. All cases take about ten minutes on two CPU cores. Some faults need
the right to mount a file system.
"""

import collections
import json
import pathlib
import re
import sys
import tempfile
import time

from absl import flags

from faults.cases import CASES
from faults.judge import outcome
from faults.runner import Inputs
from lin_jax import files
from running import commands, records

_MATCH = flags.DEFINE_string("match", "", "Injects only the faults whose name contains this regular expression.")
_OUT = flags.DEFINE_string("out", "", "JSON file that receives the counts and a record per case.")


def main(_):
  cases = [case for case in CASES if re.search(_MATCH.value, case.name)]
  if not cases:
    raise ValueError(f"--match={_MATCH.value}: no case of that name")
  start, rows = time.monotonic(), []
  with tempfile.TemporaryDirectory() as folder:
    inputs = Inputs(pathlib.Path(folder) / "inputs")
    for number, case in enumerate(cases):
      rows.append(outcome(case, inputs, pathlib.Path(folder) / str(number)))
      print(f"{rows[-1]['outcome']:>8}  {case.name:<60} {rows[-1]['message'][:150]}", flush=True)
  counts = collections.Counter(row["outcome"] for row in rows)
  print(", ".join(f"{counts[name]} {name}" for name in ("passed", "failed", "skipped")))
  if _OUT.value:
    head = {"run": records.now(), **records.provenance(), "seconds": round(time.monotonic() - start),
            "counts": {name: counts[name] for name in ("passed", "failed", "skipped")}}
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    files.write(_OUT.value, f'{json.dumps(head)[:-1]}, "cases": [\n{lines}\n]}}\n')
  if counts["failed"]:
    sys.exit(1)


if __name__ == "__main__":
  commands.run(main)
