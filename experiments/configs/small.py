"""Models of about 42M parameters for one GPU and less than an hour."""

from lin_jax.config import CheckpointConfig, DataConfig, EvalConfig, LogConfig, ModelConfig, OptimConfig, TrainConfig
from lin_jax.mixers.attention import AttentionConfig
from lin_jax.mixers.gla import GLAConfig


def gla_small() -> TrainConfig:
  """GLA, 42M parameters, on four epochs of the English corpus of `experiments/corpora`.

  Source: no paper; the layer of arXiv:2312.06635 section 4.4, at half the width and a third of the depth of its
    340M model.
  Command: python experiments/prepare_data.py --corpus=english --out=data/english
           python experiments/train.py --config=gla_small --workdir=runs/gla_small
  Expected: validation perplexity well below 95, that of an interpolated 4-gram model on the same split (1.81 bits per
    byte).
  Obtained: not run yet.
  """
  return _small(GLAConfig(heads=4))


def transformer_small() -> TrainConfig:
  """`gla_small` with softmax attention as its mixer, everything else equal.

  Command: python experiments/train.py --config=transformer_small --workdir=runs/transformer_small
  Expected: validation perplexity close to that of `gla_small`.
  Obtained: not run yet.
  """
  return _small(AttentionConfig(heads=8))


def _small(mixer):
  batch, length = 64, 1024
  return TrainConfig(
      model=ModelConfig(mixer=mixer, vocab_size=32000, width=512, depth=8, mlp_width=1408),
      data=DataConfig(path="data/english", sequence_length=length, batch_size=batch),
      # 4 epochs of 83.5M tokens; more repetition than that teaches little.
      optim=OptimConfig(steps=int(4 * 83.5e6 / (batch * length)), warmup_steps=200, learning_rate=2e-3,
                        final_learning_rate=2e-4, weight_decay=0.1),
      eval=EvalConfig(every=500),
      checkpoint=CheckpointConfig(every=500),
      log=LogConfig(every=10),
  )
