"""Tiny runs that are killed and resumed, and everything that must be equal at their ends."""

import collections
import contextlib
import json
import multiprocessing
import os
import pathlib
import random
import signal
import time

import jax

from lin_jax import metrics
from lin_jax.checkpoint import Checkpoints, load_model
from lin_jax.config import CheckpointConfig, DataConfig, EvalConfig, LogConfig, ModelConfig, OptimConfig, TrainConfig
from lin_jax.manifests import read_manifest
from lin_jax.mixers.gla import GLAConfig
from lin_jax.training import train

_CLOCK = "tokens_per_second", "mfu", "evaluation_seconds", "save_seconds"


def campaign(folder: pathlib.Path, data: pathlib.Path, runs: int, steps: int, seed: int) -> dict:
  """Makes the runs in `folder`, and returns their number, what the signals met, and the runs that ended differently."""
  config = _config(data, steps)
  if _run(config, folder / "unbroken"):
    raise ValueError(f"the unbroken run has failed: {(folder / 'unbroken.log').read_text()}")
  expected, lines = end(folder / "unbroken"), _lines(folder / "unbroken")
  counts, different = collections.Counter(), []
  for i in range(runs):
    draw = random.Random(f"{seed} {i}")
    number, line = draw.choice([signal.SIGTERM, signal.SIGKILL]), draw.randrange(lines)
    workdir = folder / f"{i:03d}"
    code = _run(config, workdir, number, line, draw.uniform(0, 0.3 if line else 3.0))
    reached = [r["step"] for r in metrics.read(workdir / "metrics.jsonl")]
    what = "over before the signal" if code is None else f"{number.name} {'after' if reached else 'before'} a record"
    if not (code is None or code in (0, -number)) or _run(config, workdir):
      raise ValueError(f"{workdir} has failed (exit code {code}): {(folder / f'{workdir.name}.log').read_text()}")
    counts[what] += 1
    found = end(workdir)
    wrong = [name for name, value in expected.items() if found[name] != value]
    if wrong:
      different.append({"run": i, "signal": number.name, "line": line, "differs": wrong})
    print(f"{i + 1}/{runs}  {number.name} after line {line}, at step {max(reached, default='-')}: "
          f"{'differs in ' + ', '.join(wrong) if wrong else 'equal'}", flush=True)
  return {"runs": runs, "steps": steps, "seed": seed, "equal": runs - len(different),
          "signals": dict(sorted(counts.items())), "different": different}


def end(workdir: pathlib.Path) -> dict:
  """Returns everything that must be equal at the end of a run."""
  from lin_jax import tensorboard

  step = load_model(workdir)[0].optim.steps  # loading verifies the parameters by their checksums
  with contextlib.closing(Checkpoints(workdir)) as checkpoints:
    kept, best = checkpoints.steps(), checkpoints.best()
  lines = [{name: value for name, value in record.items() if name not in _CLOCK}
           for record in metrics.read(workdir / "metrics.jsonl")]
  events = [key[0] for path in (workdir / "tensorboard").iterdir() for key, _ in tensorboard.scalars(path)]
  return {"state": json.loads((workdir / f"checkpoints/{step}/checksums/crc32.json").read_text()), "records": lines,
          "kept": kept, "best": best, "tensorboard": events}


def _config(data, steps):
  """Returns a run in which logging, evaluation and saving are due in every combination."""
  vocab_size = read_manifest(data)["tokenizer"]["vocab_size"]
  model = ModelConfig(mixer=GLAConfig(heads=2, gate_rank=4, implementation="reference"), vocab_size=vocab_size,
                      width=32, depth=2, mlp_width=64, dtype="float32")
  return TrainConfig(
      name="killed", model=model, data=DataConfig(path=str(data), sequence_length=64, batch_size=8, worker_threads=1),
      optim=OptimConfig(steps=steps, warmup_steps=2, learning_rate=1e-2, final_learning_rate=1e-3),
      eval=EvalConfig(every=3, batches=2), checkpoint=CheckpointConfig(every=4, keep_last=2, keep_best=1),
      log=LogConfig(every=2))


def _run(config, workdir, number=None, line=0, seconds=0.0):
  """Trains in a process, which gets the signal `number`, if any, `seconds` after it has printed `line` lines.

  Returns its exit code, or None if it ended before the signal.
  """
  context = multiprocessing.get_context("forkserver")
  context.set_forkserver_preload(["lin_jax.training", "lin_jax.tensorboard"])  # a start then takes less than a second
  process = context.Process(target=_train, args=(config, workdir, dict(os.environ)))
  process.start()
  if number:
    while process.is_alive() and _lines(workdir) < line:
      time.sleep(0.01)
  process.join(seconds if number else None)
  over = process.exitcode is not None
  if not over:
    os.kill(process.pid, number)
    process.join()
  return None if over and number else process.exitcode


def _lines(workdir):
  log = pathlib.Path(f"{workdir}.log")
  return log.read_bytes().count(b"\n") if log.exists() else 0


def _train(config, workdir, environment):
  os.environ |= environment
  # Processes after the first find every program compiled and write none, so that a kill cannot cut one short.
  jax.config.update("jax_compilation_cache_dir", str(workdir.parent / "cache"))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  with open(f"{workdir}.log", "ab") as log:
    for descriptor in (1, 2):
      os.dup2(log.fileno(), descriptor)
  train(config, workdir)
