"""The run of the Gated DeltaNet paper, arXiv:2412.06464, at 1.3B parameters.

Recipe: 100B tokens of FineWeb-Edu, the Llama 2 tokenizer, context 4096, AdamW at 4e-4 with weight decay 0.1 and
clipping at 1.0, batches of 0.5M tokens, warmup over 1B. Where the learning rate ends is this repository's choice.
"""

from lin_jax.config import CheckpointConfig, DataConfig, EvalConfig, ModelConfig, OptimConfig, TrainConfig
from lin_jax.mixers.gated_delta_net import GatedDeltaNetConfig


def gated_deltanet_1b3() -> TrainConfig:
  """Gated DeltaNet, 21 layers of width 2048 with 6 heads (K 256, V 512): 1.32B parameters with tied embeddings.

  Source: arXiv:2412.06464, language modelling at 1.3B; the layout is flash-linear-attention's.
  Command: python experiments/train.py --config=gated_deltanet_1b3 --workdir=runs/gated_deltanet_1b3
  Expected: perplexity on WikiText 16.42, on LAMBADA 12.17; average accuracy on common-sense tasks 55.32.
  Obtained: not run yet.
  """
  batch_size, context = 128, 4096
  tokens_per_step = batch_size * context  # 0.52M
  return TrainConfig(
      remat="dots",
      unroll=0,
      model=ModelConfig(mixer=GatedDeltaNetConfig(), width=2048, depth=21, mlp_width=5632),
      data=DataConfig(path="data/fineweb_edu", sequence_length=context, batch_size=batch_size),
      optim=OptimConfig(steps=int(100e9 / tokens_per_step), warmup_steps=int(1e9 / tokens_per_step), learning_rate=4e-4,
                        final_learning_rate=4e-5, weight_decay=0.1, clip_norm=1.0, accumulation=batch_size // 4),
      eval=EvalConfig(every=1000),
      checkpoint=CheckpointConfig(every=1000),
  )
