"""The parameters with which a run starts if `config.init_from` names a run or a released checkpoint.

The optimizer, the step and the order of the data start anew. The config of the run says from where the parameters came,
so a resumed run neither reads them again nor takes others.
"""

import pathlib

import jax
from flax import nnx
from jax.sharding import Mesh

from lin_jax.checkpoint import load_model
from lin_jax.config import ModelConfig, TrainConfig, to_dict
from lin_jax.layer_stacks import Layers, together
from lin_jax.model import LanguageModel
from lin_jax.train_state import TrainState
from lin_jax.trainable import is_parameter, parameter_name

_SHOWN = 5  # parameters of other shapes that a message names
# Fields of a model's config that do not change what it computes from given parameters, but for rounding.
_FREE = ("dtype", "implementation", "chunk_size", "start")


class Initial:
  """The parameters of `config.init_from`, read onto the run's mesh on the first use of `require_fit`.

  Attributes:
    note: says which fields of the model's config differ from the source's.
  """

  def __init__(self, config: TrainConfig, abstract: TrainState, mesh: Mesh):
    self._path, self._config, self._mesh = pathlib.Path(config.init_from), config, mesh
    wanted = _named(jax.eval_shape(together, abstract.parameters()))
    self._wanted = {name: leaf.shape for name, leaf in wanted.items() if ".adapter." not in name}
    self._arrays, self.note = None, ""

  def require_fit(self) -> None:
    """Reads the parameters. Raises ValueError if the source cannot be read, or names the parameters that differ."""
    if self._arrays is not None:
      return
    where = f"config.init_from={str(self._path)!r}"
    try:
      source, model = _read(self._path, self._mesh)
    except ValueError as e:
      raise ValueError(f"{where}: {e}") from e
    self._arrays = _named(nnx.state(model, nnx.Param))
    found = {name: array.shape for name, array in self._arrays.items()}
    differing = [f"{name} has shape {found.get(name) or 'none (missing)'} there, "
                 f"{self._wanted.get(name) or 'none (missing)'} in this config"
                 for name in sorted(found.keys() | self._wanted) if found.get(name) != self._wanted.get(name)]
    if differing:
      more = len(differing) - _SHOWN
      raise ValueError(f"{where}: {'; '.join(differing[:_SHOWN])}{f'; and {more} more' if more > 0 else ''}")
    self.note = f"parameters from {self._path}{_other_fields(source, self._config)}"

  def fill(self, state: TrainState) -> TrainState:
    """`state` with these parameters in the places, the layout and the dtypes of its own. Adapters stay as they are.

    Each parameter is given up once it has been placed, so this can be done only once.
    """
    self.require_fit()

    def place(path, leaf):
      array = self._arrays.pop(parameter_name(path), None)
      if array is None:
        return leaf
      if not isinstance(leaf, Layers):
        return leaf.replace(jax.device_put(array, leaf[...].sharding).astype(leaf.dtype))
      separate = lambda array: [array[i].astype(layer.dtype) for i, layer in enumerate(leaf)]
      layers = jax.jit(separate, out_shardings=[layer[...].sharding for layer in leaf])(array)
      return Layers(layer.replace(array) for layer, array in zip(leaf, layers, strict=True))

    state.params, state.frozen = (jax.tree_util.tree_map_with_path(place, tree, is_leaf=is_parameter)
                                  for tree in (state.params, state.frozen))
    return state


def _read(path: pathlib.Path, mesh: Mesh) -> tuple[ModelConfig, LanguageModel]:
  if (path / "checkpoints").is_dir():
    config, model = load_model(path, mesh=mesh)
    return config.model, model
  from lin_jax import hf  # here, because training does without safetensors otherwise

  return hf.load(path, mesh)


def _named(params) -> dict:
  leaves = jax.tree_util.tree_leaves_with_path(params)
  return {parameter_name(path): leaf for path, leaf in leaves}


def _other_fields(source, config) -> str:
  here, there = (_fields(to_dict(TrainConfig(model=model))["model"]) for model in (config.model, source))
  changes = [f"{name} was {there.get(name)!r} there and is {here.get(name)!r}"
             for name in sorted(here.keys() | there) if here.get(name) != there.get(name)]
  return f"; config.model differs: {', '.join(changes)}" if changes else ""


def _fields(values, prefix=""):
  found = {}
  for name, value in values.items():
    if isinstance(value, dict):
      found |= _fields(value, f"{prefix}{name}.")
    elif name not in _FREE:
      found[prefix + name] = value
  return found
