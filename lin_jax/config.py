"""Configuration of a training run: plain mutable dataclasses, so that the command line can override any field.

A run is one `TrainConfig`. `experiments/configs` maps a bare name to a function that returns one. `validate` states
every rule once, after overrides are parsed, and `save` and `load` keep the resolved config beside the checkpoints.
"""

import dataclasses
import pathlib
import re
from typing import Any, ClassVar

from lin_jax import files
from lin_jax.typed_json import build, read_object, require_types, shown

REMAT_POLICIES = ("none", "mixer", "dots", "full")
NORMS = ("rms", "rms_offset", "simple_rms")
POST_NORMS = ("none", "hybrid", "all")
MLPS = ("swiglu", "sglu")
STARTS = ("layers", "normal")
DTYPES = ("bfloat16", "float16", "float32")
OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("cosine", "wsd")
_MIXERS = "mixer", "hybrid_mixer"  # fields of a ModelConfig


@dataclasses.dataclass
class ModelConfig:
  """A stack of `depth` blocks `x += mixer(norm(x)); x += mlp(norm(x))` between an embedding and a head.

  Post-norm blocks are `x += norm(mixer(x)); x += norm(mlp(x))`. Olmo 2 has them everywhere, and Olmo Hybrid in its
  attention layers.
  """

  mixer: Any = None  # a config dataclass registered in lin_jax.mixers
  hybrid_mixer: Any = None  # the mixer of the layers `hybrid_layers`, counted from 0
  hybrid_layers: tuple[int, ...] = ()
  vocab_size: int = 32000
  width: int = 1024
  depth: int = 24
  mlp: str = "swiglu"  # or "sglu", without activation
  mlp_width: int = 2816  # 0 means a block of the mixer alone
  norm: str = "rms"  # of blocks and output; "rms_offset" multiplies by 1 + scale, "simple_rms" by nothing
  post_norm: str = "none"  # which blocks are post-norm: the "hybrid" layers, or "all"
  norm_eps: float = 1e-6
  tie_embeddings: bool = True
  scale_embeddings: bool = False  # by sqrt(width), before the first block
  start: str = "normal"  # of all kernels of products and convolutions: N(0, 0.02), or "layers": each layer's own rule
  dtype: str = "bfloat16"  # of activations and matmul operands; parameters, gates and states are float32

  EARLIER: ClassVar[dict] = {"start": "layers"}  # what a saved config without the field had


@dataclasses.dataclass
class DataConfig:
  """Token shards written by `experiments/prepare_data.py`, read as shuffled windows of `sequence_length` tokens."""

  path: str = ""
  sequence_length: int = 2048
  batch_size: int = 256  # sequences per optimizer step, over all devices and accumulation steps
  reset_at_documents: bool = True  # documents packed in one window do not see each other
  shuffle: bool = True
  carried_windows: int = 1  # neighbouring windows read by a row, one per step, with its state but not its gradient
  staggered: bool = False  # rows go on to other text at different steps, where carried_windows is above 1
  worker_threads: int = 4


@dataclasses.dataclass
class OptimConfig:
  """AdamW or Muon, with linear warmup to `learning_rate` and a decay to `final_learning_rate`.

  With the schedule "cosine" the decay begins after the warmup. A run can be given more `steps` later, finished or not.
  If the two rates are equal, it is then the same run as one planned with that many steps. Otherwise the decay ends
  where it was planned to end, and further steps keep the final rate. That is the same as a run planned with that many
  `steps` and that `decay_steps` from the start, as the lengthened run's config says.

  With "wsd" (warmup, stable, decay) the rate stays at `learning_rate` until the last `decay_steps` steps, in which it
  falls linearly. A run without a decay can be given more `steps`, with or without a decay at their end.
  """

  name: str = "adamw"  # or "muon" for the kernels of products, with AdamW for every other parameter
  schedule: str = "cosine"  # or "wsd"
  trainable: str = ""  # patterns of parameters' names, with commas between them; the others are frozen; "" means all
  steps: int = 1000
  decay_steps: int = 0  # cosine: the step at which the decay ends, 0 for the last; wsd: steps of the decay, 0 for none
  warmup_steps: int = 100
  learning_rate: float = 3e-4
  final_learning_rate: float = 3e-5
  beta1: float = 0.9
  beta2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.01  # on matrices only
  clip_norm: float = dataclasses.field(default=1.0, metadata={"infinite": True})  # infinity clips nothing
  accumulation: int = 1  # microbatches per optimizer step
  nonfinite: str = "stop"  # on a non-finite loss or gradient, "stop" the run or "skip" the step


