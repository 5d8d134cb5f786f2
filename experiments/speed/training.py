"""Training speed of a config on its mesh: compiles its step, feeds it tokens, and measures time and memory.

`SWEEPS` are the papers' curves against sequence length, and one step of every family at two sizes.
"""

import concurrent.futures
import dataclasses
import hashlib
import itertools
import math
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from configs import CONFIGS
from configs.gla_paper import at_340m
from lin_jax import flops, mixers, sharding
from lin_jax.config import MeshConfig, TrainConfig, to_dict
from lin_jax.mixers.attention import AttentionConfig
from lin_jax.mixers.linear_attention import LinearAttentionConfig
from lin_jax.train_state import placement
from lin_jax.trainable import trains_all
from lin_jax.training import make_state, make_train_step
from running import records
from speed import packing

_ROOT = pathlib.Path(__file__).resolve().parents[2]
ZIPF = "drawn from Zipf's law"


@dataclasses.dataclass(frozen=True)
class Sweep:
  """Models by name, the lengths of their sequences, and the tokens per step."""

  title: str
  models: dict[str, Callable[[], TrainConfig]]
  lengths: tuple[int, ...]
  tokens: int


def transformer_385m() -> TrainConfig:
  """Transformer++ with TNL's vocabulary and 383M parameters; a wider MLP makes up for its smaller mixer."""
  return at_340m(AttentionConfig(heads=16), mlp_width=3136, vocab_size=CONFIGS["tnl_385m"]().model.vocab_size)


def linear_attention_340m() -> TrainConfig:
  """Linear attention in the place of `gla_340m`'s layer."""
  return at_340m(LinearAttentionConfig())


SWEEPS = {
    "gla_fig6": Sweep("Training at 1.3B parameters", {name: CONFIGS[name] for name in (
        "gla_1b3", "transformer_1b3", "retnet_1b3", "mamba_1b3", "deltanet_1b3")},
        tuple(2**i for i in range(11, 15)), 2**14),
    "tnl": Sweep("Training at 385M parameters", {"tnl_385m": CONFIGS["tnl_385m"],
                                                 "transformer_385m": transformer_385m},
                 tuple(2**i for i in range(10, 17)), 2**16),
    "step": Sweep("One training step", {name: CONFIGS[name] for name in (
        "gla_1b3", "transformer_1b3", "deltanet_1b3", "gated_deltanet_1b3", "retnet_1b3", "tnl_385m", "mamba2_1b3")},
        (2048,), 2**14),
    "step_340m": Sweep("One training step at 340M parameters", {
        **{name: CONFIGS[name] for name in ("gla_340m", "transformer_340m", "mamba2_340m", "mamba_340m")},
        "linear_attention_340m": linear_attention_340m}, (2048,), 2**15),
    "finetune": Sweep("Fine-tuning on 4,096 tokens per document", CONFIGS, (4096,), 2**14)}
CURVES = {name: sweep for name, sweep in SWEEPS.items() if len(sweep.lengths) > 1}


@dataclasses.dataclass(frozen=True)
class Program:
  """The compiled initialisation and optimizer step of a config, and the time that tracing and compiling took."""

  config: TrainConfig
  create: Callable
  step: Callable
  seconds: float


def shrunk(config: TrainConfig) -> TrainConfig:
  """Shrinks `config` for a CPU: its mixers' smallest examples, width 32, two layers, 257 tokens, float32."""
  model = config.model
  for field in ("mixer", "hybrid_mixer"):
    if (mixer := getattr(model, field)) is not None:
      setattr(model, field, mixers.config_class(mixers.name_of(mixer)).examples()[0])
  model.vocab_size, model.width, model.depth, model.dtype = 257, 32, 2, "float32"
  model.mlp_width, model.hybrid_layers = min(model.mlp_width, 64), model.hybrid_layers and (1,)
  return config


