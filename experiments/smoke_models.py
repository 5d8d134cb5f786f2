"""Trains every family at about 340M parameters for a few steps at one setting: loss, speed, memory, compile time.

  python experiments/smoke_models.py --out=experiments/results/smoke_models.json --resume --limit_seconds=540
  python experiments/smoke_models.py --tiny --batch_size=4 --sequence_length=64        # proves the command on a CPU

All programs are compiled first and side by side, on as many threads as there are cores; then one family after the other
takes its steps on the first device, and its memory is given back. One that fails is recorded with its reason and leaves
the others alone. Without --data the tokens are drawn from Zipf's law, of which a model learns the frequencies at once:
a loss that does not start at the logarithm of the vocabulary, or does not fall, counts as a failure.
"""

import concurrent.futures
import datetime
import gc
import hashlib
import json
import math
import os
import pathlib
import sys
import time

import jax
import numpy as np
from absl import flags

import commands
import configs
import model_page
from configs.paper import at_340m
from lin_jax import flops, mixers, sharding
from lin_jax import workdir as workdirs
from lin_jax.config import REMAT_POLICIES, DataConfig, MeshConfig, OptimConfig, TrainConfig, to_dict, validate
from lin_jax.data import train_iterator
from lin_jax.mixers.gated_delta_net import GatedDeltaNetConfig
from lin_jax.mixers.linear_attention import LinearAttentionConfig
from lin_jax.mixers.simple_gla import SimpleGLAConfig
from lin_jax.training import make_state, make_train_step

_ROOT = pathlib.Path(__file__).resolve().parent.parent
# Layers that no named config has at this size: Gated DeltaNet with three heads of 256, the three quarters of the width
# that its authors advise; simple GLA and linear attention in GLA's place.
_OTHERS = {"gated_deltanet_340m": lambda: at_340m(GatedDeltaNetConfig(heads=3), depth=21),
           "simple_gla_340m": lambda: at_340m(SimpleGLAConfig()),
           "linear_attention_340m": lambda: at_340m(LinearAttentionConfig())}
FAMILIES = {name: configs.CONFIGS.get(name) or _OTHERS[name] for name in (
    "transformer_340m", "retnet_340m", "gla_340m", "simple_gla_340m", "linear_attention_340m", "deltanet_340m",
    "deltanet_swa_340m", "deltanet_global_340m", "gated_deltanet_340m", "hgrn2_340m", "tnl_385m", "mamba2_340m",
    "mamba_340m")}
_OUTCOME = ("reason", "loss_first", "loss_last", "losses", "tokens_per_s", "step_ms", "mfu", "memory_gib", "compile_s")

_FAMILIES = flags.DEFINE_list("families", list(FAMILIES), "Which of them.")
_STEPS = flags.DEFINE_integer("steps", 30, "Optimizer steps.", lower_bound=2)
_TIMED = flags.DEFINE_integer("timed_steps", 15, "The last of them, which are timed.", lower_bound=1)
_BATCH = flags.DEFINE_integer("batch_size", 16, "Sequences per step.", lower_bound=1)
_LENGTH = flags.DEFINE_integer("sequence_length", 2048, "Tokens per sequence.", lower_bound=2)
_REMAT = flags.DEFINE_enum("remat", "dots", REMAT_POLICIES, "What a block recomputes in its backward pass.")
_RATE = flags.DEFINE_float("learning_rate", 1e-3, "Of AdamW, after a sixth of the steps as warmup.")
_DATA = flags.DEFINE_string("data", "", "Dataset directory; tokens drawn from Zipf's law if empty.")
_TINY = flags.DEFINE_bool("tiny", False, "Width 32, two layers, 257 tokens, float32: every mixer's smallest example.")
_OUT = flags.DEFINE_string("out", "", "JSON file that receives a record per family.")
_RESUME = flags.DEFINE_bool("resume", False, "Skip what --out holds of this device, this setting and these sources.")
_LIMIT = flags.DEFINE_float("limit_seconds", 0, "Begin no family after this time; 0 for no limit.", lower_bound=0)


def main(_):
  start = time.monotonic()
  if _TIMED.value >= _STEPS.value:
    raise ValueError(f"--timed_steps={_TIMED.value}: must be less than --steps={_STEPS.value}")
  path = pathlib.Path(_OUT.value) if _OUT.value else None
  if _RESUME.value and not path:
    raise ValueError("--resume needs --out, the file to go on with")
  records = model_page.load_smoke(path) if path and path.exists() else []
  done = [_identity(record) for record in records if not record["reason"]] if _RESUME.value else []
  common = _common()
  runs = [(config, row) for config in map(_config, _FAMILIES.value)
          if _identity(row := common | _description(config)) not in done]
  print(f"{common['device']}: {len(runs)} families")
  failed, left = [], 0
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    programs = [pool.submit(_compile, config) for config, _ in runs]
    # On a CPU too: a compilation beside it would disturb what is timed.
    concurrent.futures.wait(programs)
  for (config, row), program in zip(runs, programs, strict=True):
    if _LIMIT.value and time.monotonic() - start > _LIMIT.value:
      left += 1
      continue
    row |= _trained(config, program)
    _print(row)
    if row["reason"]:
      failed.append(row["family"])
    records = [record for record in records if _identity(record) != _identity(row)] + [row]
    if path:
      commands.write(path, "[\n" + ",\n".join(map(json.dumps, records)) + "\n]\n")
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
  return validate(_shrunk(config) if _TINY.value else config)


def _shrunk(config: TrainConfig) -> TrainConfig:
  model = config.model
  for field in ("mixer", "hybrid_mixer"):
    if (mixer := getattr(model, field)) is not None:
      setattr(model, field, mixers.config_class(mixers.name_of(mixer)).examples()[0])
  model.vocab_size, model.width, model.depth, model.dtype = 257, 32, 2, "float32"
  model.mlp_width, model.hybrid_layers = min(model.mlp_width, 64), model.hybrid_layers and (1,)
  return config


