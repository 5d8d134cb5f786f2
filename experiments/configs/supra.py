"""Transformers that SUPRA (Mercat et al. 2024, arXiv:2405.06640) makes linear and trains on 5% more tokens."""

from lin_jax.config import TrainConfig
from lin_jax.linearize import linearized

from .gla_paper import transformer_340m
from .tiny import transformer_tiny


def supra_tiny() -> TrainConfig:
  """The linear model that `transformer_tiny` becomes, on 30 further steps of its batches.

  Source: no paper has this size.
  Command: python experiments/train.py --config=transformer_tiny --workdir=runs/transformer_tiny
           python experiments/convert.py --linearize=runs/transformer_tiny --workdir=runs/transformer_tiny_linear
           python experiments/train.py --config=supra_tiny --init_from=runs/transformer_tiny_linear
  Expected: more bits per byte than `transformer_tiny`.
  Obtained: not run yet.
  """
  return _uptraining(transformer_tiny(), warmup_steps=6)


def supra_340m() -> TrainConfig:
  """The linear model that `transformer_340m` becomes, on 1,430 further batches: 343M parameters.

  The rates are the paper's for 1B, whose 1,000 steps of warmup are a fifth of its uptraining too.
  Source: arXiv:2405.06640 section 7 and table 3 (1B, 10B tokens of RefinedWeb).
  Command: python experiments/train.py --config=transformer_340m --workdir=runs/transformer_340m
           python experiments/convert.py --linearize=runs/transformer_340m --workdir=runs/transformer_340m_linear
           python experiments/train.py --config=supra_340m --init_from=runs/transformer_340m_linear
  Expected: no published number at this size. At 1B, HellaSwag 57.0 where the Transformer of 1.6T tokens has 62.1.
  Obtained: not run yet.
  """
  config = _uptraining(transformer_340m(), warmup_steps=286)
  config.optim.final_learning_rate = 1e-5
  return config


def _uptraining(config, warmup_steps):
  """Returns `config` with the linear model and a twentieth of the steps."""
  config.model = linearized(config.model)
  config.optim.steps, config.optim.warmup_steps = config.optim.steps // 20, warmup_steps
  return config
