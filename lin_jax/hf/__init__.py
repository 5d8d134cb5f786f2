"""Released checkpoints in Hugging Face's format, read and written: `config.json` and safetensors.

The library reads and writes the kinds of `lin_jax.hf.families.FAMILIES`. A checkpoint is taken whole or refused: every
tensor of the model must be there in its shape, and nothing else but what its family says is no part of the model. The
model computes the same as the library's that the checkpoint is from, up to rounding.
"""

import math
import pathlib
from collections.abc import Iterator

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from safetensors.numpy import save_file

from lin_jax.config import ModelConfig
from lin_jax.files import Unwritable, naming, write_json
from lin_jax.hf import families
from lin_jax.hf.families import FAMILIES as FAMILIES
from lin_jax.hf.files import CONFIG, INDEX, WEIGHTS, Tensors, read_json
from lin_jax.hf.fla import bounds
from lin_jax.hf.layout import Plan, layers, plan, to_stored
from lin_jax.hf.placement import Placement
from lin_jax.model import LanguageModel, abstract_model
from lin_jax.sharding import placements

FILE_BYTES = 5 * 10**9  # of one file of a checkpoint that is written


def load_config(path: pathlib.Path | str) -> ModelConfig:
  """The model of the checkpoint directory `path`. Raises ValueError if it is missing, foreign or of another family."""
  return _described(pathlib.Path(path))[2]


def load(path: pathlib.Path | str, mesh: Mesh | None = None) -> tuple[ModelConfig, LanguageModel]:
  """The model of the checkpoint directory `path`, with its parameters in float32 on the mesh, or on the first device.

  Parameters go to their devices shard by shard, so that the host holds about one tensor at a time.

  Raises:
    ValueError: the directory holds no such checkpoint, it holds one with options that no mixer here has, or its tensors
      are not exactly the model's. The message names the options or tensors.
  """
  path = pathlib.Path(path)
  values, kind, config, graph, abstract = _described(path)
  shapes = {name: leaf.shape for name, leaf in _leaves(abstract)}
  layout = FAMILIES[kind].layout(config, values)
  bounded = _bounded(config, shapes)
  with Tensors(path) as stored:
    where = plan(layout, config, shapes, stored.shapes())
    expected = where.shapes | ({layout.bounds: (config.depth, config.width)} if bounded else {})
    stored.require(expected, layout)
    known = {}
    if bounded:
      logits = bounds.merge(stored.whole(layout.bounds).astype(np.float32), list(bounded))
      known = dict(zip(bounded.values(), logits, strict=True))
    place = Placement(stored, where, shapes, known).place
    params = jax.tree_util.tree_map_with_path(lambda path, at: place(_name(path), at), placements(abstract, mesh))
  return config, nnx.merge(graph, params)


def save(path: pathlib.Path | str, config: ModelConfig, model: LanguageModel, kind: str = "") -> None:
  """Writes `model`, whose config is `config`, as a checkpoint directory of the family `kind` with float32 tensors.

  Without a `kind` it is of the first family that has such a model. Checkpoints beyond `FILE_BYTES` become several files
  with an index.

  Raises ValueError if the family has no such model, if the model has parameters that its config does not give it, such
  as adapters that are not merged, or if `path` holds a checkpoint or cannot be written.
  """
  path = pathlib.Path(path)
  kind, values = families.writing(config, kind)
  if (path / CONFIG).exists():
    raise ValueError(f"{path} holds a checkpoint already: choose another directory")
  arrays = {name: np.asarray(leaf) for name, leaf in _leaves(nnx.state(model, nnx.Param))}
  shapes = {name: array.shape for name, array in arrays.items()}
  layout = FAMILIES[kind].layout(config, values)
  where = plan(layout, config, shapes)
  bounded = _bounded(config, shapes)
  placed = {piece.parameter for piece in where.pieces} | {part for part, _ in bounded.values()}
  if left := sorted(shapes.keys() - placed):
    raise ValueError(f"a {kind} checkpoint has no tensors for {', '.join(left)}")
  extra = {}
  if bounded:
    logits = np.stack([arrays[part][repetition] for part, repetition in bounded.values()])
    extra = {layout.bounds: bounds.spread(logits, list(bounded), config.depth)}
  try:
    with naming(path):
      path.mkdir(parents=True, exist_ok=True)
      _write(path, where, arrays, extra)
  except OSError as e:
    raise Unwritable(f"{path}: cannot be written: {e.strerror}") from e
  write_json(path / CONFIG, values)  # last, because it makes the directory a checkpoint


def _write(path, where: Plan, arrays: dict, extra: dict) -> None:
  """Writes the tensors, in one file or in several with an index."""
  pieces = where.by_tensor()
  files = list(_files(where.shapes | {name: tensor.shape for name, tensor in extra.items()}))
  names = [WEIGHTS] if len(files) == 1 else [
      f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
  for file, tensors in zip(names, files, strict=True):
    # The metadata tells transformers that the tensors are laid out as PyTorch lays them out.
    save_file({name: extra[name] if name in extra else _tensor(shape, pieces[name], arrays)
               for name, shape in tensors.items()}, path / file, metadata={"format": "pt"})
  if len(files) > 1:
    size = 4 * sum(math.prod(shape) for tensors in files for shape in tensors.values())
    write_json(path / INDEX, {"metadata": {"total_size": size}, "weight_map": {
        name: file for file, tensors in zip(names, files, strict=True) for name in tensors}})


def _files(shapes: dict) -> Iterator[dict]:
  """Yields the shapes of the tensors of each file."""
  tensors, size = {}, 0
  for name, shape in shapes.items():
    if tensors and size + 4 * math.prod(shape) > FILE_BYTES:
      yield tensors
      tensors, size = {}, 0
    tensors[name] = shape
    size += 4 * math.prod(shape)
  yield tensors


def _tensor(shape, pieces, arrays):
  tensor = np.empty(shape, np.float32)
  for piece in pieces:
    parameter = arrays[piece.parameter]
    own = to_stored(piece.parameter, parameter if piece.repetition is None else parameter[piece.repetition])
    tensor[piece.start:piece.stop] = own[piece.first:piece.first + piece.stop - piece.start]
  return tensor


def _bounded(config, shapes) -> dict[int, tuple[str, int]]:
  """The layers with a learned lower bound: number -> (parameter, index along its leading axis)."""
  parts = [(f"{prefix}mixer.{bounds.PARAMETER}", repetition) for prefix, repetition, _ in layers(config)]
  return {layer: part for layer, part in enumerate(parts) if part[0] in shapes}


def _described(path):
  """Returns the values of `config.json`, the family, the model's config, and nnx's split of the model with shapes for
  arrays."""
  values = read_json(path / CONFIG)
  try:
    kind = families.of(values)
    config = FAMILIES[kind].from_hf(values)
    return values, kind, config, *nnx.split(abstract_model(config), nnx.Param)
  except ValueError as e:
    raise ValueError(f"{path / CONFIG}: {e}") from e


def _leaves(state):
  return [(_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state)]


def _name(path):
  return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