def description(config: TrainConfig) -> dict:
  """Returns the fields of a record that describe the model and its training."""
  _, _, abstract, _ = make_state(config, sharding.make_mesh(MeshConfig(), jax.devices()[:1]))
  parameters, trainable = (sum(leaf.size for leaf in jax.tree.leaves(tree))
                           for tree in (abstract.parameters(), abstract.params))
  adapters = {"lora": dataclasses.asdict(config.lora), "trainable": trainable} if config.lora.rank else {}
  return {"parameters": parameters, **adapters,
          "batch_size": config.data.batch_size, "sequence_length": config.data.sequence_length,
          "dtype": config.model.dtype, "remat": config.remat, "unroll": config.unroll, "steps": config.optim.steps,
          "model": to_dict(config)["model"]}


def provenance() -> dict:
  """Adds to `records.provenance` a digest of the kernels and the library, because they decide the speed."""
  digest = hashlib.sha256()
  for source in sorted(path for folder in ("kernels", "lin_jax") for path in (_ROOT / folder).rglob("*")):
    if source.suffix in (".py", ".json"):
      digest.update(source.read_bytes())
  found = records.provenance()
  return found | {"versions": found["versions"] | {"sources": digest.hexdigest()[:12]}}


def compile_all(runs: Sequence[TrainConfig], *, documents: Sequence[bool] | None = None,
                ) -> list[concurrent.futures.Future]:
  """Compiles a `Program` per config, side by side on as many threads as cores, and returns the finished futures.

  `documents` says for each config whether its batches have segment ids, as those of all configs do without it.
  """
  documents = [True] * len(runs) if documents is None else documents
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    # Leaving the context waits for all of them, because on a CPU a compilation would disturb what is timed.
    return [pool.submit(compile_step, config, documents=given) for config, given in zip(runs, documents, strict=True)]


def compiled_in_groups(runs: Sequence[TrainConfig], count: int, documents: Sequence[bool],
                       ) -> Iterator[concurrent.futures.Future]:
  """Yields what `compile_all` returns, and compiles `count` programs when the first of them is asked for."""
  for group in itertools.batched(zip(runs, documents, strict=True), count):
    configs, given = zip(*group, strict=True)
    yield from compile_all(configs, documents=given)


def compile_step(config: TrainConfig, *, documents: bool = True) -> Program:
  """Compiles a step for batches with segment ids, or without `documents` for windows of one document each."""
  start = time.monotonic()
  create, step = lower(config, mesh_of(config), documents=documents)
  return Program(config, create.compile(), step.compile(), time.monotonic() - start)


def lower(config: TrainConfig, mesh: jax.sharding.Mesh, *, documents: bool = True,
          ) -> tuple[jax.stages.Lowered, jax.stages.Lowered]:
  """Traces initialisation and step of `config` on `mesh`, whose devices need not exist."""
  with jax.set_mesh(mesh):
    graph, optimizer, abstract, create = make_state(config, mesh)
    step = make_train_step(config, graph, optimizer, abstract)
    return (jax.jit(create, out_shardings=placement(abstract)).lower(),
            step.lower(abstract, abstract_batch(config, mesh, documents=documents)))


def abstract_batch(config: TrainConfig, mesh: jax.sharding.Mesh, *, documents: bool) -> dict:
  """Returns the shapes of a batch on `mesh`, with segment ids if `documents`."""
  shape, placed = (config.data.batch_size, config.data.sequence_length), sharding.batch_sharding(mesh)
  batch = {name: jax.ShapeDtypeStruct(shape, np.float32 if name == "mask" else np.int32, sharding=placed)
           for name in ("tokens", "targets", "segment_ids", "mask")}
  return batch if documents else batch | {"segment_ids": None}


