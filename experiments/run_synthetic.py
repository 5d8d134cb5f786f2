"""Trains models on synthetic tasks: one run, or a sweep that continues where it stopped.

  python experiments/run_synthetic.py --task=mqar --mixer=delta_net --width=64 --learning_rate=1e-3 --steps=5000 \
      --set=sequence_length=512,pairs=64 --mixer_set=conv_width=0 --out=experiments/results/synthetic.jsonl
  python experiments/run_synthetic.py --sweep=queue --until_solved --limit_seconds=540 \
      --out=experiments/results/synthetic.jsonl

Each run appends one JSON line to --out when it has ended. The learning rates and weight decays of one setting are
trained side by side. A sweep skips the runs that have a line in --out. With --sweep, the flags --task, --mixer and
--set select among its runs, --mixer_set does not apply, and every other option of a run replaces the sweep's value.
When --limit_seconds are over, or at SIGTERM, the runs under way are saved in a folder beside --out, and the same
command goes on with them. Exit codes: 0 done, or the time is over; 1 a run failed; 2 a user's error.
"""

import dataclasses
import hashlib
import json
import pathlib
import sys

from absl import flags

from lin_jax import files, mixers
from lin_jax.model import abstract_model
from running import commands, records
from running.deadline import deadline
from synthetic import TASKS
from synthetic.runs import Run, parse_fields, whole, without_rates
from synthetic.sweeps import SWEEPS, select
from synthetic.training import train

_DEFINE = {str: flags.DEFINE_string, int: flags.DEFINE_integer, float: flags.DEFINE_float}
_OPTIONS = {field.name: _DEFINE[field.type](field.name, field.default, field.metadata["help"])
            for field in dataclasses.fields(Run) if "help" in field.metadata}
_SET = flags.DEFINE_string("set", "", "Fields of the task as name=value,...; with --sweep, fields of the runs to make.")
_MIXER_SET = flags.DEFINE_string("mixer_set", "", "Fields of the mixer as name=value,...")
_SWEEP = flags.DEFINE_string("sweep", "", f"One of {', '.join(SWEEPS)}, in place of one run.")
_OUT = flags.DEFINE_string("out", "", "JSON lines file to which each run's record is appended.")
_LIMIT = flags.DEFINE_float("limit_seconds", 0, "Stops after this time and saves the runs under way; 0 for no limit.",
                            lower_bound=0)
_UNTIL_SOLVED = flags.DEFINE_bool("until_solved", False,
                                  "Ends a setting once one learning rate has solved it, and leaves out the others.")


def main(_):
  path = pathlib.Path(_OUT.value) if _OUT.value else None
  if _LIMIT.value and not path:
    raise ValueError(f"--limit_seconds={_LIMIT.value:g} needs --out, beside which an unfinished run is kept")
  runs = _sweep(path) if _SWEEP.value else [_single()]
  # The layers' own rules are checked too, before the first run takes its time.
  for model in {repr(model := run.train_config().model): model for run in runs}.values():
    abstract_model(model)
  counts, failed = _execute(runs, path)
  print(", ".join(f"{count} {name}" for name, count in counts.items()))
  if failed:
    print("failed:", *failed, sep="\n  ", file=sys.stderr)
    sys.exit(1)


def _execute(runs, path):
  """Makes the runs. Returns how many were made, skipped as done or needless, and left, and why others have failed."""
  found = records.load(path, "setting", "solved") if path else []
  done = {records.key(whole(record["setting"])) for record in found} if _SWEEP.value else set()
  solved = {records.key(without_rates(whole(record["setting"]))) for record in found if record["solved"]}
  groups, common, failed = {}, records.provenance(), []
  for run in runs:
    groups.setdefault(records.key(without_rates(run.setting())), []).append(run)
  counts = {"run": 0, "skipped": 0, "left": 0}
  with deadline(_LIMIT.value) as over:
    for number, (key, group) in enumerate(groups.items(), 1):
      needed = [run for run in group if records.key(run.setting()) not in done]
      if not needed or (_UNTIL_SOLVED.value and key in solved):
        counts["skipped"] += len(group)
        continue
      counts["skipped"] += len(group) - len(needed)
      if over():
        counts["left"] += len(needed)
        continue
      print(f"[{number}/{len(groups)}] {_title(needed)}", flush=True)
      unfinished = path and _unfinished(path, needed)
      try:
        results = train(needed, lambda line: print(" ", line, flush=True), over, unfinished,
                        until_solved=_UNTIL_SOLVED.value)
      except files.Unwritable:
        raise  # the next one could not be written either
      except Exception as e:  # runs that fail must not cost the others of a sweep their record
        if not _SWEEP.value:
          raise
        failed.append(f"{_title(needed)}: {type(e).__name__}: {e}".splitlines()[0])
        continue
      if results is None:
        counts["left"] += len(needed)
        continue
      for run, result in zip(needed, results, strict=True):
        counts["run" if result else "skipped"] += 1
        if result and path:
          records.append(path, {"run": records.now(), **common, "setting": run.setting(), **result})
      if path:
        unfinished.unlink(missing_ok=True)
  return counts, failed


def _single():
  options = {name: flag.value for name, flag in _OPTIONS.items()}
  for name, known in (("task", TASKS), ("mixer", mixers.MIXERS)):
    if options[name] not in known:
      raise ValueError(f"--{name}={options[name]}: must be one of {', '.join(known)}")
  return Run(**options, task_fields=parse_fields(TASKS[options["task"]], _SET.value),
             mixer_fields=parse_fields(mixers.config_class(options["mixer"]), _MIXER_SET.value))


def _sweep(path):
  if _SWEEP.value not in SWEEPS:
    raise ValueError(f"--sweep={_SWEEP.value}: must be one of {', '.join(SWEEPS)}")
  if path is None:
    raise ValueError("--sweep needs --out, the file that says which runs are done")
  if _MIXER_SET.value:
    raise ValueError(f"--mixer_set={_MIXER_SET.value}: not with --sweep, whose runs name their fields")
  given = {name: flag.value for name, flag in _OPTIONS.items() if flag.present}
  task, mixer = given.pop("task", ""), given.pop("mixer", "")
  runs = [dataclasses.replace(run, **given) for run in select(SWEEPS[_SWEEP.value](), task, mixer, _SET.value)]
  if not runs:
    raise ValueError(f"--sweep={_SWEEP.value}: has no run of task {task or 'any'} and mixer {mixer or 'any'}"
                     + (f" with {_SET.value}" if _SET.value else ""))
  return list({records.key(run.setting()): run for run in runs}.values())


def _unfinished(path, runs):
  """Returns the file that keeps these runs until they have ended."""
  digest = hashlib.sha256(json.dumps([run.setting() for run in runs], sort_keys=True).encode()).hexdigest()
  return path.with_suffix(".unfinished") / f"{digest[:16]}.npz"


def _title(runs):
  run = runs[0]
  rates, decays = (" ".join(f"{value:g}" for value in dict.fromkeys(getattr(run, field) for run in runs))
                   for field in ("learning_rate", "weight_decay"))
  fields = "".join(f" {name}={value}" for name, value in run.task_fields.items())
  return (f"{run.task}{fields}, {run.mixer}, width {run.width}, learning rate {rates}, weight decay {decays}, "
          f"seed {run.seed}")


if __name__ == "__main__":
  commands.run(main, cached=True)
