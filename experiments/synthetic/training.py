"""Trains a `Run`, or several that differ in the learning rate alone, and scores them on held-out sequences.

The papers' loop is reduced to the needs of a task: AdamW with a cosine and without clipping, a set of examples in a new
order every epoch (or new examples at every step), regular tests, and an end when the task is solved. Only the positions
that count reach the head. One model this small does not fill a GPU, so the learning rates of a sweep are trained side
by side, as one program over a leading axis of models that all read the same batches. One call of it takes all steps
between two tests, over examples that lie on the device.
"""

import dataclasses
import functools
import json
import math
import pathlib
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from lin_jax import files, optim
from lin_jax.loss import next_token_loss
from lin_jax.metrics import Throughput, progress

from .answerer import Answerer
from .examples import batches, compact
from .runs import Run, without_rate
from .scores import class_accuracy, score, total_variation


@dataclasses.dataclass(frozen=True)
class Programs:
  """Jitted functions over R models, which are stacked on the leading axis of every state.

  `peaks` and `ends` [R] are the learning rates at their peak and at their end.

  Attributes:
    create: (seed, peaks, ends) to a state.
    advance: (state, data, rows, keys, peaks, ends) to the state after a step for each of `rows` [steps, batch_size] and
      `keys` [steps], and the mean losses [R].
    answer: (state, data, rows) to the models' answers [R, *rows.shape, M] and the distance of their distribution from
      the true one, which is None for tasks with one right answer per position.
  """

  create: Callable
  advance: Callable
  answer: Callable


@dataclasses.dataclass
class Course:
  """The progress of a run: its curve of [step, loss, accuracy], its distance from the true distribution at each test,
  and its result once it has ended."""

  curve: list[list] = dataclasses.field(default_factory=list)
  distances: list[float | None] = dataclasses.field(default_factory=list)
  result: dict | None = None


def train(runs: Sequence[Run], report: Callable[[str], None] = lambda line: None,
          over: Callable[[], bool] = lambda: False, unfinished: pathlib.Path | None = None, *,
          until_solved: bool = False) -> list[dict | None] | None:
  """Trains runs that differ in the learning rate alone. A run scores the same whichever runs are beside it.

  Returns a record per run: `accuracy` and `class_accuracy` of its last test, `solved`, `curve` [step, loss, accuracy],
  `total_variation` of the answer's distribution from the true one at the curve's tests (None if only one answer is
  right), and more. With `until_solved` all runs end at the test at which the first of them has solved the task, and the
  other runs give None.

  If `over()` is true after a test, the function saves its progress in the file `unfinished` and returns None. The next
  call continues from there to the same end. Raises ValueError for runs that differ in more than the learning rate.
  """
  start, run, (peaks, ends) = time.monotonic(), runs[0], _rates(runs)
  programs, throughput = _programs(_shared(run)), Throughput()
  test = run.build_task().draw(np.random.default_rng([run.seed, 1]), run.test_examples)
  held_out = compact(test)
  state, courses, step = programs.create(run.seed, peaks, ends), [Course() for _ in runs], 0
  if unfinished and unfinished.exists():
    state, courses, step, seconds = _restore(unfinished, state)
    start -= seconds
  tokens = run.batch_size * test.tokens.shape[1]
  for data, rows in batches(run, step // run.evaluate_every):
    rows = rows[:run.steps - step]
    keys = jax.random.split(jax.random.fold_in(jax.random.key(run.seed), step), len(rows))
    state, losses = programs.advance(state, data, rows, keys, peaks, ends)
    step += len(rows)
    answers = _answers(programs, state, held_out, test.targets.shape, run.batch_size)
    for course, loss, said, distance in zip(courses, map(float, losses), *answers, strict=True):
      if course.result is None:
        _judge(course, run, step, loss, said, distance, test)
    throughput.count(tokens * len(rows))
    report(f"{progress(step, run.steps, float(min(losses)), throughput.read(), None, tokens)}  "
           f"accuracy {' '.join(f'{course.curve[-1][2]:.3f}' for course in courses)}")
    results = [course.result for course in courses]
    if all(results) or until_solved and any(result and result["solved"] for result in results):
      break
    if over():
      if unfinished:
        _save(unfinished, state, courses, step, time.monotonic() - start)
      return None
  together = {"parameters": sum(leaf.size for leaf in jax.tree.leaves(state[0])) // len(runs),
              "side_by_side": len(runs), "seconds": round(time.monotonic() - start, 2)}
  return [result and result | together for result in results]


def _rates(runs):
  """Returns the learning rates at the peak and at the end of each run. The runs must differ in nothing else."""
  if any(without_rate(run.setting()) != without_rate(runs[0].setting()) for run in runs):
    raise ValueError("runs that are trained side by side may differ in the learning rate and its end alone")
  return [np.array([getattr(run.train_config().optim, field) for run in runs], np.float32)
          for field in ("learning_rate", "final_learning_rate")]


def _judge(course, run, step, loss, said, distance, test):
  """Adds a test to the course, and the result if this is the run's last test."""
  accuracy, finite = score(said, test), math.isfinite(loss)
  course.curve.append([step, round(loss, 5) if finite else None, round(accuracy, 5)])
  course.distances.append(distance)
  if step < run.steps and accuracy < run.stop_accuracy and finite:
    return
  kept = sorted({round(i * (len(course.curve) - 1) / 19) for i in range(20)})
  course.result = {
      "accuracy": accuracy, "class_accuracy": None if test.allowed is not None else class_accuracy(said, test),
      "solved": accuracy >= run.stop_accuracy, "diverged": not finite, "steps": step,
      "curve": [course.curve[i] for i in kept],
      "total_variation": None if test.allowed is None else [round(course.distances[i], 5) for i in kept]}


@functools.lru_cache(maxsize=4)
def _programs(shared: str) -> Programs:
  run = Run(**json.loads(shared))
  config, task = run.train_config(), run.build_task()
  decodes_last = getattr(task, "decodes_last", False)
  build = lambda seed: Answerer(config.model, decodes_last, run.start, run.embedding_dropout, rngs=nnx.Rngs(seed))
  graph = nnx.graphdef(jax.eval_shape(lambda: build(0)))

  def create(seed, peaks, ends):
    params = nnx.state(build(jax.random.key(seed)))
    return jax.vmap(lambda peak, end: (params, _optimizer(config, peak, end).init(params)))(peaks, ends)

  def loss(params, batch, key):
    answerer = nnx.merge(graph, params)
    hidden = answerer(batch["tokens"], batch["positions"], key)
    total, _ = next_token_loss(hidden, answerer.model.unembedding(), batch["targets"], batch["weights"])
    return total / batch["weights"].sum()

  def update(state, peak, end, batch, key):
    params, moments = state
    value, grads = jax.value_and_grad(loss)(params, batch, key)
    updates, moments = _optimizer(config, peak, end).update(grads, moments, params)
    return (optax.apply_updates(params, updates), moments), value

  def advance(state, data, rows, keys, peaks, ends):
    step = lambda state, now: jax.vmap(update, in_axes=(0, 0, 0, None, None))(
        state, peaks, ends, {name: array[now[0]] for name, array in data.items()}, now[1])
    state, losses = jax.lax.scan(step, state, (rows, keys))
    return state, losses.mean(axis=0)

  def answer(state, data, rows):
    def say(params, batch):
      answerer = nnx.merge(graph, params)
      x = answerer(batch["tokens"], batch["positions"])
      logits = jnp.einsum("bmd,dv->bmv", x, answerer.model.unembedding().astype(x.dtype),
                          preferred_element_type=jnp.float32)
      distance = total_variation(logits, batch["allowed"]) if "allowed" in batch else None
      return jnp.argmax(logits, axis=-1).astype(jnp.int32), distance

    found = jax.lax.map(lambda batch_rows: jax.vmap(say, in_axes=(0, None))(
        state[0], {name: array[batch_rows] for name, array in data.items()}), rows)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), found)

  return Programs(jax.jit(create), jax.jit(advance), jax.jit(answer))