def measure(program: Program, batches: Sequence[dict], timed: int) -> dict:
  """Takes a step per batch, and measures the speed of the last `timed` steps.

  Returns:
    `losses`, `tokens_per_s`, `step_ms`, `mfu` (None for a device of unknown peak, or if parameters are frozen),
    `memory_gib` (of the compiled step on each device, with parameters and optimizer), `compile_s`, and `first_step_s`,
    which is the time from the start of compiling to the end of the first step.
  """
  config, step = program.config, program.step
  mesh = mesh_of(config)
  placed = sharding.batch_sharding(mesh)
  batches = jax.block_until_ready([jax.device_put(batch, placed) for batch in batches])
  begin = time.monotonic()
  state, losses = program.create(), []
  for i, batch in enumerate(batches):
    if i == len(batches) - timed:
      jax.block_until_ready(state)
      start = time.perf_counter()
    state, metrics = step(state, batch)
    losses.append(metrics["loss"])
    if i == 0:
      jax.block_until_ready(losses)
      first = program.seconds + time.monotonic() - begin
  jax.block_until_ready(state)
  setting = {"batch_size": config.data.batch_size, "sequence_length": config.data.sequence_length, "timed_steps": timed}
  found = speed(setting, time.perf_counter() - start, losses)
  peak = flops.peak_flops(jax.devices()[0].device_kind) if trains_all(config) else None
  work = flops.training_flops_per_token(config.model, config.data.sequence_length)
  return found | {"mfu": found["tokens_per_s"] * work / peak / mesh.size if peak else None,
                  "memory_gib": gibibytes(step), "compile_s": round(program.seconds, 1),
                  "first_step_s": round(first, 1)}


def speed(setting: dict, seconds: float, losses: Sequence) -> dict:
  """Returns `tokens_per_s` and `step_ms` of the timed steps, which took `seconds` in all, and all losses as floats."""
  tokens = setting["batch_size"] * setting["sequence_length"] * setting["timed_steps"]
  return {"tokens_per_s": round(tokens / seconds, 1), "step_ms": round(1000 * seconds / setting["timed_steps"], 2),
          "losses": [round(float(loss), 6) for loss in losses]}


def gibibytes(step: jax.stages.Compiled) -> float:
  """Returns the memory that a compiled step needs on each device, with parameters and optimizer, in GiB."""
  memory = step.memory_analysis()
  needed = (memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
            - memory.alias_size_in_bytes)
  return round(needed / 2**30, 3)


def drawn_tokens(vocabulary: int, batch: int, length: int, count: int) -> list[np.ndarray]:
  """Draws int32 arrays [batch, length + 1] from Zipf's law, whose frequencies a model learns at once."""
  random, weights = np.random.default_rng(0), 1 / np.arange(1, vocabulary + 1)
  return [random.choice(vocabulary, (batch, length + 1), p=weights / weights.sum()).astype(np.int32)
          for _ in range(count)]


def drawn_batches(config: TrainConfig, count: int, *, documents: bool = True, packed: bool = False) -> list[dict]:
  """Draws batches by `drawn_tokens`.

  Each window is one document, with segment ids if `documents`. If `packed`, windows hold the documents that
  `packing.windows` draws, and the last token of a document has no target.
  """
  data, batches = config.data, []
  drawn = drawn_tokens(config.model.vocab_size, data.batch_size, data.sequence_length, count)
  shape = data.batch_size, data.sequence_length + 1
  segments = packing.windows(count, *shape) if packed else np.ones((count, *shape), np.int32)
  for ids, segment in zip(drawn, segments, strict=True):
    same = segment[:, 1:] == segment[:, :-1]
    batches.append(dict(tokens=ids[:, :-1], targets=ids[:, 1:], mask=same.astype(np.float32),
                        segment_ids=segment[:, :-1] if documents or packed else None))
  return batches


def mesh_of(config: TrainConfig) -> jax.sharding.Mesh:
  """Returns the mesh of `config` on the first devices, as many as its axes take, where -1 stands for 1."""
  count = math.prod(max(size, 1) for size in dataclasses.astuple(config.mesh))
  return sharding.make_mesh(config.mesh, jax.devices()[:count])
