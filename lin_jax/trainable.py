"""The parameters that train and the frozen ones, which have neither gradients nor an optimizer's state.

A parameter is chosen by its name in checkpoints, such as `runs.0.0.mixer.query.kernel`. The name stands for this
parameter of all layers that the model stacks, so a single one of them cannot be chosen.
"""

import re
from collections.abc import Iterable
from typing import Any

import jax
from flax import nnx

from lin_jax.config import TrainConfig
from lin_jax.layer_stacks import Layers
from lin_jax.layers import with_cast_kernels
from lin_jax.optim import parameter_name


def chosen(patterns: str, names: Iterable[str], field: str) -> set[str]:
  """The names in which one of the `patterns`, which have commas between them, is found.

  Raises ValueError for a pattern that is found in no name. The message has `field` and lists the names.
  """
  names, found = list(names), set()
  for pattern in patterns.split(","):
    matching = {name for name in names if re.search(pattern, name)}
    if not matching:
      raise ValueError(f"config.{field}={patterns!r}: {pattern!r} is found in no name of {', '.join(names)}")
    found |= matching
  return found


def trains_all(config: TrainConfig) -> bool:
  """Whether the run freezes no parameter."""
  return not config.optim.trainable and not config.lora.rank


def trainable_names(config: TrainConfig, params: Any) -> set[str]:
  """The names of the parameters that train: all of them, or the adapters and those that `optim.trainable` chooses.

  Raises ValueError as `chosen` does.
  """
  names = parameter_names(params)
  if trains_all(config):
    return set(names)
  adapters = {name for name in names if ".adapter." in name}
  patterns = config.optim.trainable
  return adapters | chosen(patterns, names, "optim.trainable") if patterns else adapters


def parameter_names(params: Any) -> list[str]:
  """The names of the parameters in a tree of them."""
  return [parameter_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_parameter)]


def partition(params: Any, names: Iterable[str]) -> tuple[Any, Any]:
  """Splits a tree of parameters into the ones with these `names` and the others.

  Both trees have the structure of `params`, with None in the place of each parameter that the other one has.
  """
  names = set(names)

  def part(inside):
    keep = lambda path, param: param if (parameter_name(path) in names) == inside else None
    return jax.tree_util.tree_map_with_path(keep, params, is_leaf=is_parameter)

  return part(True), part(False)


def combined(params: Any, others: Any) -> Any:
  """The inverse of `partition`."""
  either = lambda a, b: b if a is None else a
  return jax.tree.map(either, params, others, is_leaf=lambda leaf: leaf is None or is_parameter(leaf))


def in_used_dtypes(graph: nnx.GraphDef, params: nnx.State) -> nnx.State:
  """`params` of a language model in the dtypes in which its forward pass reads them, so that it computes the same.

  Frozen parameters are kept so, which halves the memory of most of them in bfloat16.
  """
  model = nnx.merge(graph, with_cast_kernels(graph, params))
  # The rows of an embedding that is scaled are rounded after their multiplication.
  names = ["head"] if model.embedding_scale else ["embedding", "head"]
  for name in names:
    if (matrix := getattr(model, name)) is not None:
      setattr(model, name, matrix.replace(matrix[...].astype(model.dtype)))
  return nnx.state(model)


def is_parameter(leaf: Any) -> bool:
  """Whether a node of a tree is a parameter, with its layers stacked or apart."""
  return isinstance(leaf, nnx.Variable | Layers)
