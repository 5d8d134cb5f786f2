"""The training run, top to bottom: checks, mesh, data, sharded state, steps, evaluation, checkpoints, summary."""

import contextlib
import functools
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from kernels import containment, dispatch
from lin_jax import files, optim, sharding
from lin_jax import metrics as reporting
from lin_jax import workdir as workdirs
from lin_jax.checkpoint import Checkpoints
from lin_jax.config import DataConfig, TrainConfig, validate
from lin_jax.data import TokenDataset, eval_batches, staggered_starts, train_iterator
from lin_jax.initial import Initial
from lin_jax.layer_stacks import together
from lin_jax.layers import with_cast_kernels
from lin_jax.loss import next_token_loss
from lin_jax.manifests import describe
from lin_jax.model import keep_rows
from lin_jax.preemption import stop_signals
from lin_jax.train_state import TrainState, empty_carried, make_state, placement, restore, saved_form
from lin_jax.trainable import combined

# XLA joins the products of one input with small weights, such as queries and keys, and then copies the two apart.
_COMPILER_OPTIONS = {"cuda": {"xla_gpu_dot_merger_threshold_mb": 0}}


def train(config: TrainConfig, workdir: pathlib.Path | str, checkpoint: int | str | None = None) -> dict:
  """Trains `config` in `workdir` from scratch, or from its last checkpoint to the exact end of an unbroken run.

  `checkpoint` is a step, "previous" or "best" as in `checkpoint.load_model`. The run then goes on from that checkpoint,
  and later ones are moved to `workdir/set_aside`. If `config.optim.steps` exceeds the steps of the run, it is
  lengthened as `optim.lengthened` says.

  SIGTERM and Ctrl-C end the run after the step under way, with the evaluation that is due there and a checkpoint. The
  config may differ from the interrupted run's in the fields of `workdir.RESUMABLE` only.

  Returns:
    The last value of each metric, `step`, `preempted` (the name of the signal that ended the run, or ""), and
    `checkpoint` (the folder of the last checkpoint).
  Raises:
    ValueError, or NotImplementedError from an op's named implementation: the config, the data or the workdir breaks a
      rule. It is raised before anything is written, except for a shard that differs from the manifest, which is found
      when the shard is first read.
    FloatingPointError: the loss or a gradient is not finite and config.optim.nonfinite is "stop".
  """
  workdir = pathlib.Path(workdir)
  config, note = workdirs.continued(workdir, validate(config))
  sharding.validate_mesh(config, jax.device_count())
  mesh = sharding.make_mesh(config.mesh)
  graph, optimizer, abstract, create = make_state(config, mesh)
  read = dict(zip(("process_index", "process_count"), sharding.batch_part(mesh)), vocab_size=config.model.vocab_size)
  batches = train_iterator(config.data, config.seed, **read)
  held_out = eval_batches(config.data, "val", config.eval.batches, **read)
  bytes_per_token = {split: TokenDataset(config.data.path, split).bytes_per_token for split in ("train", "val")}
  with jax.set_mesh(mesh):
    # Ops refuse inputs that they cannot run only when they are traced.
    jax.eval_shape(functools.partial(loss_sum, graph), abstract.parameters(), held_out[0])
  _require_targets(config)
  initial = Initial(config, abstract, mesh) if config.init_from else None
  if initial and not any(workdir.glob("checkpoints/*")):
    initial.require_fit()

  with contextlib.ExitStack() as stack:
    stack.enter_context(files.naming(workdir))
    stack.enter_context(workdirs.locked(workdir))
    workdirs.prepare(workdir, config, describe(config.data.path))
    stack.enter_context(jax.set_mesh(mesh))
    terminated = stack.enter_context(stop_signals())
    checkpoints = stack.enter_context(contextlib.closing(Checkpoints(workdir, config.checkpoint)))
    start, state = 0, None
    if checkpoint is not None or checkpoints.latest():
      start, state = checkpoints.load(checkpoint, lambda step: restore(checkpoints, step, abstract, batches, config))
      if (moved := checkpoints.resume_from(start)) and jax.process_index() == 0:
        print(f"set aside: {', '.join(map(str, moved))}", flush=True)
    if state is None:
      state = initial.fill(create()) if initial else create()
      note = initial.note if initial else note
    report = stack.enter_context(contextlib.closing(reporting.Reporter(config, workdir, start, bytes_per_token["val"])))
    profile = stack.enter_context(contextlib.closing(reporting.Profile(workdir, config.log.profile_steps)))
    place = functools.partial(jax.make_array_from_process_local_data, sharding.batch_sharding(mesh))
    train_step = make_train_step(config, graph, optimizer, abstract)
    eval_step = make_eval_step(config, graph)
    as_saved = saved_form(abstract)

    def evaluate():
      begin = time.perf_counter()
      sums = [eval_step(state.parameters(), jax.tree.map(place, batch)) for batch in held_out]
      loss, targets = (sum(map(float, x)) for x in zip(*jax.device_get(sums)))
      return report.evaluation(step, loss / targets, time.perf_counter() - begin, int(targets))

    def finish(step, metrics):
      metrics = jax.device_get(metrics)
      if not metrics.pop("finite") and config.optim.nonfinite == "stop":
        raise FloatingPointError(
            f"step {step}: loss {metrics['loss']}, gradient norm {metrics['grad_norm']}; the step was not applied. "
            f"Last checkpoint: {checkpoints.latest() or 'none'}. With --config.optim.nonfinite=skip the same command "
            "goes on from there and leaves such steps out")
      report.step(step, metrics)

    report.start(*(sum(x.size for x in jax.tree.leaves(tree)) for tree in (abstract.params, abstract.frozen)), note)
    step, under_way, preempted = start, None, ""
    if start == 0 and config.eval.every:
      evaluate()
    while step < config.optim.steps and not preempted:
      step += 1
      profile.before(step)
      batch = jax.tree.map(place, next(batches))
      with jax.transfer_guard("disallow"), jax.profiler.StepTraceAnnotation("train", step_num=step):
        state, metrics = train_step(state, batch)
      report.throughput.begin(metrics)
      # Reading a step's metrics only after the next is dispatched keeps the device busy.
      if under_way:
        finish(*under_way)
      under_way = step, metrics
      last = step == config.optim.steps
      preempted = "" if last else terminated(step)
      evaluation_due = last or _due(step, config.eval.every)
      save_due = last or _due(step, config.checkpoint.every)
      if evaluation_due or save_due or preempted or step == profile.stop:
        finish(*under_way)
        under_way = None
      with report.throughput.paused():
        profile.after(step)
        eval_loss = evaluate() if evaluation_due else None
        if save_due or preempted:
          with report.saving():
            checkpoints.save(step, *as_saved(state), batches, config, eval_loss, scheduled=save_due)

  if jax.process_index() == 0:
    reporting.plot_loss(workdir, config.name or workdir.name, bytes_per_token["train"])
  return reporting.summary(workdir) | {"step": step, "preempted": preempted,
                                       "checkpoint": str(workdir / "checkpoints" / str(step))}


