"""Gated DeltaProduct at the size of the other papers' small runs."""

from lin_jax.config import TrainConfig
from lin_jax.mixers.delta_product import DeltaProductConfig

from .gla_paper import at_340m


def delta_product_340m() -> TrainConfig:
  """Gated DeltaProduct with two steps per token, 24 layers of width 1024 with 8 heads (K = V = 128): 342M parameters.

  Source: arXiv:2502.10297. The paper's models have other sizes, and its data is FineWeb: layout and recipe are this
  repository's. Depth, heads and state equal `deltanet_340m`. The MLP is smaller by the parameters that a second key and
  value and the gate add.
  Command: python experiments/train.py --config=delta_product_340m --workdir=runs/delta_product_340m
  Expected: no published number at this size.
  Obtained: not run yet.
  """
  return at_340m(DeltaProductConfig(heads=8, head_dim=128, expand_v=1.0), mlp_width=1792)
