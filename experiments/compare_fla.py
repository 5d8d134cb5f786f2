"""Proves the bridge to flash-linear-attention's checkpoints on a GPU: needs PyTorch, transformers and its two wheels.

  python experiments/compare_fla.py --out=experiments/results/compare_fla.json

For each model of `fla_bridge/models.py` the library draws parameters and saves them. `lin_jax.hf` loads the checkpoint,
and its logits and greedily generated tokens must agree with the library's. Then `lin_jax.hf` writes the model, and the
library must load that and compute the same. There is one record per model. The command ends with exit code 1 if any bar
is missed.
"""

import dataclasses
import json
import pathlib
import shutil
import sys
import tempfile
import time
import traceback

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx

from fla_bridge import models
from kernel_bench import peers
from kernels.accuracy import relative_error
from lin_jax import files, hf
from lin_jax.generate import generate
from lin_jax.model import LanguageModel
from running import commands

_OUT = flags.DEFINE_string("out", "", "JSON file that receives the records.")
_MODELS = flags.DEFINE_list("models", [], "Models to compare; all if empty.")
_FIXTURES = flags.DEFINE_string("fixtures", "", "Directory that receives the tests' fixtures; then nothing is "
                                "compared.")
_INTERPRET = flags.DEFINE_bool("interpret", False, "Runs the library on the CPU, in Triton's interpreter.")

BATCH, TOKENS, STEPS = 2, 96, 16
# Bounds on the relative RMS error of logits against the library's in float32. Our float32 logits come from the chunked
# form with products in float32. Our bfloat16 logits come from the device's own implementation, and their bar is on
# rounding.
BARS = {"float32": 1e-4, "bfloat16": 3e-2, "back": 1e-5}


def main(_):
  unknown = sorted(set(_MODELS.value) - set(models.MODELS))
  if unknown:
    raise ValueError(f"--models={','.join(unknown)}: must be among {', '.join(models.MODELS)}")
  if _INTERPRET.value:
    models.interpret()
  device = "cpu" if _INTERPRET.value else "cuda"
  names = _MODELS.value or list(models.MODELS)
  if _FIXTURES.value:
    for name in names:
      models.write_fixture(name, pathlib.Path(_FIXTURES.value) / name, device)
    return
  records = []
  for name in names:
    records.append(_record(name, device))
    print(json.dumps(records[-1]), flush=True)
    if _OUT.value:
      head = {"device": jax.devices()[0].device_kind, "batch": BATCH, "tokens": TOKENS, "steps": STEPS, "bars": BARS,
              "versions": peers.versions(("jax", "torch", "triton", "transformers", "fla-core",
                                          "flash-linear-attention"))}
      files.write(_OUT.value, json.dumps(head | {"models": records}, indent=1) + "\n")
  if not all(record["passed"] for record in records):
    sys.exit(1)


def _record(name: str, device: str) -> dict:
  """Compares one model; an exception becomes part of its record, so that the other models still run."""
  start, record = time.perf_counter(), {"model": name, "passed": False}
  folder = pathlib.Path(tempfile.mkdtemp())
  try:
    record |= compare(name, folder, device)
    record["passed"] = record["generation"] and all(record[bar] <= limit for bar, limit in BARS.items())
  except files.Unwritable:
    raise  # the next one could not be written either
  except Exception as e:
    record["error"] = f"{type(e).__name__}: {e}"[:2000]
    traceback.print_exc()
  shutil.rmtree(folder)
  return record | {"seconds": round(time.perf_counter() - start, 1)}


def compare(name: str, folder: pathlib.Path, device: str) -> dict:
  """Returns errors of logits by dtype and after the way back, and whether the generated tokens are the same."""
  theirs = models.build(name, device)
  models.save(theirs, folder / "theirs")
  tokens = np.random.default_rng(1).integers(0, theirs.config.vocab_size, (BATCH, TOKENS))
  expected, continuation = models.logits(theirs, tokens), models.greedy(theirs, tokens, STEPS)

  config, model = hf.load(folder / "theirs")
  exact = _as(model, config, "float32", "xla_chunked")
  result = {"float32": _error(exact, tokens, expected),
            "bfloat16": _error(_as(model, config, "bfloat16", ""), tokens, expected)}
  with jax.default_matmul_precision("highest"):
    ours = generate(exact, tokens, STEPS, temperature=0.0)
  result["generation"] = bool(np.array_equal(ours, continuation))

  hf.save(folder / "ours", config, model)
  back = models.load(folder / "ours", device)
  return result | {"back": relative_error(models.logits(back, tokens), expected)}


def _error(model, tokens, expected) -> float:
  # float32 products on a GPU are TF32 unless asked otherwise.
  with jax.default_matmul_precision("highest"):
    logits = nnx.jit(lambda model, tokens: model(tokens)[0])(model, jnp.asarray(tokens, jnp.int32))
  return relative_error(logits, expected)


def _as(model, config, dtype, implementation):
  """Puts the same parameters into a model that computes in `dtype` and whose ops run `implementation`."""
  mixer = config.mixer
  if hasattr(mixer, "implementation"):
    mixer = dataclasses.replace(mixer, implementation=implementation)
  config = dataclasses.replace(config, dtype=dtype, mixer=mixer)
  graph, _ = nnx.split(nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0))), nnx.Param)
  return nnx.merge(graph, nnx.state(model, nnx.Param))


if __name__ == "__main__":
  commands.run(main)
