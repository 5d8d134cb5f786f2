"""Checkpoints of a run, through Orbax, which only this module and `lin_jax.retention` know.

A step under `workdir/checkpoints` holds five items: `params` and `optimizer` (each a flat dict of arrays by name, the
second with the rest of the training state), `data` (the data iterator's position), `config`, and `checksums`. The last
holds the CRC32 of every array and of the iterator's position, which every load verifies. Checkpoints from before there
were checksums load unverified. Saves copy to the host and are written in the background. The checksums are computed
before that, in about 1 s per GB and core.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import pathlib
from collections.abc import Callable
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp
from flax import nnx
from jax.experimental import multihost_utils

from lin_jax import damage, retention
from lin_jax.config import CheckpointConfig, LoraConfig, TrainConfig, to_dict
from lin_jax.config import load as load_config
from lin_jax.workdir import prepare

_POSITIONS = "process_*-of-*.json"


class Checkpoints:
  """Checkpoints of one workdir. It keeps the last `keep_last`, and the `keep_best` with the lowest `eval_loss`."""

  def __init__(self, workdir: pathlib.Path, config: CheckpointConfig | None = None):
    """Opens `workdir/checkpoints`, for reading only when `config` is None.

    Checkpoints that were not evaluated count among the best only while fewer than `keep_best` were evaluated. An
    unscheduled one counts among neither and goes when a later one is there, so that the same checkpoints are kept as in
    an unbroken run.
    """
    config, read_only = config or CheckpointConfig(), config is None
    self._policy = retention.policy(config.keep_last, config.keep_best)
    options = ocp.CheckpointManagerOptions(
        preservation_policy=self._policy, best_fn=retention.eval_loss, best_mode="min",
        # Orbax warns about its own mode for reading, which a manager that never saves does not need.
        create=not read_only)
    handlers = {"params": ocp.StandardCheckpointHandler(), "optimizer": ocp.StandardCheckpointHandler(),
                "data": grain.checkpoint.CheckpointHandler(), "config": ocp.JsonCheckpointHandler(),
                "checksums": ocp.JsonCheckpointHandler(filename=damage.CHECKSUMS_FILE)}
    self.path = workdir.absolute() / "checkpoints"
    with damage.silenced():
      self._manager = retention.Manager(self.path, options=options, item_handlers=handlers)

  def save(self, step: int, params, optimizer, data, config: TrainConfig, eval_loss: float | None = None,
           scheduled: bool = True) -> None:
    """Starts saving `step`, unless it is saved already.

    Only `scheduled` steps with a finite `eval_loss` can become the best. A step that is saved because the run is being
    stopped is not scheduled.
    """
    if step == self.latest():
      return
    # Orbax warns about a save without metrics. One with empty metrics ranks last.
    evaluated = scheduled and eval_loss is not None and math.isfinite(eval_loss)
    metrics = {"eval_loss": eval_loss} if evaluated else {} if scheduled else {"scheduled": False}
    self._save(step, {"params": params, "optimizer": optimizer}, config, metrics, data)

  def save_params(self, step: int, params, config: TrainConfig) -> None:
    """Starts saving the parameters of `step` alone, which `restore_params` reads and `restore` does not."""
    self._save(step, {"params": params}, config, {})

  def _save(self, step, trees, config, metrics, data=None):
    trees = {item: _flat(tree) for item, tree in trees.items()}
    items = {item: ocp.args.StandardSave(tree) for item, tree in trees.items()}
    checksums = {"step": step, "metrics": damage.checksum(metrics)}
    checksums |= {item: damage.checksums(tree) for item, tree in trees.items()}
    if data is not None:
      items["data"], checksums["data"] = grain.checkpoint.CheckpointSave(data), damage.checksum(data.get_state())
    items = ocp.args.Composite(**items, config=ocp.args.JsonSave(to_dict(config)),
                               checksums=ocp.args.JsonSave(checksums))
    self._manager.save(step, args=items, metrics=metrics, force=True)

  def restore(self, step: int, params, optimizer, data):
    """Returns (params, optimizer), placed like the abstract arrays given, and moves `data` to its position at `step`.

    Raises ValueError that names the first array whose name or shape differs, or DamagedCheckpoint.
    """
    restored = self._restore(step, {"params": _flat(params), "optimizer": _flat(optimizer)}, data)
    return _unflat(params, restored["params"]), _unflat(optimizer, restored["optimizer"])

  def restore_params(self, step: int, params):
    """The parameters alone, placed like the abstract arrays given. Raises ValueError as `restore` does."""
    return _unflat(params, self._restore(step, {"params": _flat(params)})["params"])

  def _restore(self, step, targets, data=None):
    self._manager.wait_until_finished()  # a save under way is not damage
    folder = self.path / str(step)
    with damage.reading(folder):
      checksums = damage.read_checksums(folder)
    if checksums and checksums.get("step") != step:
      raise damage.DamagedCheckpoint(f"checkpoint {folder} holds step {checksums.get('step')}: was its folder renamed?")
    restored = {}
    for item, target in targets.items():
      saved = checksums and checksums.get(item)
      with damage.reading(folder):
        stored = _stored(folder / item, saved)
      _require_same_model(folder, item, {name: array.shape for name, array in stored.items()}, target)
      with damage.reading(folder):
        restored[item] = damage.arrays(folder / item, stored, target, saved)
    if data is not None:
      with damage.reading(folder):
        _set_position(data, folder / "data")
      if checksums and damage.checksum(data.get_state()) != checksums.get("data"):
        raise damage.DamagedCheckpoint(f"checkpoint {folder} is damaged: it holds another position in the data")
    return restored

  def load(self, which: int | str | None, load: Callable[[int], Any]) -> tuple[int, Any]:
    """Returns (step, `load(step)`) for the checkpoint `which`.

    Args:
      which: a saved step, "best", "previous" (the newest that loads before the last one), or None for the last.
      load: calls `restore` or `restore_params`.
    Raises:
      ValueError: there is no such step.
      DamagedCheckpoint: the checkpoint does not load. The message names the newest one that does.
    """
    steps = self.steps()
    named = {None: steps[-1:], "best": [self.best()], "previous": steps[-2::-1]}
    chosen = named.get(which, [which])
    if not chosen or chosen[0] not in steps:
      raise ValueError(f"{self.path.parent}: no checkpoint of step {'last' if which is None else which}; "
                       f"saved: {steps}")
    failure = None
    for step in [*chosen, *(step for step in reversed(steps) if step not in chosen)]:
      try:
        loaded = load(step)
      except damage.DamagedCheckpoint as e:
        failure = failure or e
        continue
      if step in chosen:
        return step, loaded
      raise damage.DamagedCheckpoint(f"{failure}. The newest checkpoint that loads is {self.path}/{step}: "
                              f"--checkpoint={step} goes on from it") from failure
    raise damage.DamagedCheckpoint(f"{failure}. No other checkpoint of this run loads") from failure

  def resume_from(self, step: int) -> list[pathlib.Path]:
    """Leaves only the checkpoints that a run which goes on from `step` has, and returns where the moved ones are now.

    Checkpoints that are not to be kept are deleted, because a kill may have prevented it. Later ones, and the remains
    of a deletion that a kill interrupted, move to `workdir/set_aside`.
    """
    left = [s for s in self.steps() if s > step or s < step and not (self.path / f"{s}/metrics/metrics").exists()]
    moved = [self._set_aside(s) for s in left]
    multihost_utils.sync_global_devices("checkpoints set aside")
    self._manager.reload()
    for unneeded in retention.unneeded(self._policy, {s: self._manager.metrics(s) for s in self.steps()}):
      self._manager.delete(unneeded)
    return moved

  def _set_aside(self, step):
    folder = self.path.parent / "set_aside"
    target = next(path for n in itertools.count() if not (path := folder / f"{step}{f'.{n}' if n else ''}").exists())
    if jax.process_index() == 0:
      folder.mkdir(exist_ok=True)
      (self.path / str(step)).rename(target)
    return target

  def latest(self) -> int | None:
    """The last saved step, or None."""
    return self._manager.latest_step()

  def best(self) -> int | None:
    """The saved step of lowest `eval_loss`, or None if no saved step was evaluated."""
    step = self._manager.best_step()
    return None if step is None or retention.eval_loss(self._manager.metrics(step)) == math.inf else step

  def processes(self, step: int) -> int | None:
    """The number of processes that saved `step`, or None if the checkpoint does not say."""
    self._manager.wait_until_finished()
    names = (path.name for path in (self.path / str(step) / "data").glob(_POSITIONS))
    return next((int(name.removesuffix(".json").split("-of-")[1]) for name in names), None)

  def steps(self) -> list[int]:
    return sorted(self._manager.all_steps())

  def close(self) -> None:
    """Waits for saves under way."""
    self._manager.close()


def load_model(workdir: pathlib.Path | str, step: int | str | None = None, mesh: jax.sharding.Mesh | None = None):
  """Returns (config, model) of a run, with the parameters on the mesh, or on the first device, and adapters merged.

  Args:
    step: a saved step, "best" (lowest held-out loss), "previous" (the newest that loads before the last), or None for
      the last.
    mesh: the devices over which every parameter is placed as in training. Four whole parameters are in the host's
      memory at a time, because their checksums are verified.
  Raises:
    ValueError: the workdir holds no run or no such step, or the checkpoint is of another model.
    DamagedCheckpoint: the checkpoint cannot be read, or its parameters are not the ones that were saved.
  """
  from lin_jax.lora import add_adapters, merge_adapters
  from lin_jax.model import LanguageModel
  from lin_jax.sharding import placements

  workdir = pathlib.Path(workdir)
  config = load_config(workdir / "config.json")
  if not (workdir / "checkpoints").is_dir():
    raise ValueError(f"{workdir}: no checkpoints; was this run stopped before its first save?")
  build = lambda rngs: add_adapters(LanguageModel(config.model, rngs=rngs), config.lora, rngs=rngs)
  graph, abstract = nnx.split(jax.eval_shape(lambda: build(nnx.Rngs(0))), nnx.Param)
  shardings = placements(abstract, mesh)
  abstract = jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), abstract, shardings)
  with contextlib.closing(Checkpoints(workdir)) as checkpoints:
    _, params = checkpoints.load(step, lambda step: checkpoints.restore_params(step, abstract))
  return dataclasses.replace(config, lora=LoraConfig()), merge_adapters(nnx.merge(graph, params))


def save_model(workdir: pathlib.Path | str, config: TrainConfig, model) -> None:
  """Makes `workdir` a run that `load_model` reads: the config, and the parameters as step 0.

  There is no optimizer state to resume from. Raises ValueError if `workdir` holds a run or cannot be written.
  """
  workdir = pathlib.Path(workdir)
  if (workdir / "config.json").exists() or any(workdir.glob("checkpoints/*")):
    raise ValueError(f"workdir {str(workdir)!r} holds a run already: choose another")
  prepare(workdir, config)
  with contextlib.closing(Checkpoints(workdir, config.checkpoint)) as checkpoints:
    checkpoints.save_params(0, nnx.state(model, nnx.Param), config)


def _stored(item, checksums):
  """The arrays of an item by name. The names come from the checksums, or from the item itself if it has none."""
  json.loads((item / "_METADATA").read_text())  # without this file Orbax could not read the item
  names = ocp.StandardCheckpointHandler().metadata(item).tree if checksums is None else checksums
  return damage.stored(item, names)


def _require_same_model(folder, item, saved, target):
  for name in sorted(saved.keys() | target.keys()):
    here, there = tuple(target[name].shape) if name in target else None, saved.get(name)
    if here != there:
      raise ValueError(f"{folder} is a checkpoint of another model: {item} {name} has shape "
                       f"{there or 'none (missing)'} there, {here or 'none (missing)'} in this config")


def _set_position(data, folder):
  """Moves the iterator `data`. A position counts global batches, whatever the number of processes (`lin_jax.data`), so
  the file of any process will do. Orbax's handler from Grain demands one file for each process that runs now."""
  saved = sorted(folder.glob(_POSITIONS))
  if not saved:
    raise ValueError(f"{folder}: holds no position in the data")
  data.set_state(json.loads(saved[0].read_text()))
  data.start_prefetch()


def _flat(tree):
  return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _unflat(like, flat):
  return jax.tree.unflatten(jax.tree.structure(like), list(map(flat.get, _flat(like))))


def _name(path):
  return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
