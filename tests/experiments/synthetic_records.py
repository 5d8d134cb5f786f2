"""Records of runs on synthetic tasks that were not made."""

from synthetic import sweeps
from synthetic.runs import Run


def record_of(run: Run, accuracy: float, **changes) -> dict:
  """A record with a test, whose measures by classes are lower and differ. `changes` replace its fields."""
  test = {"step": 2, "loss": 0.5, "accuracy": accuracy, "total_variation": 1 - accuracy,
          "validation_loss": 1 - accuracy, "validation_accuracy": accuracy}
  return {"setting": run.setting(), "accuracy": accuracy, "class_accuracy": accuracy / 2,
          "batch_class_accuracy": accuracy / 4, "solved": accuracy >= 0.99,
          "curve": [[1, 1.0, 0.0], [2, 0.5, accuracy]], "total_variation": [1.0, 1 - accuracy],
          "selected": test} | changes


def runs_of(sweep: str, **fields) -> list[Run]:
  """The runs of a sweep with these fields, whose `task_fields` may be a part of the run's."""
  part = fields.pop("task_fields", None)
  return [run for run in sweeps.SWEEPS[sweep]() if all(getattr(run, name) == value for name, value in fields.items())
          and (part is None or (part.items() <= run.task_fields.items() and (part or not run.task_fields)))]


def records_of(sweep: str, accuracy: float, **fields) -> list[dict]:
  return [record_of(run, accuracy) for run in runs_of(sweep, **fields)]
