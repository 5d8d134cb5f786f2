"""Evaluates a trained model on tasks of EleutherAI's lm-evaluation-harness (pip install '.[evaluation]').

  python experiments/harness.py --workdir=runs/gla_340m --tasks=lambada_openai,piqa --out=results.json
  python experiments/harness.py --workdir=runs/gla_340m --tasks=my_task --include_path=my_tasks --limit=100

`lin_jax.harness` says how texts that are longer than the training context are read.
"""

import os
import pathlib
import sys

from absl import flags

from lin_jax import files, strict_json
from lin_jax.checkpoint import load_model
from lin_jax.tokenizer import load_tokenizer
from lin_jax.workdir import environment
from running import commands, meshes

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of a training run.", required=True)
_CHECKPOINT = commands.define_checkpoint()
_MESH = meshes.define()
_TASKS = flags.DEFINE_list("tasks", None, "Names of tasks, comma-separated.", required=True)
_INCLUDE = flags.DEFINE_string("include_path", "", "Directory with your own task files (YAML).")
_DATA = flags.DEFINE_string("data", "", "Dataset directory with the tokenizer; by default the run's own.")
_SHOTS = flags.DEFINE_integer("num_fewshot", None, "Examples in the prompt; by default the task's own number.",
                              lower_bound=0)
_LIMIT = flags.DEFINE_integer("limit", None, "Documents per task, for a trial; by default all.", lower_bound=1)
_BATCH = flags.DEFINE_integer("batch_size", 16, "Rows per batch.", lower_bound=1)
_CONTEXT = flags.DEFINE_integer("context", 0, "Tokens that a model with softmax attention reads at most; 0 is its "
                                "training length. Models with a fixed state read everything.", lower_bound=0)
_OUT = flags.DEFINE_string("out", "", "JSON file that receives the results.")

_RESAMPLES = 1000  # resamples of the documents, for the standard error of a perplexity


def main(_):
  if _INCLUDE.value and not pathlib.Path(_INCLUDE.value).is_dir():
    raise ValueError(f"--include_path={_INCLUDE.value}: no such directory")
  _hide_commands()
  try:
    from lm_eval import __version__ as version
    from lm_eval.utils import handle_non_serializable, make_table

    from lin_jax.harness import HarnessModel
  except ImportError as e:
    raise ValueError(f"this command needs lm-eval: pip install '.[evaluation]' ({e})") from e
  manager, tasks = _tasks()
  with meshes.using(_MESH.value) as mesh:
    config, model = load_model(pathlib.Path(_WORKDIR.value), commands.checkpoint_step(_CHECKPOINT.value), mesh)
    tokenizer = load_tokenizer(_DATA.value or config.data.path)
    adapter = HarnessModel(model, tokenizer, context=_CONTEXT.value or config.data.sequence_length,
                           batch_size=_BATCH.value)
    results = _evaluate(adapter, manager, tasks)
  print(make_table(results))
  if "groups" in results:
    print(make_table(results, "groups"))
  if _OUT.value:
    record = {"workdir": _WORKDIR.value, "checkpoint": _CHECKPOINT.value, "context": adapter.context,
              "dtype": config.model.dtype, "environment": environment() | {"lm_eval": version}, **results}
    files.write(_OUT.value, strict_json.dumps(record, indent=2, default=handle_non_serializable) + "\n")
    print(f"written to {_OUT.value}")


def _evaluate(adapter, manager, tasks):
  from lm_eval import simple_evaluate

  # The package estimates some standard errors in forked processes, where JAX's threads may hold locks forever.
  os.environ["DISABLE_MULTIPROC"] = "1"
  try:
    return simple_evaluate(adapter, tasks=tasks, num_fewshot=_SHOTS.value, limit=_LIMIT.value, batch_size=_BATCH.value,
                           task_manager=manager, log_samples=False, bootstrap_iters=_RESAMPLES)
  except OSError as e:  # the task's data is missing, or cannot be downloaded
    raise ValueError(f"--tasks={','.join(_TASKS.value)}: {e}") from e


def _hide_commands():
  """Removes this folder from `sys.path`, where tasks that import the library `evaluate` would find evaluate.py."""
  folder = pathlib.Path(__file__).resolve().parent
  sys.path[:] = [entry for entry in sys.path if pathlib.Path(entry).resolve() != folder]


def _tasks():
  """Returns the task manager and the tasks' names, with wildcards resolved.

  Tasks that are all in --include_path are looked up there alone, because reading the package's own index is slow.
  """
  from lm_eval.tasks import TaskManager

  folder = _INCLUDE.value or None
  for defaults in (False, True) if folder else (True,):
    manager = TaskManager(include_path=folder, include_defaults=defaults)
    missing = [name for name in _TASKS.value if not manager.match_tasks([name])]
    if not missing:
      return manager, manager.match_tasks(_TASKS.value)
  raise ValueError(f"--tasks: no task {', '.join(map(repr, missing))} in lm-eval" + f" or in {folder}" * bool(folder))


if __name__ == "__main__":
  commands.run(main, cached=True)
