"""Continued training of the dense text models of Qwen3.5, at their released sizes from 0.8B to 9B.

Layout: of every four layers, three are Gated DeltaNet with keys and values of 128 channels, and the fourth is softmax
attention with heads of 256. Its queries and keys are normalised, a quarter of their channels is rotated, and a sigmoid
gates its output. Norms store their scale less one. The vocabulary has 248,320 tokens. Layers, sizes and norms are those
of `transformers` 5.24 and of the released `config.json` files.

Neither the data nor the recipe of the released models is public. The recipe here is this repository's: one billion
tokens in batches of 0.26M, AdamW with a cosine from 2e-5 to 2e-6. It starts from released weights (`--init_from`) on
data in their tokenizer. A run from scratch wants about ten times the rate and many more tokens.
"""

from lin_jax.config import (
  CheckpointConfig,
  DataConfig,
  EvalConfig,
  MeshConfig,
  ModelConfig,
  OptimConfig,
  TrainConfig,
)
from lin_jax.mixers.attention import AttentionConfig
from lin_jax.mixers.gated_delta_net import GatedDeltaNetConfig


def qwen35_0b8() -> TrainConfig:
  """Qwen3.5-0.8B, 24 layers of width 1024: 752M parameters without its vision tower.

  Source: Qwen/Qwen3.5-0.8B, `text_config`.
  Command: python experiments/train.py --config=qwen35_0b8 --init_from=hub/Qwen3.5-0.8B
               --workdir=runs/qwen35_0b8
  Expected: no published number for continued training.
  Obtained: not run yet.
  """
  return continued(_model(width=1024, depth=24, mlp_width=3584, value_heads=16, heads=8, kv_heads=2))


def qwen35_2b() -> TrainConfig:
  """Qwen3.5-2B, 24 layers of width 2048: 1.88B parameters without its vision tower.

  Source: Qwen/Qwen3.5-2B, `text_config`.
  Command: python experiments/train.py --config=qwen35_2b --init_from=hub/Qwen3.5-2B
               --workdir=runs/qwen35_2b
  Expected: no published number for continued training.
  Obtained: not run yet.
  """
  return continued(_model(width=2048, depth=24, mlp_width=6144, value_heads=16, heads=8, kv_heads=2))


def qwen35_4b() -> TrainConfig:
  """Qwen3.5-4B, 32 layers of width 2560: 4.21B parameters, which are sharded over all GPUs.

  Source: Qwen/Qwen3.5-4B, `text_config`.
  Command: python experiments/train.py --config=qwen35_4b --init_from=hub/Qwen3.5-4B
               --workdir=runs/qwen35_4b
  Expected: no published number for continued training.
  Obtained: not run yet.
  """
  return continued(_model(width=2560, depth=32, mlp_width=9216, value_heads=32, heads=16, kv_heads=4), sharded=True)


def qwen35_9b() -> TrainConfig:
  """Qwen3.5-9B, 32 layers of width 4096 with a separate head: 8.95B parameters, which are sharded over all GPUs.

  Source: Qwen/Qwen3.5-9B, `text_config`.
  Command: python experiments/train.py --config=qwen35_9b --init_from=hub/Qwen3.5-9B
               --workdir=runs/qwen35_9b
  Expected: no published number for continued training.
  Obtained: not run yet.
  """
  model = _model(width=4096, depth=32, mlp_width=12288, value_heads=32, heads=16, kv_heads=4)
  model.tie_embeddings = False
  return continued(model, sharded=True)


def continued(model: ModelConfig, *, sharded: bool = False) -> TrainConfig:
  """Returns the recipe for released weights: on each GPU by itself, or with the parameters `sharded` over all.

  Microbatches hold 4 sequences, or 8 where each of up to eight GPUs needs one. Compiled for an H100, a step of
  `qwen35_0b8` takes 38 GiB, extrapolated from 16.3 with 4 layers and 20.7 with 8. No GPU has run it yet.
  """
  context, batch_size = 4096, 64
  return TrainConfig(
      # Under the scan, no more than a layer's parameters are gathered at a time.
      remat="full" if sharded else "dots",
      unroll=1 if sharded else 0,
      model=model,
      data=DataConfig(path="data/continued", sequence_length=context, batch_size=batch_size),
      optim=OptimConfig(steps=int(1e9 / (batch_size * context)), warmup_steps=100, learning_rate=2e-5,
                        final_learning_rate=2e-6, weight_decay=0.1, accumulation=batch_size // (8 if sharded else 4)),
      mesh=MeshConfig(data=1, fsdp=-1) if sharded else MeshConfig(),
      eval=EvalConfig(every=500),
      checkpoint=CheckpointConfig(every=500),
  )


def _model(width, depth, mlp_width, value_heads, heads, kv_heads):
  return ModelConfig(
      mixer=GatedDeltaNetConfig(heads=16, value_heads=value_heads, head_dim=128, expand_v=1.0),
      hybrid_mixer=AttentionConfig(heads=heads, kv_heads=kv_heads, head_dim=256, rope_base=1e7, rope_fraction=0.25,
                                   qk_norm="head", qk_norm_offset=True, output_gate=True),
      hybrid_layers=tuple(range(3, depth, 4)), vocab_size=248320, width=width, depth=depth, mlp_width=mlp_width,
      norm="rms_offset")
