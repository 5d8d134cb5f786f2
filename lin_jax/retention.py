"""The checkpoints of a run that are kept, judged by their metrics, and their metrics when a file is damaged."""

import math
import types

import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from lin_jax import damage


def policy(last: int, best: int) -> policies.PreservationPolicy:
  """Keeps the last `last` scheduled checkpoints, the `best` of lowest `eval_loss`, and the last of all."""
  keep = [policies.LatestN(last)]
  if best:
    keep.append(policies.BestN(get_metric_fn=eval_loss, reverse=True, n=best, keep_checkpoints_without_metrics=False))
  return _Scheduled(policies.AnyPreservationPolicy(keep))


def unneeded(policy: policies.PreservationPolicy, metrics: dict[int, dict | None]) -> list[int]:
  """The steps of `metrics` that the policy does not keep."""
  infos = [types.SimpleNamespace(step=step, metrics=found) for step, found in sorted(metrics.items())]
  kept = policy.should_preserve(infos, context=policies.PreservationContext()) if infos else []
  return [info.step for info, keep in zip(infos, kept, strict=True) if not keep]


def eval_loss(metrics: dict | None) -> float:
  """The number by which checkpoints are ranked. It is infinite without a finite loss."""
  loss = (metrics or {}).get("eval_loss", math.inf)
  return loss if math.isfinite(loss) else math.inf


class Manager(ocp.CheckpointManager):
  """Orbax's manager, except that a damaged metrics file counts as missing: it says only which steps are best."""

  def metrics(self, step):
    try:
      metrics = super().metrics(step)
      checksums = damage.read_checksums(self.directory / str(step))
      return metrics if checksums is None or checksums["metrics"] == damage.checksum(metrics) else None
    except (ValueError, KeyError, TypeError, OSError):
      return None


class _Scheduled:
  """A preservation policy that shows only the scheduled checkpoints to another one, and always keeps the last."""

  def __init__(self, policy):
    self._policy = policy

  def should_preserve(self, checkpoints, *, context):
    scheduled = [info for info in checkpoints if (info.metrics or {}).get("scheduled", True)]
    preserved = self._policy.should_preserve(scheduled, context=context)
    steps = {info.step for info, keep in zip(scheduled, preserved, strict=True) if keep} | {checkpoints[-1].step}
    return [info.step in steps for info in checkpoints]
