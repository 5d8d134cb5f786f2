"""Checkpoints of a run, through Orbax: the only module that knows it.

A step under `workdir/checkpoints` holds four items: `params` and `optimizer` (each a flat dict of arrays by name, the
second with the rest of the training state), `data` (the data iterator's position) and `config`. Saves copy to the host
and are written in the background.
"""

import json
import math
import pathlib

import grain
import jax
import orbax.checkpoint as ocp
from flax import nnx
from orbax.checkpoint import checkpoint_managers as policies

from lin_jax import config as configs
from lin_jax.config import CheckpointConfig, TrainConfig
from lin_jax.workdir import prepare

_POSITIONS = "process_*-of-*.json"


class Checkpoints:
  """Checkpoints of one workdir: keeps the last `keep_last`, and the `keep_best` of lowest `eval_loss`."""

  def __init__(self, workdir: pathlib.Path, config: CheckpointConfig | None = None):
    """Opens `workdir/checkpoints`, for reading only when `config` is None.

    Checkpoints that were not evaluated count among the best only while fewer than `keep_best` were.
    """
    config, read_only = config or CheckpointConfig(), config is None
    keep = [policies.LatestN(config.keep_last)]
    if config.keep_best:
      keep.append(policies.BestN(get_metric_fn=_eval_loss, reverse=True, n=config.keep_best))
    options = ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy(keep), best_fn=_eval_loss, best_mode="min",
        # Orbax warns of its own mode for reading; a manager that never saves needs none.
        create=not read_only)
    handlers = {"params": ocp.StandardCheckpointHandler(), "optimizer": ocp.StandardCheckpointHandler(),
                "data": grain.checkpoint.CheckpointHandler(), "config": ocp.JsonCheckpointHandler()}
    self.path = workdir.absolute() / "checkpoints"
    self._manager = ocp.CheckpointManager(self.path, options=options, item_handlers=handlers)

  def save(self, step: int, params, optimizer, data, config: TrainConfig, eval_loss: float | None = None) -> None:
    """Starts saving `step`, unless it is saved already; only steps with an `eval_loss` can become the best."""
    if step == self.latest():
      return
    items = ocp.args.Composite(
        params=ocp.args.StandardSave(_flat(params)), optimizer=ocp.args.StandardSave(_flat(optimizer)),
        data=grain.checkpoint.CheckpointSave(data), config=ocp.args.JsonSave(configs.to_dict(config)))
    # Orbax warns of a save without metrics; one with empty metrics ranks last.
    metrics = {} if eval_loss is None else {"eval_loss": eval_loss}
    self._manager.save(step, args=items, metrics=metrics, force=True)

  def save_params(self, step: int, params, config: TrainConfig) -> None:
    """Starts saving the parameters of `step` alone; `restore_params` reads them, `restore` does not."""
    items = ocp.args.Composite(params=ocp.args.StandardSave(_flat(params)),
                               config=ocp.args.JsonSave(configs.to_dict(config)))
    self._manager.save(step, args=items, metrics={}, force=True)

  def restore(self, step: int, params, optimizer, data):
    """(params, optimizer) placed like the abstract arrays given, and `data` moved to where it was at `step`.

    Raises ValueError naming the first array whose name or shape differs.
    """
    targets = {"params": _flat(params), "optimizer": _flat(optimizer)}
    for item, target in targets.items():
      self._check(step, item, target)
    args = {item: ocp.args.StandardRestore(target) for item, target in targets.items()}
    restored = self._manager.restore(step, args=ocp.args.Composite(**args))
    _set_position(data, self.path / str(step) / "data")
    return _unflat(params, restored["params"]), _unflat(optimizer, restored["optimizer"])

  def restore_params(self, step: int, params):
    """The parameters alone, placed like the abstract arrays given. Raises ValueError as `restore` does."""
    target = _flat(params)
    self._check(step, "params", target)
    restored = self._manager.restore(step, args=ocp.args.Composite(params=ocp.args.StandardRestore(target)))
    return _unflat(params, restored["params"])

  def latest(self) -> int | None:
    """The last saved step, or None."""
    return self._manager.latest_step()

  def best(self) -> int | None:
    """The saved step of lowest `eval_loss`, or None when no saved step was evaluated."""
    step = self._manager.best_step()
    return None if step is None or not self._manager.metrics(step) else step

  def processes(self, step: int) -> int | None:
    """How many processes have saved `step`, or None when it does not say."""
    names = (path.name for path in (self.path / str(step) / "data").glob(_POSITIONS))
    return next((int(name.removesuffix(".json").split("-of-")[1]) for name in names), None)

  def steps(self) -> list[int]:
    return sorted(self._manager.all_steps())

  def close(self) -> None:
    """Waits for saves under way."""
    self._manager.close()

  def _check(self, step, item, target):
    saved = self._manager.item_metadata(step)[item]
    for name in sorted(saved.keys() | target.keys()):
      here, there = (tuple(tree[name].shape) if name in tree else None for tree in (target, saved))
      if here != there:
        raise ValueError(f"{self.path}/{step} is a checkpoint of another model: {item} {name} has shape "
                         f"{there or 'none (missing)'} there, {here or 'none (missing)'} in this config")


def load_model(workdir: pathlib.Path | str, step: int | str | None = None):
  """(config, model) of a run, the parameters on the first device.

  Args:
    step: a saved step, "best" (lowest held-out loss), or None for the last.
  Raises:
    ValueError: the workdir holds no run, no such step, or a checkpoint of another model.
  """
  from lin_jax.model import LanguageModel

  workdir = pathlib.Path(workdir)
  config = configs.load(workdir / "config.json")
  if not (workdir / "checkpoints").is_dir():
    raise ValueError(f"{workdir}: no checkpoints; was this run stopped before its first save?")
  checkpoints = Checkpoints(workdir)
  known = checkpoints.steps()
  chosen = {None: checkpoints.latest(), "best": checkpoints.best()}.get(step, step)
  if chosen not in known:
    raise ValueError(f"{workdir}: no checkpoint of step {'last' if step is None else step}; saved: {known}")
  graph, abstract = nnx.split(nnx.eval_shape(lambda: LanguageModel(config.model, rngs=nnx.Rngs(0))), nnx.Param)
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), abstract)
  params = checkpoints.restore_params(chosen, abstract)
  checkpoints.close()
  return config, nnx.merge(graph, params)


def save_model(workdir: pathlib.Path | str, config: TrainConfig, model) -> None:
  """Makes `workdir` a run that `load_model` reads: the config, and the parameters as step 0.

  There is no optimizer state to resume from. Raises ValueError when `workdir` holds a run or cannot be written.
  """
  workdir = pathlib.Path(workdir)
  if (workdir / "config.json").exists() or any(workdir.glob("checkpoints/*")):
    raise ValueError(f"workdir {str(workdir)!r} holds a run already: choose another")
  prepare(workdir, config)
  checkpoints = Checkpoints(workdir, config.checkpoint)
  checkpoints.save_params(0, nnx.state(model, nnx.Param), config)
  checkpoints.close()


def _eval_loss(metrics):
  return metrics.get("eval_loss", math.inf)


def _set_position(data, folder):
  """Moves the iterator `data`. A position counts global batches, whatever the number of processes (`lin_jax.data`), so
  that the file of any process will do; Grain's own handler wants one of as many processes as there are now."""
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
