"""Trains a `Run` and scores it on held-out sequences.

The papers' loop, reduced to what a task needs: AdamW with a cosine, no clipping, a set of examples in a new order every
epoch (or new examples at every step), a test every so many steps, an end when the task is solved. Only the positions
that count reach the head. All steps between two tests are one call of a compiled loop over examples that lie on the
device, and runs that differ in seed, learning rate or weight decay share the compiled program.
"""

import dataclasses
import functools
import itertools
import json
import math
import pathlib
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from lin_jax import optim
from lin_jax.config import ModelConfig
from lin_jax.layers import Linear
from lin_jax.loss import next_token_loss
from lin_jax.metrics import Throughput, progress
from lin_jax.model import LanguageModel

from .batch import Batch
from .runs import Run


class Answerer(nnx.Module):
  """A language model that answers at given positions, from its output there.

  With `decodes_last` its last output answers for all positions: sines of the position are added, and a two-layer GELU
  MLP of the same width decodes the sum (MAD, arXiv:2403.17844, compression).
  """

  def __init__(self, config: ModelConfig, decodes_last: bool, *, rngs: nnx.Rngs):
    self.model = LanguageModel(config, rngs=rngs, unroll=config.depth)
    linear = lambda: Linear(config.width, config.width, ("embed", None), dtype=config.dtype, rngs=rngs, bias=True)
    self.decoder = nnx.List([linear(), linear()]) if decodes_last else None

  def __call__(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
    """Activations before the head [B, M, D] for tokens [B, T] and positions [B, M]."""
    hidden, _ = self.model.hidden(tokens)
    if self.decoder is None:
      return jnp.take_along_axis(hidden, positions[..., None], axis=1)
    encoding = _sines(positions, hidden.shape[-1]).astype(hidden.dtype)
    first, second = self.decoder
    return second(jax.nn.gelu(first(jnp.broadcast_to(hidden[:, -1:], encoding.shape) + encoding)))


@dataclasses.dataclass(frozen=True)
class Programs:
  """Jitted: `create(seed)`, `advance(state, data, rows, count, rate, decay)`, `answer(params, data)`."""

  create: Callable
  advance: Callable
  answer: Callable


def train(run: Run, report: Callable[[str], None] = lambda line: None, over: Callable[[], bool] = lambda: False,
          unfinished: pathlib.Path | None = None) -> dict | None:
  """Trains; returns `accuracy` and `class_accuracy` of the last test, `solved`, `curve` [step, loss, accuracy], ...

  Once `over()` after a test, it returns None, with what it has reached in the file `unfinished`, from which the next
  call goes on to the same end.
  """
  start = time.monotonic()
  run.train_config()
  programs, throughput = _programs(_shared(run)), Throughput()
  test = run.build_task().draw(np.random.default_rng([run.seed, 1]), run.test_examples)
  held_out = _compact(test)
  state, curve = programs.create(run.seed), []
  if unfinished and unfinished.exists():
    state, curve, seconds = _restore(unfinished, state)
    start -= seconds
  step = curve[-1][0] if curve else 0
  for data, rows in _batches(run, step // run.evaluate_every):
    state, loss = programs.advance(state, data, rows, min(len(rows), run.steps - step),
                                   np.float32(run.learning_rate), np.float32(run.weight_decay))
    step, loss = min(step + len(rows), run.steps), float(loss)
    finite = math.isfinite(loss)
    said = np.zeros(test.targets.shape, np.int32)
    np.put_along_axis(said, held_out["positions"], np.asarray(programs.answer(state[0], held_out)), axis=1)
    accuracy = score(said, test)
    curve.append([step, round(loss, 5) if finite else None, round(accuracy, 5)])
    tokens = run.batch_size * test.tokens.shape[1]
    throughput.count(tokens * len(rows))
    report(f"{progress(step, run.steps, loss, throughput.read(), None, tokens)}  accuracy {accuracy:.3f}")
    if step >= run.steps or accuracy >= run.stop_accuracy or not finite:
      break
    if over():
      if unfinished:
        _save(unfinished, state, curve, time.monotonic() - start)
      return None
  kept = sorted({round(i * (len(curve) - 1) / 19) for i in range(20)})
  return {"accuracy": accuracy, "class_accuracy": None if test.allowed is not None else class_accuracy(said, test),
          "solved": accuracy >= run.stop_accuracy, "diverged": not finite, "steps": step,
          "parameters": sum(leaf.size for leaf in jax.tree.leaves(state[0])),
          "seconds": round(time.monotonic() - start, 2), "curve": [curve[i] for i in kept]}


def score(said: np.ndarray, batch: Batch) -> float:
  """Share of the masked positions at which `said` [count, T] is right."""
  if batch.allowed is None:
    right = said == batch.targets
  else:
    right = np.take_along_axis(batch.allowed, said[..., None], axis=-1)[..., 0]
  return float((right * batch.mask).sum() / batch.mask.sum())


def class_accuracy(said: np.ndarray, batch: Batch) -> float:
  """MAD's measure: the share of right answers for each token that is to be said, averaged over these tokens.

  As its authors compute it, a token that was said and is never to be said counts with 0.
  """
  counted = batch.mask > 0
  said, targets = said[counted], batch.targets[counted]
  tokens = np.union1d(said, targets)
  return float(np.mean([(said[targets == token] == token).mean() if (targets == token).any() else 0.0
                        for token in tokens]))


@functools.lru_cache(maxsize=4)
def _programs(shared: str) -> Programs:
  run = Run(**json.loads(shared))
  config, task = run.train_config(), run.build_task()
  decodes_last = getattr(task, "decodes_last", False)
  graph = nnx.graphdef(jax.eval_shape(lambda: Answerer(config.model, decodes_last, rngs=nnx.Rngs(0))))

  def optimizer(rate, decay):
    return optim.make_optimizer(dataclasses.replace(
        config.optim, learning_rate=rate, final_learning_rate=run.final_fraction * rate, weight_decay=decay))

  def create(seed):
    params = nnx.state(Answerer(config.model, decodes_last, rngs=nnx.Rngs(jax.random.key(seed))))
    return params, optimizer(1e-3, 0.0).init(params)

  def loss(params, batch):
    answerer = nnx.merge(graph, params)
    hidden = answerer(batch["tokens"], batch["positions"])
    total, _ = next_token_loss(hidden, answerer.model.unembedding(), batch["targets"], batch["weights"])
    return total / batch["weights"].sum()

  def advance(state, data, rows, count, rate, decay):
    def step(i, carry):
      params, moments, total = carry
      value, grads = jax.value_and_grad(loss)(params, {name: array[rows[i]] for name, array in data.items()})
      updates, moments = optimizer(rate, decay).update(grads, moments, params)
      return optax.apply_updates(params, updates), moments, total + value

    *state, total = jax.lax.fori_loop(0, count, step, (*state, jnp.float32(0)))
    return tuple(state), total / count.astype(jnp.float32)

  def answer(params, data):
    def one(batch):
      answerer = nnx.merge(graph, params)
      x = answerer(batch["tokens"][None], batch["positions"][None])[0]
      logits = jnp.einsum("md,dv->mv", x, answerer.model.unembedding().astype(x.dtype),
                          preferred_element_type=jnp.float32)
      return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    return jax.lax.map(one, data, batch_size=run.batch_size)

  return Programs(jax.jit(create), jax.jit(advance), jax.jit(answer))


def _shared(run):
  """The run as JSON, without what its compiled program does not depend on."""
  return json.dumps(dataclasses.asdict(run) | dict(seed=0, learning_rate=1e-3, weight_decay=0.0))


def _save(path, state, curve, seconds):
  path.parent.mkdir(parents=True, exist_ok=True)
  whole = path.with_suffix(".new")
  with whole.open("wb") as file:
    np.savez(file, *jax.tree.leaves(state), progress=json.dumps([curve, seconds]))
  whole.replace(path)


def _restore(path, like):
  """State, curve and seconds that `_save` wrote; `like` has the structure of the state."""
  with np.load(path) as file:
    leaves = [jnp.asarray(file[f"arr_{i}"]) for i in range(len(file.files) - 1)]
    return jax.tree.unflatten(jax.tree.structure(like), leaves), *json.loads(str(file["progress"]))


def _batches(run: Run, first: int = 0) -> Iterator[tuple[dict, np.ndarray]]:
  """Examples, and the rows of them [evaluate_every, batch_size] that the next steps take; without the `first` items."""
  examples, needed = run.training_examples(), run.evaluate_every * run.batch_size
  if not examples:
    rows = np.arange(needed, dtype=np.int32).reshape(run.evaluate_every, -1)
    for i in range(first, -(-run.steps // run.evaluate_every)):
      yield _compact(run.training_task().draw(np.random.default_rng([run.seed, 2, i]), needed)), rows
    return
  data = _fixed(run.training_task(), examples, run.seed)
  rng, order = np.random.default_rng([run.seed, 3]), np.zeros(0, np.int32)
  for i in itertools.count():
    while len(order) < needed:
      epoch = rng.permutation(examples)[:examples // run.batch_size * run.batch_size]
      order = np.concatenate([order, epoch.astype(np.int32)])
    if i >= first:
      yield data, order[:needed].reshape(run.evaluate_every, -1)
    order = order[needed:]


@functools.lru_cache(maxsize=2)
def _fixed(task, examples, seed):
  return jax.device_put(_compact(task.draw(np.random.default_rng([seed, 0]), examples)))


def _compact(batch: Batch) -> dict[str, np.ndarray]:
  """The batch with the positions that count, what is to be said there, and their weights, each [count, M]."""
  counts = (batch.mask > 0).sum(axis=1)
  # Where their number varies all positions stay, so that batches drawn anew share one compiled program.
  kept = counts[0] if counts.min() == counts.max() else batch.mask.shape[1]
  positions = np.argsort(batch.mask == 0, axis=1, kind="stable")[:, :kept].astype(np.int32)
  targets, weights = (np.take_along_axis(a, positions, axis=1) for a in (batch.targets, batch.mask))
  return {"tokens": batch.tokens, "positions": positions, "targets": targets, "weights": weights}


def _sines(positions, width):
  """Sines and cosines of [B, M] positions, [B, M, width] (Vaswani et al. 2017, section 3.5)."""
  frequencies = 10000.0 ** (-jnp.arange((width + 1) // 2, dtype=jnp.float32) / (width / 2))
  angles = positions[..., None].astype(jnp.float32) * frequencies[None, None]
  return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)[..., :width]
