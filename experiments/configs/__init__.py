"""Runs by bare name: `CONFIGS` maps a name to the function that returns its `TrainConfig`."""

from lin_jax.config import TrainConfig

from .delta_product import delta_product_340m
from .deltanet import (
  deltanet_1b3,
  deltanet_340m,
  deltanet_global_1b3,
  deltanet_global_340m,
  deltanet_swa_1b3,
  deltanet_swa_340m,
)
from .gated_deltanet import gated_deltanet_1b3
from .gla_paper import gla_1b3, gla_340m, retnet_1b3, retnet_340m, transformer_1b3, transformer_340m
from .hgrn2 import hgrn2_1b3, hgrn2_340m
from .kda import kda_1b3, kda_340m, kimi_linear_1b3
from .mamba import mamba2_1b3, mamba2_340m, mamba_1b3, mamba_340m
from .olmo_hybrid import olmo_hybrid_7b
from .qwen35 import qwen35_0b8, qwen35_2b, qwen35_4b, qwen35_9b
from .small import gla_small, transformer_small
from .supra import supra_340m, supra_tiny
from .tiny import gla_tiny, transformer_tiny
from .tnl import tnl_1b, tnl_3b, tnl_7b, tnl_385m

CONFIGS = {function.__name__: function for function in (
    gla_tiny, gla_small, gla_340m, gla_1b3, transformer_tiny, transformer_small, transformer_340m, transformer_1b3,
    retnet_340m, retnet_1b3, deltanet_340m, deltanet_1b3, deltanet_swa_340m, deltanet_swa_1b3, deltanet_global_340m,
    deltanet_global_1b3, gated_deltanet_1b3, delta_product_340m, mamba_340m, mamba_1b3, mamba2_340m, mamba2_1b3,
    hgrn2_340m, hgrn2_1b3, tnl_385m, tnl_1b, tnl_3b, tnl_7b, kda_340m, kda_1b3, kimi_linear_1b3, qwen35_0b8, qwen35_2b,
    qwen35_4b, qwen35_9b, olmo_hybrid_7b, supra_tiny, supra_340m)}


def lookup(name: str) -> TrainConfig:
  """Returns a fresh config with its `name` field set. Raises ValueError with the known names for an unknown name."""
  if name not in CONFIGS:
    raise ValueError(f"unknown config {name!r}; known: {', '.join(CONFIGS)}")
  config = CONFIGS[name]()
  config.name = name
  return config