@dataclasses.dataclass
class LoraConfig:
  """Low-rank adapters beside the layers `targets`, which train in their place: see `lin_jax.lora`."""

  rank: int = 0  # 0 means no adapters
  alpha: float = 16.0  # an adapter's result counts alpha / rank times
  targets: str = ""  # patterns of layers' names, with commas between them; "" means all Linear layers


@dataclasses.dataclass
class MeshConfig:
  """Devices per mesh axis, where -1 takes the devices that the other axes leave. `data` replicates parameters, `fsdp`
  shards them over the batch, and `tensor` over heads, MLP width and vocabulary. `context` splits the tokens of each
  sequence (`lin_jax.context`)."""

  data: int = -1
  fsdp: int = 1
  tensor: int = 1
  context: int = 1


@dataclasses.dataclass
class EvalConfig:
  """Held-out loss on `batches` batches of the validation split every `every` steps, or only at the end for 0."""

  every: int = 1000
  batches: int = 16


@dataclasses.dataclass
class CheckpointConfig:
  """Asynchronous saves every `every` steps and at the end. The last `keep_last` and the best `keep_best` are kept."""

  every: int = 1000
  keep_last: int = 2
  keep_best: int = 1


@dataclasses.dataclass
class LogConfig:
  """Console line and scalars every `every` steps. `profile_steps` as "start,stop" writes a trace of those steps."""

  every: int = 10
  tensorboard: bool = True
  profile_steps: str = ""


@dataclasses.dataclass
class TrainConfig:
  """Everything that determines a run. Equal configs, data and devices give equal losses: bit for bit on a CPU, and
  up to rounding on a GPU, where some sums have no fixed order."""

  name: str = ""
  seed: int = 0
  remat: str = "none"  # the part of a block that its backward pass recomputes: see `lin_jax.model.REMAT`
  unroll: int = 1  # repetitions of layers compiled in one step of their scan; 0 means all: see `LanguageModel`
  init_from: str = ""  # a run or a Hugging Face folder whose parameters the run starts with: see `lin_jax.initial`
  model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
  data: DataConfig = dataclasses.field(default_factory=DataConfig)
  optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
  lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
  mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
  eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
  checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
  log: LogConfig = dataclasses.field(default_factory=LogConfig)


def validate(config: TrainConfig) -> TrainConfig:
  """Returns `config`, or raises ValueError that names the first field that breaks a rule, its value and the rule."""

  def require(ok, field, rule):
    if not ok:
      raise ValueError(f"config.{field}={shown(_get(config, field))}: {rule}")

  require_types(config, "config")
  for field in ("model.vocab_size", "model.width", "model.depth", "data.sequence_length", "data.batch_size",
                "data.carried_windows", "optim.steps", "optim.accumulation", "log.every", "checkpoint.keep_last"):
    require(_get(config, field) >= 1, field, "must be at least 1")
  for field in ("model.mlp_width", "optim.warmup_steps", "optim.weight_decay", "eval.every", "eval.batches",
                "checkpoint.every", "checkpoint.keep_best", "data.worker_threads", "seed", "unroll",
                "optim.decay_steps", "lora.rank"):
    require(_get(config, field) >= 0, field, "must not be negative")
  for field in ("optim.learning_rate", "optim.clip_norm", "optim.eps", "model.norm_eps", "lora.alpha"):
    require(_get(config, field) > 0, field, "must be positive")
  for field in ("mesh.data", "mesh.fsdp", "mesh.tensor", "mesh.context"):
    require(_get(config, field) == -1 or _get(config, field) >= 1, field, "must be at least 1, or -1 for the rest")
  _validate_model(config.model, require)
  require(config.remat in REMAT_POLICIES, "remat", f"must be one of {', '.join(REMAT_POLICIES)}")
  _validate_optim(config.optim, require)
  _require_patterns(config, require)
  require(config.data.batch_size % config.optim.accumulation == 0, "data.batch_size",
          f"must be divisible by config.optim.accumulation={config.optim.accumulation}")
  if config.log.profile_steps:
    try:
      start, stop = map(int, config.log.profile_steps.split(","))
      ok = 1 <= start < stop
    except ValueError:
      ok = False
    require(ok, "log.profile_steps", "must be 'start,stop' with 1 <= start < stop")
  return config


