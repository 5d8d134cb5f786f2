"""Makes one training run and its record. A run that starts from another one makes that one first, in its own folder."""

import dataclasses
import gc
import json
import math
import pathlib
import shutil
import statistics

from lin_jax import files, metrics
from lin_jax.checkpoint import load_model, save_model
from lin_jax.data import TokenDataset
from lin_jax.linearize import linearize
from lin_jax.model import parameter_count
from lin_jax.training import train
from running import records

from .evaluation import held_out
from .runs import Run, folder


def finish(run: Run, data: str, workdir: pathlib.Path) -> dict | None:
  """Trains to the end in the run's `folder`, from its last checkpoint if it has one; None if SIGTERM has stopped it.

  Returns the record of the run, which the file record.json there keeps, so that the run is not repeated. Only the
  parameters of its checkpoint stay. A loss that is not finite ends a run as diverged, without a held-out loss.
  """
  place, config = folder(workdir, run, data), run.train_config(data)
  file, start, result = place / "record.json", None, None
  if file.exists():
    return json.loads(file.read_text(encoding="utf-8"))
  if run.start:
    if (start := finish(run.start, data, workdir)) is None:
      return None
    if start["diverged"]:
      raise ValueError(f"{run.start.model}, from which it starts, has diverged")
    config = dataclasses.replace(config, init_from=str(_linearized_start(run, data, workdir)))
  try:
    if run.decay_steps and not place.exists() and not _branched(run, data, workdir):
      return None
    if (result := _trained(config, place)) is None:
      return None
  except FloatingPointError as e:
    print(e, flush=True)
    place.mkdir(parents=True, exist_ok=True)  # of a branch whose trunk has diverged
  if result and not math.isfinite(result["eval_loss"]):
    result = None  # the run diverged in its last step
  record = _record(run, data, place, start, result)
  files.write(file, json.dumps(record) + "\n")
  unneeded = [path for item in ("optimizer", "data") for path in place.glob(f"checkpoints/*/{item}")]
  for path in [*unneeded, pathlib.Path(config.init_from)] if run.start else unneeded:
    shutil.rmtree(path)
  return record


def _trained(config, place):
  """The results of the run, or None if SIGTERM has stopped it."""
  try:
    result = train(config, place)
  finally:
    gc.collect()  # a run's state has reference cycles, and the next run needs its memory
  if result["preempted"] == "SIGINT":
    raise KeyboardInterrupt  # of the sweep as well
  return None if result["preempted"] else result


def _branched(run, data, workdir):
  """Lengthens the trunk to where `run` goes off, and copies it there. Whether nothing has stopped the trunk.

  Branches go off in the order of their lengths, because a trunk keeps its last checkpoint alone.
  """
  trunk = run.trunk()
  source = folder(workdir, trunk, data)
  if _trained(trunk.train_config(data), source) is None:
    return False
  with files.whole_folder(folder(workdir, run, data)) as work:
    shutil.copytree(source, work, dirs_exist_ok=True, ignore=shutil.ignore_patterns("lock"))
  return True


def _linearized_start(run, data, workdir):
  """The folder of the model with which `run` begins. The run that it comes from is done."""
  place, source = folder(workdir, run, data), folder(workdir, run.start, data)
  start = place.with_name(f"{place.name}_start")
  if not start.exists():
    config, model = load_model(source)
    config.model, model = linearize(config.model, model, run.seed)
    with files.whole_folder(start) as work:
      save_model(work, config, model)
  return start


def _record(run, data, place, start, result):
  """The record of a run that has ended. `start` is the record of the run with which it began, if there is one."""
  config = run.train_config(data)
  tokens = config.optim.steps * config.data.batch_size * config.data.sequence_length
  tokens += start["tokens"] if start else 0
  rates = [line["tokens_per_second"] for line in metrics.read(place / "metrics.jsonl") if "tokens_per_second" in line]
  train_split, val = (TokenDataset(data, split) for split in ("train", "val"))
  loss = result and result["eval_loss"]
  read = f"{config.eval.batches} batches" if config.eval.batches else f"all {val.tokens} tokens"
  began = {"start": {name: start[name] for name in ("model", "tokens", "bits_per_byte")}} if start else {}
  return {
      "model": run.model, "learning_rate": run.learning_rate, "seed": run.seed,
      "parameters": parameter_count(config.model), "tokens": tokens, "epochs": round(tokens / train_split.tokens, 4),
      "data": pathlib.Path(data).name, "evaluated_on": f"{read} of split val",
      "diverged": loss is None, "held_out_loss": loss, "bits_per_byte": result and result["bits_per_byte"],
      "perplexity": result and metrics.perplexity(loss),
      **(held_out(place, config, run.by_place) if result else {"pair_losses": None, "losses": None}),
      "tokens_per_second": round(statistics.median(rates), 1) if rates else None,
      **began, "run": records.now(), **records.provenance(), "setting": run.setting(data)}