def _description(config):
  _, _, abstract, _ = make_state(config, _mesh(config))
  return {"family": config.name, "parameters": sum(leaf.size for leaf in jax.tree.leaves(abstract.params)),
          "batch_size": config.data.batch_size, "sequence_length": config.data.sequence_length,
          "dtype": config.model.dtype, "remat": config.remat, "steps": config.optim.steps, "timed_steps": _TIMED.value,
          "data": pathlib.Path(_DATA.value).name if _DATA.value else "drawn from Zipf's law",
          "model": to_dict(config)["model"]}


def _common():
  environment = workdirs.environment()
  digest = hashlib.sha256()
  for source in sorted(path for folder in ("kernels", "lin_jax") for path in (_ROOT / folder).rglob("*")):
    if source.suffix in (".py", ".json"):
      digest.update(source.read_bytes())
  versions = {name: environment[name] for name in ("python", "jax", "jaxlib", "flax", "optax")}
  return {"device": environment["device_kind"], "versions": versions | {"sources": digest.hexdigest()[:12]},
          "git_commit": environment["git_commit"], "command": " ".join(["python", *sys.argv]),
          "run": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}


def _identity(record):
  varying = ("run", "command", "git_commit", *_OUTCOME)
  return json.dumps({name: value for name, value in record.items() if name not in varying}, sort_keys=True)


def _mesh(config):
  return sharding.make_mesh(config.mesh, jax.devices()[:1])


def _compile(config):
  """(create, step, seconds): the compiled initialisation and optimizer step."""
  start = time.monotonic()
  mesh = _mesh(config)
  graph, optimizer, abstract, create = make_state(config, mesh)
  shape = config.data.batch_size, config.data.sequence_length
  placed = sharding.batch_sharding(mesh)
  batch = {name: jax.ShapeDtypeStruct(shape, np.float32 if name == "mask" else np.int32, sharding=placed)
           for name in ("tokens", "targets", "segment_ids", "mask")}
  step = make_train_step(config, graph, optimizer, abstract).lower(abstract, batch).compile()
  create = create.lower().compile()
  return create, step, time.monotonic() - start


def _trained(config, program):
  try:
    create, step, seconds = program.result()
    result = _measured(config, create, step) | {"compile_s": round(seconds, 1)}
    logarithm, first, last = math.log(config.model.vocab_size), result["loss_first"], result["loss_last"]
    if not (abs(first - logarithm) < 0.5 and last < 0.97 * first):
      raise ArithmeticError(f"loss {first:.3f} to {last:.3f}: expected to start at {logarithm:.3f} and to fall by 3%")
    return {"reason": ""} | result
  except Exception as e:  # one family that cannot run must not cost the others their record
    return dict.fromkeys(_OUTCOME) | {"reason": f"{type(e).__name__}: {e}".splitlines()[0][:300]}
  finally:
    create = step = None
    gc.collect()


def _measured(config, create, step):
  placed = sharding.batch_sharding(_mesh(config))
  batches = jax.block_until_ready([jax.device_put(batch, placed) for batch in _batches(config)])
  state, losses = create(), []
  for i, batch in enumerate(batches):
    if i == len(batches) - _TIMED.value:
      jax.block_until_ready(state)
      start = time.perf_counter()
    state, metrics = step(state, batch)
    losses.append(metrics["loss"])
  jax.block_until_ready(state)
  seconds = (time.perf_counter() - start) / _TIMED.value
  losses = [round(float(loss), 4) for loss in losses]
  memory = step.memory_analysis()
  needed = (memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
            - memory.alias_size_in_bytes)
  rate = config.data.batch_size * config.data.sequence_length / seconds
  peak = flops.peak_flops(jax.devices()[0].device_kind)
  work = flops.training_flops_per_token(config.model, config.data.sequence_length)
  return {"loss_first": losses[0], "loss_last": losses[-1], "losses": losses, "tokens_per_s": round(rate, 1),
          "step_ms": round(1000 * seconds, 2), "mfu": rate * work / peak if peak else None,
          "memory_gib": round(needed / 2**30, 3)}


def _batches(config):
  if config.data.path:
    iterator = train_iterator(config.data, config.seed, vocab_size=config.model.vocab_size)
    return [next(iterator) for _ in range(config.optim.steps)]
  random, vocabulary = np.random.default_rng(0), config.model.vocab_size
  weights = 1 / np.arange(1, vocabulary + 1)
  shape = config.data.batch_size, config.data.sequence_length + 1
  batches = []
  for _ in range(config.optim.steps):
    ids = random.choice(vocabulary, shape, p=weights / weights.sum()).astype(np.int32)
    batches.append(dict(tokens=ids[:, :-1], targets=ids[:, 1:], segment_ids=np.zeros_like(ids[:, 1:]),
                        mask=np.ones(ids[:, 1:].shape, np.float32)))
  return batches


def _print(row):
  if row["reason"]:
    print(f"{row['family']:>24}  failed: {row['reason']}", flush=True)
    return
  mfu = "" if row["mfu"] is None else f"MFU {100 * row['mfu']:.1f}%, "
  print(f"{row['family']:>24}  {row['parameters'] / 1e6:6.1f}M  loss {row['loss_first']:.3f} to "
        f"{row['loss_last']:.3f}  {row['tokens_per_s']:,.0f} tokens/s, {mfu}{row['memory_gib']:.2f} GiB, compiled in "
        f"{row['compile_s']:.1f} s", flush=True)


if __name__ == "__main__":
  commands.run(main)