def make_train_step(config: TrainConfig, graph: nnx.GraphDef,
                    optimizer: Callable[[optim.ScheduleNumbers], optax.GradientTransformation], abstract: TrainState,
                    ) -> Callable[[TrainState, dict], tuple[TrainState, dict]]:
  """The jitted optimizer step (state, batch) -> (state, metrics), which reuses the buffers of the given state.

  The kernels of products are cast to the compute dtype once, parameters and summed gradients are float32. The loss is
  the mean over the batch's targets, whatever the number of microbatches. If it or a gradient is not
  finite, parameters and optimizer state stay as they are and `metrics["finite"]` is False.

  With `config.data.carried_windows` = n, each window starts from its row's previous state, without gradient, which
  truncates backpropagation through time to a window. The state resets after the n windows of a row's run, at a document
  start, and after a step that was not finite.
  """
  shardings = placement(abstract)

  @functools.partial(jax.value_and_grad, has_aux=True)
  def gradients(params, frozen, batch, carried):
    return loss_sum(graph, combined(params, frozen), batch, carried)

  def value_and_gradients(params, batch, carried):
    (total, (counts, carried)), grads = gradients(*params, batch, carried)
    return (total, counts, grads), carried

  def accumulate(params, batch, carried):
    if config.optim.accumulation == 1:
      return value_and_gradients(params, batch, carried)

    def add(totals, microbatch):
      values, carried = value_and_gradients(params, *microbatch)
      return jax.tree.map(lambda total, x: total + x.astype(total.dtype), totals, values), carried

    count = config.optim.accumulation
    microbatches = sharding.microbatches(batch, count), sharding.microbatches(carried, count, axis=1)
    shapes, _ = jax.eval_shape(value_and_gradients, params, *jax.tree.map(lambda x: x[0], microbatches))
    total, counts, grads = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)
    zeros = total, counts, jax.lax.with_sharding_constraint(grads, shardings.params)
    values, carried = jax.lax.scan(add, zeros, microbatches)
    return values, sharding.join_microbatches(carried, axis=1)

  def next_carried(state, batch, carried, finite):
    if carried is None:
      return None
    goes_on = rows_that_go_on(config.data, batch, state.step) & finite
    empty = empty_carried(nnx.merge(graph, together(state.parameters())), config.data)
    return keep_rows(goes_on, carried, empty)

  def train_step(state, batch):
    params = _cast(graph, state), state.frozen
    (total, counts, grads), carried = accumulate(params, batch, state.carried)
    targets = jnp.maximum(counts["targets"], 1.0)
    grads = jax.tree.map(lambda g: g.astype(jnp.float32) / targets, grads)
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(total) & jnp.isfinite(grad_norm)
    updates, opt_state = optimizer(state.schedule).update(grads, state.opt_state, state.params)
    updated = optax.apply_updates(state.params, updates), opt_state
    params, opt_state = jax.tree.map(functools.partial(jnp.where, finite), updated, (state.params, state.opt_state))
    skipped = state.skipped + jnp.where(finite, 0, 1)
    metrics = {"loss": total / targets, "accuracy": counts["correct"] / targets, "targets": counts["targets"],
               "grad_norm": grad_norm, "skipped": skipped, "finite": finite,
               "learning_rate": optim.learning_rate(config.optim, state.schedule)(state.step - state.skipped)}
    carried = next_carried(state, batch, carried, finite)
    return TrainState(params, opt_state, state.step + 1, skipped, carried, state.frozen, state.schedule), metrics

  return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None),
                 compiler_options=_COMPILER_OPTIONS.get(dispatch.platform()))


