"""AdamW and Muon with clipping by global norm, a schedule of the rate, and weight decay on matrices only."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from lin_jax.config import OptimConfig

_MOMENTUM = 0.95  # of Muon, as its authors and Liu et al. have it


@functools.partial(jax.tree_util.register_dataclass, meta_fields=[],
                   data_fields=["peak", "final", "warmup", "begin", "length"])
@dataclasses.dataclass(frozen=True)
class ScheduleNumbers:
  """What a schedule of the learning rate is computed from. A compiled step takes these numbers as arguments, so that
  runs that differ in nothing else share its program."""

  peak: float
  final: float
  warmup: float  # updates in which the rate rises
  begin: float  # the update after which the rate falls from its peak to `final`, infinite if it never does
  length: float  # updates in which it falls


def schedule_numbers(config: OptimConfig) -> ScheduleNumbers:
  """Returns the numbers of the schedule that `config` describes."""
  if config.schedule == "cosine":
    begin, end = config.warmup_steps, (config.decay_steps or config.steps) - 1
  else:
    end = config.steps - 1
    begin = end - config.decay_steps if config.decay_steps else math.inf
  return ScheduleNumbers(config.learning_rate, config.final_learning_rate, config.warmup_steps, begin,
                         max(1, end - begin))


def make_optimizer(config: OptimConfig, numbers: ScheduleNumbers | None = None) -> optax.GradientTransformation:
  """Clips to `config.clip_norm`, applies the optimizer `config.name`, and decays matrices apart from the gradient.

  "adamw" is Loshchilov & Hutter 2019 (arXiv:1711.05101). "muon" orthogonalizes the momentum of each product's kernel
  (Jordan et al. 2024) and scales it to the size of AdamW's updates (Liu et al. 2025, arXiv:2502.16982), so that rates
  and decays of AdamW serve it too. Embeddings, heads, convolutions and vectors are left to AdamW.

  The learning rate is that of `learning_rate(config, numbers)`.
  """
  rate = learning_rate(config, numbers)
  decay = dict(weight_decay=config.weight_decay, mask=matrices)
  adam = dict(b1=config.beta1, b2=config.beta2, eps=config.eps)
  if config.name == "adamw":
    steps = [optax.adamw(rate, **adam, **decay)]
  else:
    muon = optax.chain(optax.contrib.scale_by_muon(beta=_MOMENTUM, weight_dimension_numbers=_last_axes),
                       optax.stateless(_like_adam))
    steps = [optax.partition({"muon": muon, "adam": optax.scale_by_adam(**adam)}, _optimizers),
             optax.add_decayed_weights(**decay), optax.scale_by_learning_rate(rate)]
  optimizer = optax.chain(optax.clip_by_global_norm(config.clip_norm), *steps)

  def update(grads, state, params):
    # Optax mixes integer counts and floats, which fails if the caller has turned implicit promotion off.
    with jax.numpy_dtype_promotion("standard"):
      return optimizer.update(grads, state, params)

  return optax.GradientTransformation(optimizer.init, update)


def learning_rate(config: OptimConfig, numbers: ScheduleNumbers | None = None) -> optax.Schedule:
  """Maps the number of an update, from 0, to its learning rate. `numbers` are by default those of `config`.

  The first update already moves. The rate then falls as half a cosine, or with the schedule "wsd" linearly after a
  time at its peak (Hu et al. 2024, arXiv:2404.06395; Hägele et al. 2024, arXiv:2405.18392). The last update of the
  decay and all updates after it use `final_learning_rate`.
  """
  numbers = schedule_numbers(config) if numbers is None else numbers

  def schedule(count):
    count = jnp.asarray(count, jnp.float32)
    progress = jnp.clip((count - numbers.begin) / numbers.length, 0.0, 1.0)
    ahead = 0.5 * (1.0 + jnp.cos(jnp.pi * progress)) if config.schedule == "cosine" else 1.0 - progress
    return jnp.where(count < numbers.warmup, numbers.peak * (count + 1.0) / (numbers.warmup + 1),
                     numbers.final + (numbers.peak - numbers.final) * ahead)

  return schedule


def _optimizers(params):
  """The optimizer's name for each parameter under "muon"."""

  def name(path, param):
    by_adam = re.search(r"^(embedding|head)$|convolution", parameter_name(path))
    return "adam" if by_adam or axis_count(param) < 2 else "muon"

  return jax.tree_util.tree_map_with_path(name, params, is_leaf=lambda x: isinstance(x, nnx.Variable))


def _last_axes(updates):
  """Every other axis is one of matrices that are orthogonalized each by itself."""
  return jax.tree.map(lambda x: optax.contrib.MuonDimensionNumbers(x.ndim - 2, x.ndim - 1), updates)


def _like_adam(updates, _):
  return jax.tree.map(lambda x: 0.2 * max(x.shape[-2:]) ** 0.5 * x, updates)


def lengthened(old: OptimConfig, new: OptimConfig) -> tuple[OptimConfig, str]:
  """`new` for a run that was begun with `old`, and a message about the change. `new` may differ by more steps.

  Raises ValueError for fewer steps, for another end of the decay, and for more steps at a rate of zero. A run of the
  schedule "wsd" may neither have begun its decay nor begin it within the steps that were planned.
  """
  end, constant = old.decay_steps or old.steps, new.final_learning_rate == new.learning_rate
  if new.steps < old.steps:
    raise ValueError(f"config.optim.steps={new.steps}: this run has {old.steps} steps, and a run is not shortened: "
                     f"give {old.steps}, more to lengthen it, or another workdir")
  if new.schedule == "wsd":
    return new, _lengthened_stable(old, new)
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


def _lengthened_stable(old, new):
  if (new.steps, new.decay_steps) == (old.steps, old.decay_steps):
    return ""
  if old.decay_steps:
    raise ValueError(f"config.optim.steps={new.steps}, config.optim.decay_steps={new.decay_steps}: this run of "
                     f"{old.steps} steps ends with a decay of {old.decay_steps}: only a run without a decay is "
                     "lengthened, so give these numbers, or another workdir")
  if new.steps - new.decay_steps < old.steps:
    raise ValueError(f"config.optim.decay_steps={new.decay_steps}: the decay would begin at step "
                     f"{new.steps - new.decay_steps}: this run is planned at a constant rate until step {old.steps}")
  decay = f", of which the last {new.decay_steps} are the decay" if new.decay_steps else " at a constant rate"
  return f"lengthened from {old.steps} to {new.steps} steps{decay}"


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


def parameter_name(path: tuple) -> str:
  """The name of the parameter at a path of JAX's trees, as checkpoints have it."""
  return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