def _validate_model(model, require):
  for field, most in (("depth", 10_000), ("width", 2**24), ("mlp_width", 2**24), ("vocab_size", 2**24)):
    require(getattr(model, field) <= most, f"model.{field}", f"must be at most {most:,}")
  for field, known in dict(norm=NORMS, post_norm=POST_NORMS, mlp=MLPS, start=STARTS, dtype=DTYPES).items():
    require(getattr(model, field) in known, f"model.{field}", f"must be one of {', '.join(known)}")
  require(dataclasses.is_dataclass(model.mixer), "model.mixer", "must be a mixer config")
  hybrid, layers, last = model.hybrid_mixer, model.hybrid_layers, model.depth - 1
  require(hybrid is None or dataclasses.is_dataclass(hybrid), "model.hybrid_mixer", "must be a mixer config or None")
  require((hybrid is None) == (not layers), "model.hybrid_layers",
          "must name layers if and only if config.model.hybrid_mixer is given")
  require(len(set(layers)) == len(layers) and all(0 <= layer <= last for layer in layers), "model.hybrid_layers",
          f"must be different numbers from 0 to config.model.depth - 1 = {last}")
  require(model.post_norm != "hybrid" or hybrid not in (None, model.mixer), "model.post_norm",
          "needs a config.model.hybrid_mixer that differs from config.model.mixer")


def _validate_optim(optim, require):
  require(optim.name in OPTIMIZERS, "optim.name", f"must be one of {', '.join(OPTIMIZERS)}")
  require(optim.schedule in SCHEDULES, "optim.schedule", f"must be one of {', '.join(SCHEDULES)}")
  require(optim.nonfinite in ("stop", "skip"), "optim.nonfinite", "must be 'stop' or 'skip'")
  require(optim.warmup_steps < optim.steps, "optim.warmup_steps", "must be less than config.optim.steps")
  if optim.schedule == "wsd":
    require(optim.decay_steps <= optim.steps - optim.warmup_steps, "optim.decay_steps",
            "must leave room for config.optim.warmup_steps within config.optim.steps")
  else:
    require(optim.decay_steps == 0 or optim.warmup_steps < optim.decay_steps <= optim.steps, "optim.decay_steps",
            "must lie above config.optim.warmup_steps and not above config.optim.steps, or be 0 for the last step")
  for field in ("beta1", "beta2"):
    require(0 <= getattr(optim, field) < 1, f"optim.{field}", "must lie in [0, 1)")
  require(0 <= optim.final_learning_rate <= optim.learning_rate, "optim.final_learning_rate",
          "must lie between 0 and config.optim.learning_rate")


def _require_patterns(config, require):
  for field in ("optim.trainable", "lora.targets"):
    patterns = _get(config, field).split(",")
    try:
      ok = patterns == [""] or all(patterns) and bool([re.compile(pattern) for pattern in patterns])
    except re.error:
      ok = False
    require(ok, field, "must be regular expressions with commas between them")


def _get(config, field):
  for part in field.split("."):
    config = getattr(config, part)
  return config


def to_dict(config: TrainConfig) -> dict:
  """The config as nested plain values, in which mixers carry their registered name under `"type"`."""
  from lin_jax import mixers

  values = dataclasses.asdict(config)
  for field in _MIXERS:
    if (mixer := getattr(config.model, field)) is not None:
      values["model"][field] = {"type": mixers.name_of(mixer), **values["model"][field]}
  return values


def from_dict(values: dict) -> TrainConfig:
  """Inverse of `to_dict`. Missing fields have their defaults, or what the `EARLIER` of a model or mixer says.

  Raises ValueError for an unknown mixer or field, and for a value of another type than its field's.
  """
  from lin_jax import mixers

  model = values.get("model") if isinstance(values, dict) else None
  if not isinstance(model, dict):
    raise ValueError(f"config.model={shown(model)}: must be an object")
  model = ModelConfig.EARLIER | model
  for field in _MIXERS:
    if field == "mixer" or model.get(field) is not None:
      mixer, where = model.get(field), f"config.model.{field}"
      if not isinstance(mixer, dict) or not isinstance(mixer.get("type"), str):
        raise ValueError(f"{where}={shown(mixer)}: must be an object with a 'type'")
      fields = {name: value for name, value in mixer.items() if name != "type"}
      model[field] = build(kind := mixers.config_class(mixer["type"]), getattr(kind, "EARLIER", {}) | fields, where)
  return build(TrainConfig, values | {"model": model}, "config")


def save(config: TrainConfig, path: pathlib.Path) -> None:
  """Writes the resolved config as JSON."""
  files.write_json(path, to_dict(config))


def load(path: pathlib.Path) -> TrainConfig:
  """Reads a config written by `save`.

  Raises ValueError, which names the file and the field, if the file is missing or damaged, breaks a rule of `validate`,
  or describes a model that cannot be built.
  """
  from lin_jax.model import abstract_model

  values = read_object(path, "a saved lin_jax config")
  try:
    config = validate(from_dict(values))
    abstract_model(config.model)
  except ValueError as e:
    raise ValueError(f"{path}: {e}") from e
  return config
