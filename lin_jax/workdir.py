"""A run's directory: the run to which it belongs, whether it can be written, and the environment of the run."""

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import jax

from lin_jax import files
from lin_jax.config import ModelConfig, TrainConfig, to_dict
from lin_jax.config import load as load_config
from lin_jax.config import save as save_config
from lin_jax.optim import lengthened

# The fields that may change when a run is resumed: they alter how a run is computed, watched and kept, not its results.
RESUMABLE = ("remat", "unroll", "mesh", "eval", "checkpoint", "log", "optim.accumulation", "optim.nonfinite",
             "data.worker_threads")
_LENGTH = {"optim.steps", "optim.decay_steps"}  # the fields that lengthen a run: see `lin_jax.optim.lengthened`
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def continued(workdir: pathlib.Path, config: TrainConfig) -> tuple[TrainConfig, str]:
  """`config` as the run in `workdir`, if there is one, goes on with it, and a message about more steps.

  A config with the default `model.start` takes the start with which the run began.
  Raises ValueError as `optim.lengthened` does. `prepare` refuses any other difference.
  """
  if not os.path.exists(workdir / "config.json"):  # also true where there can be no such file
    return config, ""
  saved = load_config(workdir / "config.json")
  if config.model.start == ModelConfig.start:
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, start=saved.model.start))
  if not _differing(saved, config).keys() <= _LENGTH:
    return config, ""
  optim, note = lengthened(saved.optim, config.optim)
  return dataclasses.replace(config, optim=optim), note


@contextlib.contextmanager
def locked(workdir: pathlib.Path) -> Iterator[None]:
  """Keeps `workdir` for this training run, whose first process holds the lock. Reading the directory needs no lock.

  Raises ValueError if another run holds the lock, naming its process and host, or if the directory cannot be written.
  """
  if jax.process_index():
    yield
    return
  with contextlib.ExitStack() as stack:
    try:
      stack.enter_context(files.lock(workdir / "lock", f"workdir {str(workdir)!r} is in use"))
    except files.Unwritable as e:
      raise files.Unwritable(f"workdir {str(workdir)!r} cannot be written: {e.__cause__.strerror}") from e
    yield


def prepare(workdir: pathlib.Path, config: TrainConfig, data: dict | None = None) -> None:
  """Creates `workdir` with `config.json`, `data.json` and `environment.json`, or checks that it belongs to this run.

  Args:
    data: the result of `lin_jax.manifests.describe` for the run's dataset. A run that has not recorded it does so now.
  Raises:
    ValueError: it holds a run whose config differs in a field outside `RESUMABLE`, a run on other data, or checkpoints
      of an unknown run, or it cannot be written.
  """
  saved, data_file = workdir / "config.json", workdir / "data.json"
  try:
    if saved.exists():
      _require_same_run(workdir, load_config(saved), config)
      _require_same_data(data_file, data)
    elif any(workdir.glob("checkpoints/*")):
      raise ValueError(f"workdir {str(workdir)!r} holds checkpoints but no config.json that says of which run: choose "
                       "another workdir")
    workdir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=workdir):
      pass
  except OSError as e:
    raise files.Unwritable(f"workdir {str(workdir)!r} cannot be written: {e.strerror}") from e
  if jax.process_index():
    return
  if data:  # before the config, which makes it a run: after a kill between them there is none without data
    files.write_json(data_file, data)
  save_config(config, saved)
  files.write_json(workdir / "environment.json", environment())


def environment() -> dict:
  """Command, git commit (None outside a clone), library versions and devices of this process."""
  return {
      "command": sys.argv,
      "git_commit": _git_commit(),
      "python": platform.python_version(),
      **{name: importlib.metadata.version(name) for name in PACKAGES},
      "device_kind": jax.devices()[0].device_kind,
      "device_count": jax.device_count(),
      "process_count": jax.process_count(),
  }


def _require_same_run(workdir, saved, config):
  differing = _differing(saved, config)
  if differing.keys() <= _LENGTH and lengthened(saved.optim, config.optim)[0] == config.optim:
    return
  if differing:
    changes = ", ".join(f"{name} was {was!r}, now {now!r}" for name, (was, now) in differing.items())
    raise ValueError(f"workdir {str(workdir)!r} holds a run of another config ({changes}): "
                     "choose another workdir, or the config it was started with")


def _require_same_data(file, data):
  if not data or not file.exists():
    return
  try:
    saved = json.loads(file.read_text(encoding="utf-8"))
    same = saved["sha256"] == data["sha256"]
  except (OSError, ValueError, KeyError, TypeError) as e:
    raise ValueError(f"{file}: not a run's record of its data ({e!r})") from e
  if not same:
    was, now = (f"{d.get('path')!r} with digest {d['sha256']} and {d.get('train_tokens')} training tokens"
                for d in (saved, data))
    raise ValueError(f"workdir {str(file.parent)!r} holds a run on other data (it was {was}, it is now {now}): choose "
                     "another workdir, or the data that the run was started with")


def _differing(saved, config):
  """The fields outside `RESUMABLE` that differ, each name with both values."""
  saved, config = (dict(_fields(to_dict(c))) for c in (saved, config))
  return {name: (saved.get(name), config.get(name)) for name in sorted(saved.keys() | config.keys())
          if saved.get(name) != config.get(name)
          and not any(name == prefix or name.startswith(prefix + ".") for prefix in RESUMABLE)}


def _fields(values, prefix=""):
  for name, value in values.items():
    if isinstance(value, dict):
      yield from _fields(value, f"{prefix}{name}.")
    else:
      yield prefix + name, value


def _git_commit():
  root = pathlib.Path(__file__).resolve().parent.parent
  try:
    result = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
  except (OSError, subprocess.CalledProcessError):
    return None
  return result.stdout.strip()
