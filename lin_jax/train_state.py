"""The state of a training run: made where it belongs, laid out for its step, and as checkpoints hold it."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lin_jax import optim, sharding
from lin_jax.checkpoint import Checkpoints
from lin_jax.config import DataConfig, TrainConfig
from lin_jax.layer_stacks import apart, together
from lin_jax.lora import add_adapters
from lin_jax.model import LanguageModel
from lin_jax.trainable import combined, in_used_dtypes, parameter_names, partition, trainable_names


@functools.partial(jax.tree_util.register_dataclass, meta_fields=[],
                   data_fields=["params", "opt_state", "step", "skipped", "carried", "frozen", "schedule"])
@dataclasses.dataclass
class TrainState:
  """The state that an optimizer step reads and writes."""

  params: Any  # nnx.State of the float32 parameters that train, with config.unroll = 0 `apart`
  opt_state: Any
  step: jax.Array  # batches consumed
  skipped: jax.Array  # the part of `step` whose loss or gradient was not finite
  carried: Any = None  # with data.carried_windows above 1, the model's state from which each row continues
  frozen: Any = None  # the other parameters in the dtypes in which they are used: see `lin_jax.trainable`
  schedule: optim.ScheduleNumbers | None = None  # not in checkpoints, because the config has them

  def parameters(self) -> Any:
    """All parameters of the model."""
    return self.params if self.frozen is None else combined(self.params, self.frozen)


def make_state(config: TrainConfig, mesh: jax.sharding.Mesh):
  """Returns (graph, optimizer, abstract, create).

  They are the module's structure, a function from `optim.ScheduleNumbers` to the transformation, the `TrainState` as
  shapes with their shardings, and a function that makes it, with every leaf created directly where it belongs.

  The seed and the schedule's numbers are arguments of the compiled programs, so that runs which differ in nothing
  else find these in the compilation cache.

  Raises ValueError for a pattern in `config.optim.trainable` or `config.lora.targets` that chooses nothing.
  """
  optimizer = functools.partial(optim.make_optimizer, config.optim)

  def build(seed):
    rngs = nnx.Rngs(jax.random.key(seed))
    model = LanguageModel(config.model, rngs=rngs, remat=config.remat, unroll=config.unroll)
    return add_adapters(model, config.lora, rngs=rngs)

  # NumPy's, because `mesh` may have devices that do not exist, on which a JAX array cannot be.
  given = np.int64(config.seed), _schedule(config)
  model = jax.eval_shape(build, given[0])
  names = trainable_names(config, nnx.state(model))

  def init(seed, schedule):
    model = build(seed)
    params = nnx.state(model)
    frozen = partition(in_used_dtypes(nnx.graphdef(model), params), names)[1]
    params = partition(params, names)[0]
    if config.unroll == 0:
      # Without the barrier the compiler would draw a whole stack again for each of its layers, and take minutes to
      # compile that.
      params, frozen = apart(jax.lax.optimization_barrier((params, frozen)))
    carried = empty_carried(model, config.data)
    moments = optimizer(schedule).init(params)
    return TrainState(params, moments, jnp.int32(0), jnp.int32(0), carried, frozen, schedule)

  shapes = jax.eval_shape(init, *given)
  rows = NamedSharding(mesh, P(None, sharding.BATCH_AXES))  # states have a leading axis of layers
  shardings = dataclasses.replace(sharding.param_shardings(shapes, mesh),
                                  carried=jax.tree.map(lambda _: rows, shapes.carried))
  abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
  create = functools.partial(jax.jit(init, out_shardings=shardings), *given)
  return nnx.graphdef(model), optimizer, abstract, create


def empty_carried(model: LanguageModel, data: DataConfig) -> Any:
  """`TrainState.carried` before a row's first window. Raises ValueError for a model that cannot carry its state."""
  if data.carried_windows == 1:
    return None
  longest = data.carried_windows * data.sequence_length
  window, whole = (jax.eval_shape(lambda length=length: model.init_state(data.batch_size, length))
                   for length in (data.sequence_length, longest))
  if window != whole:
    raise ValueError(f"config.data.carried_windows={data.carried_windows}: the state of this model grows beyond "
                     f"config.data.sequence_length={data.sequence_length} tokens, as a cache of attention does: only "
                     "states of constant size can be carried")
  return model.init_state(data.batch_size, longest)


def restore(checkpoints: Checkpoints, step: int, abstract: TrainState, batches: Any, config: TrainConfig) -> TrainState:
  """The state that a run saved at `step`, placed and laid out like `abstract`. Moves `batches` to its position then."""
  require_rows(checkpoints.processes(step), config.data)
  layout = _saved_layout(abstract)
  params, rest = checkpoints.restore(step, layout.parameters(), _rest(layout), batches)
  params, frozen = partition(params, parameter_names(layout.params))
  schedule = jax.device_put(_schedule(config), placement(layout).schedule)
  state = TrainState(params, **rest, frozen=frozen, schedule=schedule)
  return state if layout is abstract else jax.jit(apart, out_shardings=placement(abstract))(state)


def saved_form(abstract: TrainState) -> Callable[[TrainState], tuple[Any, dict]]:
  """The function from a state to its parameters and to its rest as checkpoints hold them, with the layers stacked.

  The stacks are copies, so that saving a state whose layers are apart needs the memory of another state.
  """
  layout = _saved_layout(abstract)
  stack = (lambda state: state) if layout is abstract else jax.jit(together, out_shardings=placement(layout))

  def split(state):
    state = stack(state)
    return state.parameters(), _rest(state)

  return split


def placement(abstract: TrainState) -> TrainState:
  """The sharding of each array of a state."""
  return jax.tree.map(lambda x: x.sharding, abstract)


def require_rows(processes: int | None, data: DataConfig) -> None:
  """Refuses another number of processes: a carried state belongs to a row, and that number decides a row's windows."""
  if data.carried_windows > 1 and processes not in (None, jax.process_count()):
    raise ValueError(f"config.data.carried_windows={data.carried_windows}: the run was saved by {processes} processes "
                     f"and cannot go on with {jax.process_count()}, since its rows carry a state: start as many")


def _schedule(config):
  return jax.tree.map(np.float32, optim.schedule_numbers(config.optim))


def _saved_layout(abstract):
  shapes = jax.eval_shape(together, abstract)
  if jax.tree.structure(shapes) == jax.tree.structure(abstract):
    return abstract
  mesh = abstract.step.sharding.mesh
  placed = dataclasses.replace(sharding.param_shardings(shapes, mesh), carried=placement(abstract).carried)
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, placed)


def _rest(state):
  return {"opt_state": state.opt_state, "step": state.step, "skipped": state.skipped, "carried": state.carried}
