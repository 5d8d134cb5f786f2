"""One training run: `Run` names it, `train_config` and `setting` determine it, and `folder` is where it is made."""

import dataclasses
import hashlib
import json
import pathlib

from lin_jax.config import (
  CheckpointConfig,
  DataConfig,
  EvalConfig,
  LogConfig,
  ModelConfig,
  OptimConfig,
  TrainConfig,
  to_dict,
)
from lin_jax.manifests import read_manifest
from lin_jax.mixers import config_class
from running import records

from .models import MODELS, tiny

TOKENS_PER_STEP = 32768
BRANCHES_WARMUP = 90


@dataclasses.dataclass(frozen=True)
class Run:
  """A model and the way to train it. Batches have 32,768 tokens at any context length."""

  model: str  # a name in MODELS
  learning_rate: float  # at its peak; the last step has a tenth of it
  seed: int = 0
  steps: int = 900
  sequence_length: int = 1024
  carried_windows: int = 1  # consecutive windows of a row, which keeps its state between them without a gradient
  staggered: bool = False  # rows of carried windows go on to other text at different steps
  tiny: bool = False  # the same layers with thousands of parameters, on batches of 512 tokens
  start: "Run | None" = None  # the run of which this one trains the linearized model further
  decay_steps: int = 0  # the last steps of a branch, in which the rate falls; 0 for a cosine over all steps
  by_place: bool = False  # its record has losses by the place in a document and the recall of facts, too
  is_trunk: bool = False  # a run at a constant rate, from which branches of its rate and seed go off

  def train_config(self, data: str) -> TrainConfig:
    """Returns the run on the dataset directory `data`. Raises ValueError when there is none."""
    model, length, rows = MODELS[self.model](), self.sequence_length, TOKENS_PER_STEP // self.sequence_length
    if self.tiny:
      model, length, rows = tiny(model, read_manifest(data)["tokenizer"]["vocab_size"]), 64, 8
    return TrainConfig(
        name=self.model, seed=self.seed, model=model,
        data=DataConfig(path=data, sequence_length=length, batch_size=rows, carried_windows=self.carried_windows,
                        staggered=self.staggered),
        optim=OptimConfig(steps=self.steps, learning_rate=self.learning_rate, weight_decay=0.1,
                          final_learning_rate=self.learning_rate / 10, **self._schedule()),
        unroll=0,  # without the stacks in which a scan of layers keeps what its backward pass reads
        # The whole validation split is read at the end, but of a trunk, whose loss nobody uses, and of a tiny run. A
        # run takes a minute, so it is saved only when it stops or ends.
        eval=EvalConfig(every=0, batches=8 if self.is_trunk or self.tiny else 0),
        checkpoint=CheckpointConfig(every=0, keep_last=1, keep_best=0),
        log=LogConfig(every=max(1, self.steps // 20), tensorboard=False))

  def setting(self, data: str) -> dict:
    """Returns everything that determines the run on `data` as JSON: that of its config, and of the run it starts from.
    """
    start = {"start": self.start.setting(data)} if self.start else {}
    return setting(self.train_config(data)) | start

  def _schedule(self):
    if self.is_trunk or self.decay_steps:  # all branches of a trunk have its warmup
      return dict(schedule="wsd", warmup_steps=1 if self.tiny else BRANCHES_WARMUP, decay_steps=self.decay_steps)
    return dict(warmup_steps=self.steps // 10)

  def trunk(self) -> "Run":
    """Returns the run from whose last step this branch goes off."""
    return dataclasses.replace(self, steps=self.steps - self.decay_steps, decay_steps=0, is_trunk=True)

  def changed(self, **fields) -> "Run":
    """Returns the run with other values of `fields`, which the run that it starts from takes too."""
    return dataclasses.replace(self, start=self.start and self.start.changed(**fields), **fields)


def setting(config: TrainConfig) -> dict:
  """Returns everything that determines a run as JSON: its model, optimizer, seed, and the data by its checksums."""
  values = json.loads(json.dumps(to_dict(config)))
  splits = read_manifest(config.data.path)["splits"]
  shards = [shard["sha256"] for split in ("train", "val") for shard in splits[split]["shards"]]
  values["data"] |= {"sha256": hashlib.sha256(" ".join(shards).encode()).hexdigest()[:16],
                     "train_tokens": splits["train"]["tokens"]}
  for name in ("path", "worker_threads"):
    del values["data"][name]
  values["eval"] = {"split": "val", "batches": config.eval.batches or "all"}
  for name in ("remat", "unroll", "mesh", "checkpoint", "log"):
    del values[name]
  return values


def key(setting: dict) -> str:
  """Returns a text that is equal for settings of the same run. A field at its default, or at the `EARLIER` of a model
  or mixer, does not count, because records that are older than the field lack it."""
  defaults = dataclasses.asdict(TrainConfig())
  defaults["model"] |= ModelConfig.EARLIER
  return records.key(_without_defaults(setting, defaults))


def _without_defaults(values, defaults):
  kept = {}
  for name, value in values.items():
    default = defaults.get(name)
    if isinstance(value, dict):
      if name == "start":  # another run's setting
        default = defaults
      elif "type" in value:  # a mixer
        kind = config_class(value["type"])
        default = dataclasses.asdict(kind()) | getattr(kind, "EARLIER", {})
      kept |= {name: inner} if (inner := _without_defaults(value, default or {})) else {}
    elif value != (list(default) if isinstance(default, tuple) else default):
      kept[name] = value
  return kept


def folder(workdir: pathlib.Path, run: Run, data: str) -> pathlib.Path:
  """Returns the run's own directory in `workdir`. A trunk has one for all its lengths."""
  if run.is_trunk:
    run = dataclasses.replace(run, steps=10**6)
  digest = hashlib.sha256(key(run.setting(data)).encode()).hexdigest()[:8]
  return workdir / f"{run.model}_{run.learning_rate:g}_seed{run.seed}_{'trunk_' * run.is_trunk}{digest}"
