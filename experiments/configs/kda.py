"""Kimi Delta Attention (KDA) at the sizes of the other papers' runs, alone and with the layers of Kimi Linear.

Data and recipe are the GLA paper's (`gla_paper.py`), because the recipe and the sizes of arXiv:2510.26692 belong to
mixtures of experts. Heads have 128 channels for keys and for values, as in that paper.
"""

from lin_jax.config import TrainConfig
from lin_jax.mixers.attention import AttentionConfig
from lin_jax.mixers.kda import KDAConfig

from .gla_paper import at_1b3, at_340m


def kda_340m() -> TrainConfig:
  """KDA at the data and recipe of `gla_340m`, 8 heads of 128: 340M parameters.

  The MLP is smaller by the parameters that the gates add.

  Source: arXiv:2510.26692 (the layer).
  Command: python experiments/train.py --config=kda_340m --workdir=runs/kda_340m
  Expected: no published number at this size.
  Obtained: not run yet.
  """
  return at_340m(KDAConfig(heads=8), mlp_width=2624)


def kda_1b3() -> TrainConfig:
  """KDA at the data and recipe of `gla_1b3`, 16 heads of 128: 1.33B parameters.

  Source: arXiv:2510.26692 (the layer).
  Command: python experiments/train.py --config=kda_1b3 --workdir=runs/kda_1b3
  Expected: no published number at this size.
  Obtained: not run yet.
  """
  return at_1b3(KDAConfig(heads=16))


def kimi_linear_1b3() -> TrainConfig:
  """`kda_1b3` with softmax attention without positions in every fourth layer, as Kimi Linear has it.

  Attention is plain here, with 16 heads of 128. Kimi Linear compresses its keys and values to 512 channels, and its
  MLPs are mixtures of experts.

  Source: arXiv:2510.26692 (layers and their pattern).
  Command: python experiments/train.py --config=kimi_linear_1b3 --workdir=runs/kimi_linear_1b3
  Expected: no published number at this size.
  Obtained: not run yet.
  """
  return at_1b3(KDAConfig(heads=16), hybrid_mixer=AttentionConfig(heads=16, rope_base=0.0),
                hybrid_layers=tuple(range(3, 24, 4)), norm_eps=1e-5)
