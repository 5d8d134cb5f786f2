"""Jitted functions that train and test several models at once, which differ in their rates alone."""

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from lin_jax import optim

from .answerer import Answerer
from .runs import RATES, Run, without_rates
from .scores import total_variation


@dataclasses.dataclass(frozen=True)
class Programs:
  """Jitted functions over R models, which are stacked on the leading axis of every state.

  `rates` are learning rates at their peak and at their end and weight decays, each [R]: see `rates_of`.

  Attributes:
    create: (seed, rates) to a state.
    advance: (state, data, rows, keys, rates) to the state after a step for each of `rows` [steps, batch_size] and
      `keys` [steps], and the mean losses [R].
    answer: (state, data, rows) to the models' answers [R, *rows.shape, M], the losses of the true answers, and the
      distance of their distribution from the true one, which is None for tasks with one right answer per position.
  """

  create: Callable
  advance: Callable
  answer: Callable


def rates_of(runs: Sequence[Run]) -> dict[str, np.ndarray]:
  """Returns the rates of runs that differ in nothing else, else raises ValueError."""
  if any(without_rates(run.setting()) != without_rates(runs[0].setting()) for run in runs):
    raise ValueError(f"runs that are trained side by side may differ in {', '.join(RATES)} alone")
  return {field: np.array([getattr(run.train_config().optim, field) for run in runs], np.float32)
          for field in ("learning_rate", "final_learning_rate", "weight_decay")}


def programs_of(run: Run) -> Programs:
  """Returns the functions for runs that differ from this one in seed and rates. They are compiled once."""
  return _programs(json.dumps(dataclasses.asdict(run) | dict(seed=0, learning_rate=1e-3, final_fraction=0.0,
                                                             weight_decay=0.1)))


@functools.lru_cache(maxsize=4)
def _programs(shared: str) -> Programs:
  run = Run(**json.loads(shared))
  config, task = run.train_config(), run.build_task()
  decodes_last = getattr(task, "decodes_last", False)
  build = lambda seed: Answerer(config.model, decodes_last, run.start, run.embedding_dropout, run.output,
                                rngs=nnx.Rngs(seed))
  graph = nnx.graphdef(jax.eval_shape(lambda: build(0)))
  optimizer = lambda rates: optim.make_optimizer(dataclasses.replace(config.optim, **rates))

  def create(seed, rates):
    params = nnx.state(build(jax.random.key(seed)))
    return jax.vmap(lambda rates: (params, optimizer(rates).init(params)))(rates)

  def loss(params, batch, key):
    answerer = nnx.merge(graph, params)
    hidden = answerer(batch["tokens"], batch["positions"], key)
    return answerer.loss(hidden, batch["targets"], batch["weights"])

  def update(state, rates, batch, key):
    params, moments = state
    value, grads = jax.value_and_grad(loss)(params, batch, key)
    updates, moments = optimizer(rates).update(grads, moments, params)
    return (optax.apply_updates(params, updates), moments), value

  def advance(state, data, rows, keys, rates):
    step = lambda state, now: jax.vmap(update, in_axes=(0, 0, None, None))(
        state, rates, {name: array[now[0]] for name, array in data.items()}, now[1])
    state, losses = jax.lax.scan(step, state, (rows, keys))
    return state, losses.mean(axis=0)

  def say(params, batch):
    answerer = nnx.merge(graph, params)
    logits = answerer.logits(answerer(batch["tokens"], batch["positions"]))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
    distance = total_variation(logits, batch["allowed"]) if "allowed" in batch else None
    return jnp.argmax(logits, axis=-1).astype(jnp.int32), losses, distance

  def answer(state, data, rows):
    found = jax.lax.map(lambda batch_rows: jax.vmap(say, in_axes=(0, None))(
        state[0], {name: array[batch_rows] for name, array in data.items()}), rows)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), found)

  return Programs(jax.jit(create), jax.jit(advance), jax.jit(answer))
