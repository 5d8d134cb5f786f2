"""One training run on a synthetic task: `Run` names everything that determines it."""

import dataclasses
import math
from typing import Any

from lin_jax import mixers
from lin_jax.config import DataConfig, ModelConfig, OptimConfig, TrainConfig, validate

from . import TASKS
from .starts import STARTS

# The papers' models on MQAR: matrix memories of two heads, one head of attention.
HEADS = {"attention": 1, "linear_attention": 2, "retention": 2, "gla": 2, "delta_net": 2, "gated_delta_net": 2}

OUTPUTS = ("tied", "mad")

# In these fields the runs of one setting may differ: its best run counts, and all are trained side by side.
RATES = "learning_rate", "final_fraction", "weight_decay"


def _option(default, text):
  return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass(frozen=True)
class Run:
  """A task, a model and the way to train it. The defaults are MQAR's protocol, except for the number of steps."""

  task: str = _option("", "Name of the task.")
  mixer: str = _option("", "Registered name of the sequence mixer.")
  task_fields: dict[str, Any] = dataclasses.field(default_factory=dict)
  mixer_fields: dict[str, Any] = dataclasses.field(default_factory=dict)
  width: int = _option(64, "Width of the model.")
  depth: int = _option(2, "Blocks.")
  mlp_width: int = _option(0, "Width of each block's SwiGLU; 0 for blocks of the mixer alone.")
  dtype: str = _option("float32", "Dtype of activations.")
  norm_eps: float = _option(1e-6, "Number under the square roots of norms, relative to a mean square of 1.")
  start: str = _option("layers", "Start of kernels: layers is each layer's own, normal is N(0, 0.02^2) for all, fan_in "
                                 "is N(0, 1 / (3 inputs)) for all, zoology and mad are the rules of MQAR's and MAD's "
                                 "authors.")
  output: str = _option("tied", "What turns outputs into logits: tied is the transposed embedding, and in compression "
                                "two linear layers before it; mad is a matrix of its own with a bias, and in "
                                "compression MAD's decoder before it.")
  embedding_dropout: float = _option(0.0, "Fraction of the entries of embeddings that a training step drops.")
  learning_rate: float = _option(1e-3, "Peak learning rate of AdamW, which falls as a cosine.")
  final_fraction: float = _option(0.0, "Fraction of the learning rate that is left at the last step.")
  warmup_steps: int = _option(0, "Steps of linear warmup.")
  weight_decay: float = _option(0.1, "Weight decay of matrices.")
  beta2: float = _option(0.999, "Second beta of AdamW.")
  batch_size: int = _option(128, "Sequences per step.")
  steps: int = _option(1000, "Optimizer steps at most.")
  examples: int = _option(0, "Training examples; 0 is the task's own number, or new examples in every batch if it has "
                             "none.")
  test_examples: int = _option(1280, "Held-out examples.")
  validation_examples: int = _option(0, "Further held-out examples, whose loss selects one of a run's tests.")
  evaluate_every: int = _option(100, "Steps between tests.")
  stop_accuracy: float = _option(0.99, "Held-out accuracy at which the task counts as solved and the run ends.")
  seed: int = _option(0, "Seed of parameters and data.")

  def build_task(self, **changes) -> Any:
    """Returns the task. Raises ValueError for an unknown one or a setting that it refuses."""
    if self.task not in TASKS:
      raise ValueError(f"task={self.task!r}: must be one of {', '.join(TASKS)}")
    return _build(TASKS[self.task], self.task, self.task_fields | changes)

  def training_task(self) -> Any:
    """Returns the task that draws training examples."""
    return self.build_task(**({"training": True} if "training" in _fields(TASKS[self.task]) else {}))

  def training_examples(self) -> int:
    """Returns the number of different training examples, 0 if every batch is new."""
    return self.examples or getattr(self.build_task(), "train_examples", 0)

  def train_config(self) -> TrainConfig:
    """Returns model, data and optimizer, checked. Raises ValueError for values that break a rule."""
    for field, least in (("evaluate_every", 1), ("test_examples", 1), ("validation_examples", 0), ("examples", 0)):
      if getattr(self, field) < least:
        raise ValueError(f"{field}={getattr(self, field)}: must be at least {least}")
    if 0 < self.training_examples() < self.batch_size:
      raise ValueError(f"batch_size={self.batch_size}: there are only {self.training_examples()} training examples")
    if not 0 <= self.final_fraction <= 1:
      raise ValueError(f"final_fraction={self.final_fraction}: must lie in [0, 1]")
    if not 0 <= self.embedding_dropout < 1:
      raise ValueError(f"embedding_dropout={self.embedding_dropout}: must lie in [0, 1)")
    for field, known in (("start", STARTS), ("output", OUTPUTS)):
      if getattr(self, field) not in known:
        raise ValueError(f"{field}={getattr(self, field)!r}: must be one of {', '.join(known)}")
    task = self.build_task()
    model = ModelConfig(mixer=self._mixer_config(), vocab_size=task.vocab_size, width=self.width, depth=self.depth,
                        mlp_width=self.mlp_width, norm_eps=self.norm_eps, start="layers", dtype=self.dtype)
    data = DataConfig(sequence_length=task.sequence_length, batch_size=self.batch_size)
    optim = OptimConfig(steps=self.steps, warmup_steps=self.warmup_steps, learning_rate=self.learning_rate,
                        final_learning_rate=self.final_fraction * self.learning_rate, beta2=self.beta2,
                        weight_decay=self.weight_decay, clip_norm=math.inf)
    return validate(TrainConfig(seed=self.seed, model=model, data=data, optim=optim))

  def setting(self) -> dict:
    """Returns everything that determines the run, defaults included, as JSON holds it."""
    resolved = {"task_fields": dataclasses.asdict(self.build_task()),
                "mixer_fields": dataclasses.asdict(self._mixer_config()), "examples": self.training_examples()}
    return dataclasses.asdict(self) | resolved

  def _mixer_config(self):
    # The papers' small models, and all records, have what a mixer's config had before it was given its newest fields.
    fields = dict(getattr(mixers.config_class(self.mixer), "EARLIER", {}))
    fields |= {"heads": HEADS[self.mixer]} if self.mixer in HEADS else {}
    if self.mixer == "gated_delta_net":  # its heads have their own size; other mixers' heads divide the width
      fields |= {"head_dim": self.width // int(self.mixer_fields.get("heads", 2)), "expand_v": 1.0}
    return _build(mixers.config_class(self.mixer), self.mixer, fields | self.mixer_fields)


def whole(setting: dict) -> dict:
  """Completes a record's setting with the defaults of fields that `Run` did not have when it was made.

  Raises ValueError for fields that it does not have.
  """
  try:
    return Run(**setting).setting()
  except TypeError as e:
    raise ValueError(f"not the setting of a run on a synthetic task: {e}") from e


def without_rates(setting: dict) -> dict:
  """Returns the setting without `RATES`, so that the runs of one setting are equal."""
  return {name: value for name, value in setting.items() if name not in RATES}


def parse_fields(cls: type, text: str) -> dict[str, Any]:
  """Reads "pairs=64,power=0.1" as values of the dataclass's types. Raises ValueError for others."""
  values, known = {}, _fields(cls)
  for item in filter(None, text.split(",")):
    name, _, value = item.partition("=")
    if name not in known:
      raise ValueError(f"{item!r}: {cls.__name__} has no field {name!r}, but {', '.join(known)}")
    try:
      values[name] = {"true": True, "false": False}[value.lower()] if known[name] is bool else known[name](value)
    except (KeyError, ValueError):
      raise ValueError(f"{item!r}: {name} must be of type {known[name].__name__}") from None
  return values


def _fields(cls):
  return {field.name: field.type for field in dataclasses.fields(cls)}


def _build(cls, name, fields):
  if unknown := [field for field in fields if field not in _fields(cls)]:
    raise ValueError(f"{unknown[0]}={fields[unknown[0]]!r}: {name} has no such field, but {', '.join(_fields(cls))}")
  return cls(**fields)
