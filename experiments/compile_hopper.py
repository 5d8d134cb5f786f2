"""Compiles the kernels of the Mosaic GPU backend for Hopper without a GPU, and records registers, spills and products.

  pip install -e .[compile]
  python experiments/compile_hopper.py

The record has each scan of the delta rule at many widths, and two widths at short lengths, where an assembler of CUDA
13 once lost products of another kernel. At the long length it also has the kernels of Triton's backend that run beside
the scans, which `compile_kernels.py` compiles for other chunks. The exit status is 1 when a kernel does not compile,
its machine code has fewer products than its PTX, or it spills more than is known.
"""

import dataclasses
import importlib.metadata
import pathlib
import sys

from absl import flags

from kernel_tuning import compiled, hopper
from lin_jax import files
from running import commands

_OUT = flags.DEFINE_string("out", "experiments/results/compiled_hopper.json", "The record.")


def main(_):
  entries, wrong = [], []
  for program in hopper.programs():
    scans = hopper.compile_scans(program)
    others = hopper.compile_others(program) if program.chunks == hopper.LONG else {}
    wrong += [f"{program} {fault}" for name, x in (scans | others).items() for fault in hopper.faults(name, x)]
    good = {name: x for name, x in (scans | others).items() if not isinstance(x, str)}
    entries.append(dataclasses.asdict(program) | {
        kind: {name: dataclasses.asdict(good[name]) for name in names if name in good}
        for kind, names in (("scans", scans), ("others", others))})
    print(f"{program}: " + ", ".join(f"{name} {x.registers}r {x.spill_bytes}B spilled, {x.products} products"
                                     for name, x in good.items()), flush=True)
  versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "jax-cuda13-plugin")}
  sources = compiled.sources("delta_rule", "mosaic_gpu")
  files.write_json(pathlib.Path(_OUT.value), {"gpu": hopper.GPU, "versions": versions, "sources": sources,
                                              "programs": entries})
  for line in wrong:
    print(line, file=sys.stderr)
  return 1 if wrong else 0


if __name__ == "__main__":
  commands.run(main)
