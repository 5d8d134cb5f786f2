"""HGRN2 at the other models' sizes. The 340M config has the data and recipe of `gla_340m`. The 1.3B config has
the data and recipe of `gated_deltanet_1b3`, for which a paper reports numbers."""

from lin_jax.config import ModelConfig, TrainConfig
from lin_jax.mixers.hgrn2 import HGRN2Config

from .gated_deltanet import gated_deltanet_1b3
from .gla_paper import at_340m


def hgrn2_340m() -> TrainConfig:
  """HGRN2, 24 layers of width 1024 with 8 heads: 342M parameters with tied embeddings.

  Source: arXiv:2404.07904 section 3 (layer); the size is flash-linear-attention's.
  Command: python experiments/train.py --config=hgrn2_340m --workdir=runs/hgrn2_340m
  Expected: no paper reports this size on this data.
  Obtained: not run yet.
  """
  return at_340m(HGRN2Config())


def hgrn2_1b3() -> TrainConfig:
  """HGRN2, 24 layers of width 2048 with 16 heads: 1.30B parameters with tied embeddings.

  Source: arXiv:2412.06464, language modelling at 1.3B; the layer is from arXiv:2404.07904.
  Command: python experiments/train.py --config=hgrn2_1b3 --workdir=runs/hgrn2_1b3
  Expected: perplexity on WikiText 19.10, on LAMBADA 17.69; average accuracy on common-sense tasks 51.79.
  Obtained: not run yet.
  """
  config = gated_deltanet_1b3()
  config.model = ModelConfig(mixer=HGRN2Config(heads=16), width=2048, depth=24, mlp_width=5632)
  return config