def rows_that_go_on(data: DataConfig, batch: dict, step: int | jax.Array) -> jax.Array:
  """Whether each row of the batch of `step`, counted from 0, has the next window of its run in the next batch, and that
  window goes on in the same document."""
  processes = jax.process_count()
  starts = np.tile(staggered_starts(data, data.batch_size // processes), processes)
  # The mask hides a window's last target if that target begins another document.
  return (batch["mask"][:, -1] > 0) & ((step + 1 + starts) % data.carried_windows > 0)


def make_eval_step(config: TrainConfig, graph: nnx.GraphDef) -> Callable[[Any, dict], tuple[jax.Array, jax.Array]]:
  """The jitted (params, batch) -> (sum of losses, number of targets), computed in the microbatches of training."""

  @jax.jit
  def eval_step(params, batch):
    def one(microbatch):
      total, (counts, _) = loss_sum(graph, params, microbatch)
      return total, counts["targets"]

    losses, targets = jax.lax.map(one, sharding.microbatches(batch, config.optim.accumulation))
    return losses.sum(), targets.sum()

  return eval_step


def loss_sum(graph: nnx.GraphDef, params: nnx.State, batch: dict, state: Any = None) -> tuple[jax.Array, tuple]:
  """Returns a batch's summed next-token loss in nats, with the counts `targets` and `correct`, and the model's state
  after the batch if a state before it is given."""
  model = nnx.merge(graph, together(params))
  with containment.left_out():  # a value that is not finite spoils the sum from whichever document it comes
    hidden, state = model.hidden(batch["tokens"], state, batch["segment_ids"])
  total, counts = next_token_loss(hidden, model.unembedding(), batch["targets"], batch["mask"])
  return total, ({name: counts[name] for name in ("targets", "correct")}, state)


def _cast(graph, state):
  """`with_cast_kernels` of the parameters that train, which may be `apart`."""
  dtypes = jax.eval_shape(lambda: with_cast_kernels(graph, together(state.parameters())))
  cast = lambda like, layers: jax.tree.map(lambda x: x.astype(like.dtype), layers)
  return jax.tree.map(cast, dtypes, state.params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def _require_targets(config):
  # Every process looks at the rows of all, so that they agree.
  held_out = eval_batches(config.data, "val", config.eval.batches, process_index=0, process_count=1)
  if not any(batch["mask"].any() for batch in held_out):
    raise ValueError(f"config.eval.batches={config.eval.batches}: no target of these held-out batches counts")


def _due(step, every):
  return every > 0 and step % every == 0
