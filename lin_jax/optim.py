"""AdamW with clipping by global norm, linear warmup, cosine decay, and weight decay on matrices only."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from lin_jax.config import OptimConfig


def make_optimizer(config: OptimConfig) -> optax.GradientTransformation:
  """Clips to `config.clip_norm` and applies AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) with decoupled decay."""
  optimizer = optax.chain(
      optax.clip_by_global_norm(config.clip_norm),
      optax.adamw(learning_rate(config), config.beta1, config.beta2, config.eps, weight_decay=config.weight_decay,
                  mask=matrices),
  )

  def update(grads, state, params):
    # Optax mixes integer counts and floats, which fails if the caller has turned implicit promotion off.
    with jax.numpy_dtype_promotion("standard"):
      return optimizer.update(grads, state, params)

  return optax.GradientTransformation(optimizer.init, update)


def learning_rate(config: OptimConfig) -> optax.Schedule:
  """Maps the number of an update, from 0, to its learning rate. The first update already moves. The last update of the
  decay and all updates after it use `final_learning_rate`."""
  decay_steps = config.decay_steps or config.steps
  warmup, peak, final = config.warmup_steps, config.learning_rate, config.final_learning_rate

  def schedule(count):
    count = jnp.asarray(count, jnp.float32)
    progress = jnp.clip((count - warmup) / max(1, decay_steps - 1 - warmup), 0.0, 1.0)
    cosine = final + (peak - final) * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
    return jnp.where(count < warmup, peak * (count + 1.0) / (warmup + 1), cosine)

  return schedule


def lengthened(old: OptimConfig, new: OptimConfig) -> tuple[OptimConfig, str]:
  """`new` for a run that was begun with `old`, and a message about the change. `new` may differ by more steps.

  Raises ValueError for fewer steps, for another end of the decay, and for more steps at a rate of zero.
  """
  end, constant = old.decay_steps or old.steps, new.final_learning_rate == new.learning_rate
  if new.steps < old.steps:
    raise ValueError(f"config.optim.steps={new.steps}: this run has {old.steps} steps, and a run is not shortened: "
                     f"give {old.steps}, more to lengthen it, or another workdir")
  if new.decay_steps not in (0, end) and not constant:
    raise ValueError(f"config.optim.decay_steps={new.decay_steps}: the learning rate of this run decays until step "
                     f"{end}: give that, or another workdir")
  if new.steps == old.steps or constant:
    note = f"lengthened from {old.steps} to {new.steps} steps at a constant rate" if new.steps > old.steps else ""
    return dataclasses.replace(new, decay_steps=old.decay_steps), note
  if new.final_learning_rate == 0:
    raise ValueError(f"config.optim.steps={new.steps}: the learning rate of this run is 0 after step {end}, so that "
                     "more steps would learn nothing: begin a run of as many in another workdir")
  return dataclasses.replace(new, decay_steps=end), (
      f"lengthened from {old.steps} to {new.steps} steps: the learning rate decays until step {end} as it was planned, "
      f"and then stays at {new.final_learning_rate:g}, other than in a run of {new.steps} steps from the start; "
      f"config.optim.decay_steps={end} records it")


def matrices(params) -> object:
  """Booleans in the structure of `params`: True for parameters with two or more axes of their own.

  Parameters of stacked layers have a leading layer axis besides. The logical axis names are therefore counted where the
  parameter has them, and its dimensions where it has none.
  """
  return jax.tree.map(lambda p: axis_count(p) >= 2, params, is_leaf=lambda x: isinstance(x, nnx.Variable))


def axis_count(param) -> int:
  """Number of axes of one layer's parameter."""
  names = param.get_metadata().get("out_sharding") if isinstance(param, nnx.Variable) else None
  return len(names) if names is not None else param.ndim
