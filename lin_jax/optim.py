"""AdamW with clipping by global norm, linear warmup, cosine decay, and weight decay on matrices only."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from lin_jax.config import OptimConfig


def make_optimizer(config: OptimConfig) -> optax.GradientTransformation:
  """Clip to `config.clip_norm`, then AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101), decay decoupled."""
  return optax.chain(
      optax.clip_by_global_norm(config.clip_norm),
      optax.adamw(learning_rate(config), config.beta1, config.beta2, config.eps, weight_decay=config.weight_decay,
                  mask=matrices),
  )


def learning_rate(config: OptimConfig) -> optax.Schedule:
  """Update number (from 0) to learning rate: the first update already moves, the last uses `final_learning_rate`."""
  warmup = config.warmup_steps
  rising = optax.linear_schedule(0.0, config.learning_rate, warmup + 1)
  falling = optax.cosine_decay_schedule(config.learning_rate, max(1, config.steps - 1 - warmup),
                                        config.final_learning_rate / config.learning_rate)
  return lambda count: jnp.where(count < warmup, rising(count + 1), falling(count - warmup))


def matrices(params) -> object:
  """Same-structure booleans: True for parameters with two or more axes of their own.

  Parameters of stacked layers carry a leading layer axis besides, so the logical axis names are counted where the
  parameter has them, and its dimensions where it has none.
  """
  return jax.tree.map(lambda p: axis_count(p) >= 2, params, is_leaf=lambda x: isinstance(x, nnx.Variable))


def axis_count(param) -> int:
  """Number of axes of one layer's parameter."""
  names = param.get_metadata().get("out_sharding") if isinstance(param, nnx.Variable) else None
  return len(names) if names is not None else param.ndim
