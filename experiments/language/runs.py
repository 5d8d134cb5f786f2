"""One training run: `Run` names it, `train_config` and `setting` determine it, and `finish` makes it."""

import dataclasses
import gc
import hashlib
import json
import math
import pathlib
import shutil
import statistics

from lin_jax import files, metrics
from lin_jax.config import CheckpointConfig, DataConfig, EvalConfig, LogConfig, OptimConfig, TrainConfig, to_dict
from lin_jax.data import TokenDataset
from lin_jax.manifests import read_manifest
from lin_jax.model import parameter_count
from lin_jax.training import train
from running import records

from .models import MODELS, tiny


@dataclasses.dataclass(frozen=True)
class Run:
  """A model and the way to train it. Batches have 32,768 tokens at any context length."""

  model: str  # a name in MODELS
  learning_rate: float  # at its peak; the last step has a tenth of it
  seed: int = 0
  steps: int = 900
  sequence_length: int = 1024
  carried_windows: int = 1  # consecutive windows of a row, which keeps its state between them without a gradient
  tiny: bool = False  # the same layers with thousands of parameters, on batches of 512 tokens

  def train_config(self, data: str) -> TrainConfig:
    """Returns the run on the dataset directory `data`. Raises ValueError when there is none."""
    model, length, rows = MODELS[self.model](), self.sequence_length, 32768 // self.sequence_length
    if self.tiny:
      model, length, rows = tiny(model, read_manifest(data)["tokenizer"]["vocab_size"]), 64, 8
    return TrainConfig(
        name=self.model, seed=self.seed, model=model,
        data=DataConfig(path=data, sequence_length=length, batch_size=rows, carried_windows=self.carried_windows),
        optim=OptimConfig(steps=self.steps, warmup_steps=self.steps // 10, learning_rate=self.learning_rate,
                          final_learning_rate=self.learning_rate / 10, weight_decay=0.1),
        # The whole validation split is read at the end. A run takes a minute, so it is saved only when it stops or
        # ends.
        eval=EvalConfig(every=0, batches=0), checkpoint=CheckpointConfig(every=0, keep_last=1, keep_best=0),
        log=LogConfig(every=max(1, self.steps // 20), tensorboard=False))


def setting(config: TrainConfig) -> dict:
  """Returns everything that determines the run as JSON: its model, optimizer, seed, and the data by its checksums."""
  values = json.loads(json.dumps(to_dict(config)))
  splits = read_manifest(config.data.path)["splits"]
  shards = [shard["sha256"] for split in ("train", "val") for shard in splits[split]["shards"]]
  values["data"] |= {"sha256": hashlib.sha256(" ".join(shards).encode()).hexdigest()[:16],
                     "train_tokens": splits["train"]["tokens"]}
  for name in ("path", "worker_threads"):
    del values["data"][name]
  values["eval"] = {"split": "val", "batches": config.eval.batches or "all"}
  if not config.optim.decay_steps:  # older records lack the field
    del values["optim"]["decay_steps"]
  for name in ("remat", "unroll", "mesh", "checkpoint", "log"):
    del values[name]
  return values


def folder(workdir: pathlib.Path, config: TrainConfig) -> pathlib.Path:
  """Returns the run's own directory in `workdir`."""
  digest = hashlib.sha256(records.key(setting(config)).encode()).hexdigest()[:8]
  return workdir / f"{config.name}_{config.optim.learning_rate:g}_seed{config.seed}_{digest}"


def finish(config: TrainConfig, workdir: pathlib.Path) -> dict | None:
  """Trains to the end in `workdir`, from its last checkpoint if it has one; None if SIGTERM has stopped the run.

  Returns the record of the run, which `workdir/record.json` keeps, so that the run is not repeated. Only the parameters
  of its checkpoint stay. A loss that is not finite ends a run as diverged, without a held-out loss.
  """
  file = workdir / "record.json"
  if file.exists():
    return json.loads(file.read_text(encoding="utf-8"))
  loss = bits = None
  try:
    result = train(config, workdir)
    if result["preempted"] == "SIGINT":
      raise KeyboardInterrupt  # of the sweep as well
    if result["preempted"]:
      return None
    if math.isfinite(result["eval_loss"]):  # otherwise the run diverged in its last step
      loss, bits = result["eval_loss"], result["bits_per_byte"]
  except FloatingPointError as e:
    print(e, flush=True)
  finally:
    gc.collect()  # a run's state has reference cycles, and the next run needs its memory
  tokens = config.optim.steps * config.data.batch_size * config.data.sequence_length
  rates = [line["tokens_per_second"] for line in metrics.read(workdir / "metrics.jsonl") if "tokens_per_second" in line]
  train_split, val = (TokenDataset(config.data.path, split) for split in ("train", "val"))
  record = {
      "model": config.name, "learning_rate": config.optim.learning_rate, "seed": config.seed,
      "parameters": parameter_count(config.model), "tokens": tokens, "epochs": round(tokens / train_split.tokens, 4),
      "data": pathlib.Path(config.data.path).name, "evaluated_on": f"all {val.tokens} tokens of split val",
      "diverged": loss is None, "held_out_loss": loss, "bits_per_byte": bits,
      "perplexity": None if loss is None else metrics.perplexity(loss),
      "tokens_per_second": round(statistics.median(rates), 1) if rates else None,
      "run": records.now(), **records.provenance(), "setting": setting(config)}
  files.write(file, json.dumps(record) + "\n")
  for item in ("optimizer", "data"):
    for path in workdir.glob(f"checkpoints/*/{item}"):
      shutil.rmtree(path)
  return record
