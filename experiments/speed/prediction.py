"""The time of a training step on many GPUs, predicted from its compiled collectives and the speed of one GPU."""

import dataclasses
import itertools

from lin_jax import flops
from lin_jax.config import from_dict
from lin_jax.model import abstract_model

PEAK = 989e12
"""Dense bfloat16 FLOP/s of an H100."""
NVLINK, INFINIBAND = 450e9, 50e9
"""Bytes per second that a GPU sends to the GPUs of its host, and to other hosts."""
RECOMPUTED = {"none": 3, "mixer": 3, "dots": 3, "full": 4}
"""Forward passes to which the work of a step's products is equal, by remat policy."""
MEASURED = {"tnl_7b": "tnl_385m"}
"""Models whose speed on one GPU is taken from another model of the family, because they do not fit on one."""
# A ring passes on all parts of the array but one, an all-reduce does so twice. A permutation sends the whole array.
_ROUNDS = {"all-gather": 1, "reduce-scatter": 1, "all-to-all": 1, "all-reduce": 2}


@dataclasses.dataclass(frozen=True)
class Prediction:
  """FLOPs per GPU and step, and the seconds that they and the links within and between hosts take by themselves."""

  flops: float
  context_flops: float
  compute: float
  inside: float
  between: float

  @property
  def serial(self) -> float:
    """Seconds of a step in which nothing overlaps."""
    return self.compute + self.inside + self.between

  @property
  def overlapped(self) -> float:
    """Seconds of a step in which all overlaps."""
    return max(self.compute, self.inside, self.between)


def fraction_of_peak(name: str, records: list[dict]) -> float:
  """Returns the newest measured fraction of the peak of a model's step on one H200, all layers unrolled, remat dots.

  Raises ValueError without such a record.
  """
  wanted = {"name": MEASURED.get(name, name), "remat": "dots", "unroll": 0, "tiny": False}
  found = [row for row in records if not row["reason"] and row.get("mfu") and "H200" in row["device"]
           and all(row["setting"].get(field) == value for field, value in wanted.items())]
  if not found:
    raise ValueError(f"no record of {wanted['name']} with remat dots and all layers unrolled")
  return max(found, key=lambda row: row["run"])["mfu"]


def predict(row: dict, fraction: float) -> Prediction:
  """Predicts the step of a compiled record, whose products run at `fraction` of the peak."""
  setting = row["setting"]
  config = from_dict({"model": setting["model"]}).model
  tokens = setting["batch_size"] * setting["sequence_length"] / setting["devices"]
  work = flops.forward_flops_per_token(config, setting["sequence_length"])
  extra = _context_flops(config) if "context=" in setting["mesh"] else 0
  passes = RECOMPUTED[setting["remat"]]
  inside, between = (sum(_sent(x) for x in row["collectives"] if x["crosses_hosts"] == crosses) / rate
                     for crosses, rate in ((False, NVLINK), (True, INFINIBAND)))
  return Prediction(tokens * passes * work, tokens * passes * extra,
                    tokens * passes * (work + extra) / (PEAK * fraction), inside, between)


def _sent(collective):
  """Bytes that a device sends, if the devices of the group stand in a ring."""
  size, group = collective["times"] * collective["bytes"], collective["group"]
  return size * (_ROUNDS[collective["kind"]] * (group - 1) / group if collective["kind"] in _ROUNDS else 1)


def _context_flops(config):
  """FLOPs of the forward pass per token that only a split sequence has: the part's update, and the delta rule's map."""
  model, total = abstract_model(config), 0
  stacks = zip(*map(itertools.chain.from_iterable, (model.runs, model.layers)), strict=True)
  for mixer, layers in ((blocks.mixer, layers) for blocks, layers in stacks):
    heads, K, V = mixer.memory_shape
    # The delta rule reads its state before it writes, so its decay is a map, which the op finds on K more columns.
    total += len(layers) * heads * (mixer.flops_per_entry * K * K if mixer.flops_per_entry > 4 else 2 * K * V)
  return total

