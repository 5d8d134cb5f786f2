"""Continued training of Olmo Hybrid, with the recipe of `qwen35.py`."""

from lin_jax.config import ModelConfig, TrainConfig
from lin_jax.mixers.attention import AttentionConfig
from lin_jax.mixers.gated_delta_net import GatedDeltaNetConfig

from .qwen35 import continued


def olmo_hybrid_7b() -> TrainConfig:
  """Olmo-Hybrid-7B, 32 layers of width 3840: 7.43B parameters, which are sharded over all GPUs.

  Of every four layers, three are Gated DeltaNet (K 96, V 192, beta up to 2) in pre-norm blocks. The fourth is softmax
  attention without positions in a post-norm block, with queries and keys normalised over all heads jointly.

  Source: allenai/Olmo-Hybrid-7B, `config.json`, and the class of `transformers` 5.24.
  Command: python experiments/train.py --config=olmo_hybrid_7b --init_from=hub/Olmo-Hybrid-7B
               --workdir=runs/olmo_hybrid_7b
  Expected: no published number for continued training.
  Obtained: not run yet.
  """
  depth = 32
  return continued(ModelConfig(
      mixer=GatedDeltaNetConfig(heads=30, value_heads=30, head_dim=96, expand_v=2.0, allow_neg_eigval=True,
                                norm_eps=1e-5),
      hybrid_mixer=AttentionConfig(heads=30, kv_heads=30, head_dim=128, rope_base=0.0, qk_norm="heads"),
      hybrid_layers=tuple(range(3, depth, 4)), post_norm="hybrid", vocab_size=100352, width=3840, depth=depth,
      mlp_width=11008, tie_embeddings=False), sharded=True)
