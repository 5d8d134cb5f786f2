"""Trains every family at about 340M parameters for a few steps, and records loss, speed, memory and compile time.

  python experiments/smoke_models.py --out=experiments/results/smoke_models.json --resume --limit_seconds=540
  python experiments/smoke_models.py --tiny --batch_size=4 --sequence_length=64        # proves the command on a CPU

All programs are compiled first and side by side, on as many threads as there are cores. Then one family after the other
takes its steps on the first device and frees its memory. A family that fails is recorded with its reason, and the
others go on. Without --data the tokens are drawn from Zipf's law, whose frequencies a model learns at once. A loss that
does not start at the logarithm of the vocabulary, or does not fall, counts as a failure.
"""

import gc
import json
import math
import pathlib
import sys
import time

from absl import flags

from configs import CONFIGS, page
from configs.gla_paper import at_340m
from lin_jax import files
from lin_jax.config import REMAT_POLICIES, DataConfig, MeshConfig, OptimConfig, validate
from lin_jax.data import train_iterator
from lin_jax.mixers.gated_delta_net import GatedDeltaNetConfig
from lin_jax.mixers.simple_gla import SimpleGLAConfig
from running import commands, records
from speed import training

# Layers that no named config has at this size. The keys of Gated DeltaNet's three heads of 256 have three quarters of
# the width, as its authors advise. Simple GLA and linear attention stand in GLA's place.
_OTHERS = {"gated_deltanet_340m": lambda: at_340m(GatedDeltaNetConfig(heads=3), depth=21),
           "simple_gla_340m": lambda: at_340m(SimpleGLAConfig()),
           "linear_attention_340m": training.linear_attention_340m}
FAMILIES = {name: CONFIGS.get(name) or _OTHERS[name] for name in (
    "transformer_340m", "retnet_340m", "gla_340m", "simple_gla_340m", "linear_attention_340m", "deltanet_340m",
    "deltanet_swa_340m", "deltanet_global_340m", "gated_deltanet_340m", "hgrn2_340m", "tnl_385m", "mamba2_340m",
    "mamba_340m")}
_OUTCOME = ("reason", "loss_first", "loss_last", "losses", "tokens_per_s", "step_ms", "mfu", "memory_gib", "compile_s",
            "first_step_s")

_FAMILIES = flags.DEFINE_list("families", list(FAMILIES), "Families to train.")
_STEPS = flags.DEFINE_integer("steps", 30, "Optimizer steps.", lower_bound=2)
_TIMED = flags.DEFINE_integer("timed_steps", 15, "How many of the last steps are timed.", lower_bound=1)
_BATCH = flags.DEFINE_integer("batch_size", 16, "Sequences per step.", lower_bound=1)
_LENGTH = flags.DEFINE_integer("sequence_length", 2048, "Tokens per sequence.", lower_bound=2)
_REMAT = flags.DEFINE_enum("remat", "dots", REMAT_POLICIES, "What a block recomputes in its backward pass.")
_RATE = flags.DEFINE_float("learning_rate", 1e-3, "Learning rate of AdamW after the warmup, which is a sixth of the "
                           "steps.")
_DATA = flags.DEFINE_string("data", "", "Dataset directory; by default tokens are drawn from Zipf's law.")
_TINY = flags.DEFINE_bool("tiny", False, "Trains every mixer's smallest example: width 32, two layers, 257 tokens, "
                          "float32.")
_OUT = flags.DEFINE_string("out", "", "JSON file that receives a record per family.")
_RESUME = flags.DEFINE_bool("resume", False, "Skips the families that --out has for this device, this setting and "
                            "these sources.")
_LIMIT = flags.DEFINE_float("limit_seconds", 0, "Begins no family after this time; 0 for no limit.", lower_bound=0)


