"""Byte-level models of under a million parameters, for a CPU and a few minutes."""

from lin_jax.config import CheckpointConfig, DataConfig, EvalConfig, LogConfig, ModelConfig, OptimConfig, TrainConfig
from lin_jax.mixers.attention import AttentionConfig
from lin_jax.mixers.gla import GLAConfig


def gla_tiny() -> TrainConfig:
  """GLA on Shakespeare's plays, the run that `make train` makes.

  Source: no paper; a smoke test that learns. The layer is `gla_340m`'s with a short convolution, without which
    400 steps (on windows of 128) end at 2.77 bits per byte instead of 2.60.
  Command: python experiments/prepare_data.py --corpus=shakespeare --out=data/shakespeare
           python experiments/train.py --config=gla_tiny --workdir=runs/gla_tiny
  Expected: bits per byte of the whole validation split below 2.5 after about 3 minutes on two CPU cores.
  Obtained: 8.03 to 2.46 (2.48 on the 16 batches that training looks at) on two cores that other work shared
    (experiments/results/gla_tiny_cpu).
  """
  return _tiny(GLAConfig(heads=2, conv_width=4))


def transformer_tiny() -> TrainConfig:
  """`gla_tiny` with softmax attention as its mixer, all else equal.

  Command: python experiments/train.py --config=transformer_tiny --workdir=runs/transformer_tiny
  Expected: more bits per byte than `gla_tiny`, which also has a convolution.
  Obtained: 2.57 (2.60 on the 16 batches that training looks at) in one run whose record was not kept.
  """
  return _tiny(AttentionConfig(heads=4))


def _tiny(mixer):
  return TrainConfig(
      # float32: CPUs have no fast bfloat16 product.
      model=ModelConfig(mixer=mixer, vocab_size=257, width=128, depth=4, mlp_width=384, dtype="float32"),
      data=DataConfig(path="data/shakespeare", sequence_length=256, batch_size=8),
      optim=OptimConfig(steps=600, warmup_steps=20, learning_rate=4e-3, final_learning_rate=4e-4, weight_decay=0.1),
      eval=EvalConfig(every=100, batches=16),
      checkpoint=CheckpointConfig(every=300),
      log=LogConfig(every=20),
  )