def _optimizer(config, peak, end):
  return optim.make_optimizer(dataclasses.replace(config.optim, learning_rate=peak, final_learning_rate=end))


def _shared(run):
  """Returns the run as JSON, with fixed values for the fields that do not change its compiled program."""
  return json.dumps(dataclasses.asdict(run) | dict(seed=0, learning_rate=1e-3, final_fraction=0.0))


def _answers(programs, state, held_out, shape, batch_size):
  """Returns each model's answers at the positions that count, with 0 elsewhere, [R, *shape], and its mean total
  variation [R] from the true distribution, or Nones if every position has one answer."""
  count = shape[0]
  rows = np.arange(-(-count // batch_size) * batch_size, dtype=np.int32) % count  # rows repeat to fill the last batch
  said, distance = jax.tree.map(lambda x: np.asarray(x).reshape(len(x), -1, x.shape[-1])[:, :count],
                                programs.answer(state, held_out, rows.reshape(-1, batch_size)))
  whole = np.zeros((len(said), *shape), np.int32)
  np.put_along_axis(whole, np.asarray(held_out["positions"])[None], said, axis=2)
  if distance is None:
    return whole, [None] * len(said)
  return whole, [float(np.average(x, weights=held_out["weights"])) for x in distance]


def _save(path, state, courses, step, seconds):
  path.parent.mkdir(parents=True, exist_ok=True)
  reached = json.dumps([list(map(dataclasses.asdict, courses)), step, seconds])
  with files.replacing(path) as file:
    np.savez(file, *jax.tree.leaves(state), progress=reached)


def _restore(path, like):
  """Reads state, courses, step and seconds that `_save` wrote; `like` has the structure of the state."""
  with np.load(path) as file:
    leaves = [jnp.asarray(file[f"arr_{i}"]) for i in range(len(file.files) - 1)]
    courses, step, seconds = json.loads(str(file["progress"]))
  return jax.tree.unflatten(jax.tree.structure(like), leaves), [Course(**course) for course in courses], step, seconds