def main(_):
  start = time.monotonic()
  if _TIMED.value >= _STEPS.value:
    raise ValueError(f"--timed_steps={_TIMED.value}: must be less than --steps={_STEPS.value}")
  path = pathlib.Path(_OUT.value) if _OUT.value else None
  if _RESUME.value and not path:
    raise ValueError("--resume needs --out, the file to go on with")
  rows = page.load_smoke(path) if path and path.exists() else []
  done = [_identity(record) for record in rows if not record["reason"]] if _RESUME.value else []
  common = training.provenance() | {"run": records.now()}
  runs = [(config, row) for config in map(_config, _FAMILIES.value)
          if _identity(row := common | _description(config)) not in done]
  print(f"{common['device']}: {len(runs)} families")
  failed, left = [], 0
  programs = training.compile_all([config for config, _ in runs])
  for (config, row), program in zip(runs, programs, strict=True):
    if _LIMIT.value and time.monotonic() - start > _LIMIT.value:
      left += 1
      continue
    row |= _trained(config, program)
    _print(row)
    if row["reason"]:
      failed.append(row["family"])
    rows = [record for record in rows if _identity(record) != _identity(row)] + [row]
    if path:
      files.write(path, "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
  if left:
    print(f"stopped after {_LIMIT.value:g} s with {left} families left; --resume goes on")
  if failed:
    print("failed:", *failed, file=sys.stderr)
    sys.exit(1)


def _config(family):
  if family not in FAMILIES:
    raise ValueError(f"--families={family}: unknown; known: {', '.join(FAMILIES)}")
  config = FAMILIES[family]()
  config.name, config.remat, config.mesh = family, _REMAT.value, MeshConfig(1, 1, 1)
  config.data = DataConfig(path=_DATA.value, sequence_length=_LENGTH.value, batch_size=_BATCH.value)
  config.optim = OptimConfig(steps=_STEPS.value, warmup_steps=_STEPS.value // 6, learning_rate=_RATE.value,
                             final_learning_rate=_RATE.value / 10)
  return validate(training.shrunk(config) if _TINY.value else config)


def _description(config):
  return {"family": config.name, **training.description(config), "timed_steps": _TIMED.value,
          "data": pathlib.Path(_DATA.value).name if _DATA.value else training.ZIPF}


def _identity(record):
  varying = ("run", "command", "git_commit", *_OUTCOME)
  return json.dumps({name: value for name, value in record.items() if name not in varying}, sort_keys=True)


def _trained(config, program):
  try:
    result = training.measure(program.result(), _batches(config), _TIMED.value)
    logarithm, first, last = math.log(config.model.vocab_size), result["losses"][0], result["losses"][-1]
    if not (abs(first - logarithm) < 0.5 and last < 0.97 * first):
      raise ArithmeticError(f"loss {first:.3f} to {last:.3f}: expected to start at {logarithm:.3f} and to fall by 3%")
    return {"reason": "", "loss_first": first, "loss_last": last} | result
  except Exception as e:  # one family that cannot run must not cost the others their record
    return dict.fromkeys(_OUTCOME) | {"reason": f"{type(e).__name__}: {e}".splitlines()[0][:300]}
  finally:
    gc.collect()


def _batches(config):
  if not config.data.path:
    return training.drawn_batches(config, config.optim.steps)
  iterator = train_iterator(config.data, config.seed, vocab_size=config.model.vocab_size)
  return [next(iterator) for _ in range(config.optim.steps)]


def _print(row):
  if row["reason"]:
    print(f"{row['family']:>24}  failed: {row['reason']}", flush=True)
    return
  mfu = "" if row["mfu"] is None else f"MFU {100 * row['mfu']:.1f}%, "
  print(f"{row['family']:>24}  {row['parameters'] / 1e6:6.1f}M  loss {row['loss_first']:.3f} to "
        f"{row['loss_last']:.3f}  {row['tokens_per_s']:,.0f} tokens/s, {mfu}{row['memory_gib']:.2f} GiB, compiled in "
        f"{row['compile_s']:.1f} s", flush=True)


if __name__ == "__main__":
  commands.run(main, cached=True)
