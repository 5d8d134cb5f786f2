"""Trains a `Run`, or several that differ in their rates alone, and scores them on held-out sequences.

The papers' loop is reduced to the needs of a task: AdamW with a cosine and without clipping, a set of examples in a new
order every epoch (or new examples at every step), regular tests, and an end when the task is solved. Only the positions
that count reach the head. One model this small does not fill a GPU, so the learning rates and weight decays of a sweep
are trained side by side, as one program over a leading axis of models that all read the same batches. One call of it
takes all steps between two tests, over examples that lie on the device.
"""

import dataclasses
import json
import math
import pathlib
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lin_jax import files
from lin_jax.metrics import Throughput, progress

from .batch import Batch
from .examples import batches, compact
from .programs import Programs, programs_of, rates_of
from .runs import Run
from .scores import batch_class_accuracy, class_accuracy, score


@dataclasses.dataclass
class Course:
  """The progress of a run: its tests as {measure: value}, and its result once it has ended."""

  tests: list[dict] = dataclasses.field(default_factory=list)
  result: dict | None = None


def train(runs: Sequence[Run], report: Callable[[str], None] = lambda line: None,
          over: Callable[[], bool] = lambda: False, unfinished: pathlib.Path | None = None, *,
          until_solved: bool = False) -> list[dict | None] | None:
  """Trains runs that differ in their rates alone. A run scores the same whichever runs are beside it.

  Returns a record per run. Its last test gives `accuracy`, `class_accuracy` over all test examples,
  `batch_class_accuracy` (MAD's: the mean over batches), and `solved`. Its `curve` has up to twenty tests as
  [step, training loss, accuracy], and `total_variation` has the distance of the answer's distribution from the true one
  at these tests (None if only one answer is right). A run with validation examples also has `validation` [loss,
  accuracy] at these tests, and `selected`, which has all measures of that test, among all of the run, at which the
  validation loss is the least. With `until_solved` all runs end at the test at which the first of them has solved the
  task, and the other runs give None.

  If `over()` is true after a test, the function saves its progress in the file `unfinished` and returns None. The next
  call continues from there to the same end. Raises ValueError for runs that differ in more than their rates.
  """
  start, run, rates = time.monotonic(), runs[0], rates_of(runs)
  programs, throughput = programs_of(run), Throughput()
  test, validation = held_out(run, 1, run.test_examples), held_out(run, 4, run.validation_examples)
  state, courses, step = programs.create(run.seed, rates), [Course() for _ in runs], 0
  if unfinished and unfinished.exists():
    state, courses, step, seconds = _restore(unfinished, state)
    start -= seconds
  tokens = run.batch_size * test.batch.tokens.shape[1]
  for data, rows in batches(run, step // run.evaluate_every):
    rows = rows[:run.steps - step]
    keys = jax.random.split(jax.random.fold_in(jax.random.key(run.seed), step), len(rows))
    state, losses = programs.advance(state, data, rows, keys, rates)
    step += len(rows)
    _test(courses, run, step, losses, [held and held.answers(programs, state, run.batch_size)
                                       for held in (test, validation)])
    throughput.count(tokens * len(rows))
    report(f"{progress(step, run.steps, float(min(losses)), throughput.read(), None, tokens)}  "
           f"accuracy {' '.join(f'{course.tests[-1]["accuracy"]:.3f}' for course in courses)}")
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


@dataclasses.dataclass(frozen=True)
class Answered:
  """One model's answers to held-out examples.

  Attributes:
    batch: the examples.
    said: int32 [count, T], 0 where nothing is asked.
    loss: mean -log of the true answer's probability.
    distance: mean total variation from the true distribution, None if every position has one answer.
  """

  batch: Batch
  said: np.ndarray
  loss: float
  distance: float | None


@dataclasses.dataclass(frozen=True)
class HeldOut:
  """Examples that are not trained on, and the same reduced to the positions that count."""

  batch: Batch
  data: dict[str, np.ndarray]

  def answers(self, programs: Programs, state, batch_size: int) -> list[Answered]:
    """Returns what each model of the state answers."""
    count = len(self.batch.tokens)
    rows = np.arange(-(-count // batch_size) * batch_size, dtype=np.int32) % count  # rows repeat to fill the last batch
    said, losses, distances = jax.tree.map(lambda x: np.asarray(x).reshape(len(x), -1, x.shape[-1])[:, :count],
                                           programs.answer(state, self.data, rows.reshape(-1, batch_size)))
    whole = np.zeros((len(said), *self.batch.targets.shape), np.int32)
    np.put_along_axis(whole, self.data["positions"][None], said, axis=2)
    mean = lambda x: float(np.average(x, weights=self.data["weights"]))
    return [Answered(self.batch, whole[i], mean(losses[i]), None if distances is None else mean(distances[i]))
            for i in range(len(said))]


def held_out(run: Run, stream: int, count: int) -> HeldOut | None:
  """Draws examples from a random stream of their own, or returns None for a count of 0."""
  if not count:
    return None
  batch = run.build_task().draw(np.random.default_rng([run.seed, stream]), count)
  return HeldOut(batch, compact(batch))


def _test(courses, run, step, losses, answers):
  """Adds a test to the courses that have not ended, from all models' answers to the test and validation examples."""
  tested, validated = answers
  for course, loss, *answered in zip(courses, map(float, losses), tested, validated or [None] * len(courses),
                                     strict=True):
    if course.result is None:
      _judge(course, run, step, loss, *answered)


def _judge(course, run, step, loss, test, validation):
  """Adds a test to the course, and the result if this is the run's last test."""
  accuracy, finite = score(test.said, test.batch), math.isfinite(loss)
  measures = {"step": step, "loss": _rounded(loss), "accuracy": round(accuracy, 5),
              "total_variation": None if test.distance is None else round(test.distance, 5)}
  if validation:
    measures |= {"validation_loss": _rounded(validation.loss),
                 "validation_accuracy": round(score(validation.said, validation.batch), 5)}
  course.tests.append(measures)
  if step < run.steps and accuracy < run.stop_accuracy and finite:
    return
  kept = [course.tests[i] for i in sorted({round(i * (len(course.tests) - 1) / 19) for i in range(20)})]
  classes = test.batch.allowed is None
  course.result = {
      "accuracy": accuracy, "class_accuracy": class_accuracy(test.said, test.batch) if classes else None,
      "batch_class_accuracy": batch_class_accuracy(test.said, test.batch, run.batch_size) if classes else None,
      "solved": accuracy >= run.stop_accuracy, "diverged": not finite, "steps": step,
      "curve": [[measured["step"], measured["loss"], measured["accuracy"]] for measured in kept],
      "total_variation": None if classes else [measured["total_variation"] for measured in kept],
      "validation": [[measured["validation_loss"], measured["validation_accuracy"]] for measured in kept]
                    if validation else None,
      "selected": _selected(course.tests) if validation else None}


def _rounded(loss):
  return round(loss, 5) if math.isfinite(loss) else None


def _selected(tests):
  """Returns the test with the least validation loss, None if no loss is finite."""
  finite = [test for test in tests if test["validation_loss"] is not None]
  return min(finite, key=lambda test: test["validation_loss"]) if finite else None


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
