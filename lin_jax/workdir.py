"""A run's directory: which run it belongs to, whether it can be written, and in what environment the run was made."""

import importlib.metadata
import json
import pathlib
import platform
import subprocess
import sys
import tempfile

import jax

from lin_jax import config as configs
from lin_jax.config import TrainConfig

# What may change when a run is resumed: it alters how the run is computed, watched and kept, not what it computes.
RESUMABLE = ("remat", "mesh", "eval", "checkpoint", "log", "optim.accumulation", "optim.nonfinite",
             "data.worker_threads")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def prepare(workdir: pathlib.Path, config: TrainConfig) -> None:
  """Creates `workdir` with `config.json` and `environment.json`, or checks that it belongs to this run.

  Raises:
    ValueError: it holds a run whose config differs in a field outside `RESUMABLE`, or checkpoints of an unknown run, or
      it cannot be written.
  """
  saved = workdir / "config.json"
  try:
    if saved.exists():
      _require_same_run(workdir, configs.load(saved), config)
    elif any(workdir.glob("checkpoints/*")):
      raise ValueError(f"workdir {str(workdir)!r} holds checkpoints but no config.json that says of which run: choose "
                       "another workdir")
    workdir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=workdir):
      pass
  except OSError as e:
    raise ValueError(f"workdir {str(workdir)!r} cannot be written: {e.strerror}") from e
  if jax.process_index():
    return
  # Renamed into place: other processes, or a run after a kill, never read half a file.
  configs.save(config, unfinished := workdir / "config.json.new")
  unfinished.replace(saved)
  (workdir / "environment.json").write_text(json.dumps(environment(), indent=2) + "\n")


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
  saved, config = (dict(_fields(configs.to_dict(c))) for c in (saved, config))
  differing = [name for name in sorted(saved.keys() | config.keys()) if saved.get(name) != config.get(name)
               and not any(name == prefix or name.startswith(prefix + ".") for prefix in RESUMABLE)]
  if differing:
    changes = ", ".join(f"{name} was {saved.get(name)!r}, now {config.get(name)!r}" for name in differing)
    raise ValueError(f"workdir {str(workdir)!r} holds a run of another config ({changes}): "
                     "choose another workdir, or the config it was started with")


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
