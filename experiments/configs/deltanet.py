"""The runs of the DeltaNet paper, arXiv:2406.06484: DeltaNet and its two hybrids at 340M and 1.3B parameters.

Data and recipe are the GLA paper's (`gla_paper.py`). No source states the window of the sliding-window hybrid; 2048 is
what later hybrids of this kind have. Attention has heads of 64, as in Transformer++.
"""

from lin_jax.config import TrainConfig
from lin_jax.mixers.attention import AttentionConfig
from lin_jax.mixers.delta_net import DeltaNetConfig

from .gla_paper import at_1b3, at_340m

_EVERY_OTHER = tuple(range(1, 24, 2))
_SECOND_AND_MIDDLE = (1, 12)
_WINDOW = 2048


def deltanet_340m() -> TrainConfig:
  """DeltaNet at the data and recipe of `gla_340m`: 8 heads of 128, short convolutions of 4.

  Source: arXiv:2406.06484, language modelling at 340M.
  Command: python experiments/train.py --config=deltanet_340m --workdir=runs/deltanet_340m
  Expected: perplexity on WikiText 28.24, on LAMBADA 37.37; LAMBADA accuracy 32.1, PIQA 64.8, HellaSwag 34.3.
  Obtained: not run yet.
  """
  return at_340m(DeltaNetConfig(heads=8))


def deltanet_swa_340m() -> TrainConfig:
  """`deltanet_340m` with sliding-window attention in every other layer.

  Source: arXiv:2406.06484, language modelling at 340M.
  Command: python experiments/train.py --config=deltanet_swa_340m --workdir=runs/deltanet_swa_340m
  Expected: perplexity on WikiText 27.06, on LAMBADA 38.17; LAMBADA accuracy 33.4, PIQA 64.0, HellaSwag 35.3.
  Obtained: not run yet.
  """
  return at_340m(DeltaNetConfig(heads=8), hybrid_mixer=AttentionConfig(heads=16, window=_WINDOW),
                 hybrid_layers=_EVERY_OTHER)


def deltanet_global_340m() -> TrainConfig:
  """`deltanet_340m` with global attention in layers 2 and 13, counted from 1.

  Source: arXiv:2406.06484, language modelling at 340M.
  Command: python experiments/train.py --config=deltanet_global_340m --workdir=runs/deltanet_global_340m
  Expected: perplexity on WikiText 27.51, on LAMBADA 35.04; LAMBADA accuracy 33.5, PIQA 64.0, HellaSwag 34.5.
  Obtained: not run yet.
  """
  return at_340m(DeltaNetConfig(heads=8), hybrid_mixer=AttentionConfig(heads=16), hybrid_layers=_SECOND_AND_MIDDLE)


def deltanet_1b3() -> TrainConfig:
  """DeltaNet at the data and recipe of `gla_1b3`: 16 heads of 128, short convolutions of 4.

  Source: arXiv:2406.06484, language modelling at 1.3B.
  Command: python experiments/train.py --config=deltanet_1b3 --workdir=runs/deltanet_1b3
  Expected: perplexity on WikiText 16.87, on LAMBADA 12.21; LAMBADA accuracy 48.9, PIQA 71.2, HellaSwag 50.2.
  Obtained: not run yet.
  """
  return at_1b3(DeltaNetConfig(heads=16))


def deltanet_swa_1b3() -> TrainConfig:
  """`deltanet_1b3` with sliding-window attention in every other layer.

  Source: arXiv:2406.06484, language modelling at 1.3B.
  Command: python experiments/train.py --config=deltanet_swa_1b3 --workdir=runs/deltanet_swa_1b3
  Expected: perplexity on WikiText 16.56, on LAMBADA 11.74; LAMBADA accuracy 49.2, PIQA 71.8, HellaSwag 51.1.
  Obtained: not run yet.
  """
  return at_1b3(DeltaNetConfig(heads=16), hybrid_mixer=AttentionConfig(heads=32, window=_WINDOW),
                hybrid_layers=_EVERY_OTHER)


def deltanet_global_1b3() -> TrainConfig:
  """`deltanet_1b3` with global attention in layers 2 and 13, counted from 1.

  Source: arXiv:2406.06484, language modelling at 1.3B.
  Command: python experiments/train.py --config=deltanet_global_1b3 --workdir=runs/deltanet_global_1b3
  Expected: perplexity on WikiText 16.55, on LAMBADA 12.4; LAMBADA accuracy 48.8, PIQA 70.8, HellaSwag 50.7.
  Obtained: not run yet.
  """
  return at_1b3(DeltaNetConfig(heads=16), hybrid_mixer=AttentionConfig(heads=32), hybrid_layers=_SECOND_AND_MIDDLE)
