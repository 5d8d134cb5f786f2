"""Mamba and Mamba-2 at the sizes of the other models here: 48 layers of one mixer each, without an MLP branch.

Mamba is the baseline of the GLA and DeltaNet papers, in the sizes 370M and 1.4B of arXiv:2312.00752 (expansion 2, 16
states per channel, convolution of 4), with the data and recipe of `gla_340m` and `gla_1b3`. The layout of Mamba-2
follows arXiv:2405.21060 (expansion 2, heads of 64 channels, state of 128, convolution of 4), and its sizes follow
flash-linear-attention's models. Its 340M config has the data and recipe of `gla_340m`, and its 1.3B config has the data
and recipe of `gated_deltanet_1b3`, for which a paper reports numbers. The microbatches are estimated at half the size
of those recipes, because 48 layers keep more activations than 24.
"""

from lin_jax.config import ModelConfig, TrainConfig
from lin_jax.mixers.mamba import MambaConfig
from lin_jax.mixers.mamba2 import Mamba2Config

from .gated_deltanet import gated_deltanet_1b3
from .gla_paper import at_1b3, at_340m


def mamba_340m() -> TrainConfig:
  """Mamba, 48 layers of width 1024: 353M parameters with tied embeddings.

  Source: arXiv:2312.06635 table 2 (340M rows); the layer and its size are from arXiv:2312.00752.
  Command: python experiments/train.py --config=mamba_340m --workdir=runs/mamba_340m
  Expected: perplexity on WikiText 28.39, on LAMBADA 39.66; LAMBADA accuracy 30.6, PIQA 65.0, HellaSwag 35.4.
  Obtained: not run yet.
  """
  config = at_340m(MambaConfig(), depth=48, mlp_width=0)
  config.optim.accumulation *= 2
  return config


def mamba_1b3() -> TrainConfig:
  """Mamba, 48 layers of width 2048: 1.33B parameters with tied embeddings.

  Source: arXiv:2312.06635 table 2 (1.3B rows); the layer and its size are from arXiv:2312.00752.
  Command: python experiments/train.py --config=mamba_1b3 --workdir=runs/mamba_1b3
  Expected: perplexity on WikiText 17.06, on LAMBADA 13.89; LAMBADA accuracy 46.2, PIQA 72.2, HellaSwag 40.1 as printed,
    9 below the other models of the table.
  Obtained: not run yet.
  """
  config = at_1b3(MambaConfig(), depth=48, mlp_width=0)
  config.optim.accumulation *= 2
  return config


def mamba2_340m() -> TrainConfig:
  """Mamba-2, 48 layers of width 1024 with 32 heads: 349M parameters with tied embeddings.

  Source: arXiv:2405.21060 section 7 (layer); the size is flash-linear-attention's.
  Command: python experiments/train.py --config=mamba2_340m --workdir=runs/mamba2_340m
  Expected: no paper reports this size on this data.
  Obtained: not run yet.
  """
  config = at_340m(Mamba2Config(), depth=48, mlp_width=0)
  config.optim.accumulation *= 2
  return config


def mamba2_1b3() -> TrainConfig:
  """Mamba-2, 48 layers of width 2048 with 64 heads: 1.31B parameters with tied embeddings.

  Source: arXiv:2412.06464, language modelling at 1.3B; the layer is from arXiv:2405.21060.
  Command: python experiments/train.py --config=mamba2_1b3 --workdir=runs/mamba2_1b3
  Expected: perplexity on WikiText 16.56, on LAMBADA 12.56; average accuracy on common-sense tasks 54.89.
  Obtained: not run yet.
  """
  config = gated_deltanet_1b3()
  config.model = ModelConfig(mixer=Mamba2Config(heads=64), width=2048, depth=48, mlp_width=0)
  config.optim.accumulation *= 2
  return config
