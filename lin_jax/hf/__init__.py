"""Checkpoints of flash-linear-attention in Hugging Face's format, read and written: `config.json` and safetensors.

The library reads and writes the families of `lin_jax.hf.fla.names.FAMILIES` and their hybrids with softmax attention,
in the layouts of flash-linear-attention 0.6. A checkpoint is taken whole or refused: every tensor of the model must be
there in its shape, and nothing else. The model computes the same as flash-linear-attention's up to rounding, which
`experiments/compare_fla.py` measures.
"""

import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from lin_jax.config import ModelConfig
from lin_jax.files import Unwritable, naming, write_json
from lin_jax.hf.files import CONFIG, WEIGHTS, Tensors, read_json
from lin_jax.hf.files import INDEX as INDEX
from lin_jax.hf.fla import bounds
from lin_jax.hf.fla.configs import from_hf, to_hf
from lin_jax.hf.fla.names import FAMILIES, MLP, MODEL
from lin_jax.mixers import name_of
from lin_jax.model import LanguageModel, abstract_model, layer_mixers, layer_runs

_BOUNDS = f"model.{bounds.TENSOR}"


def load_config(path: pathlib.Path | str) -> ModelConfig:
  """The model of the checkpoint directory `path`. Raises ValueError if it is missing, foreign or of another family."""
  return _described(pathlib.Path(path))[1]


def load(path: pathlib.Path | str) -> tuple[ModelConfig, LanguageModel]:
  """The model of the checkpoint directory `path`, with its parameters in float32 on the default device.

  Raises:
    ValueError: the directory holds no such checkpoint, it holds one with options that no mixer here has, or its tensors
      are not exactly the model's. The message names the options or tensors.
  """
  path = pathlib.Path(path)
  values, config, graph, abstract = _described(path)
  shapes = {name: leaf.shape for name, leaf in _leaves(abstract)}
  tensors = list(_tensors(config, shapes, fused_norm=values.get("fuse_norm", True)))
  expected = {name: _stored_shape(parts, shapes) for name, parts in tensors}
  bounded = _bounded(config, shapes)
  if bounded:
    expected[_BOUNDS] = (config.depth, config.width)
  with Tensors(path) as stored:
    # A tied head may be stored as well, but the embedding is the one that counts.
    stored.require(expected, optional={MODEL["head"]} if config.tie_embeddings else set())
    arrays = {name: np.empty(shape, np.float32) for name, shape in shapes.items()}
    for name, parts in tensors:
      tensor, start = stored.read(name), 0
      for part, repetition in parts:
        target = arrays[part] if repetition is None else arrays[part][repetition]
        rows = _outputs(part, target.shape)
        target[...] = _transposed(part, tensor[start:start + rows]).reshape(target.shape)
        start += rows
    if bounded:
      logits = bounds.merge(stored.read(_BOUNDS).astype(np.float32), list(bounded))
      for (part, repetition), row in zip(bounded.values(), logits, strict=True):
        arrays[part][repetition] = row
  params = jax.tree_util.tree_map_with_path(lambda path, _: jnp.asarray(arrays.pop(_name(path))), abstract)
  return config, nnx.merge(graph, params)


def save(path: pathlib.Path | str, config: ModelConfig, model: LanguageModel) -> None:
  """Writes `model`, whose config is `config`, as a checkpoint directory with float32 tensors.

  Raises ValueError if flash-linear-attention has no such model, or if `path` holds a checkpoint or cannot be written.
  """
  path = pathlib.Path(path)
  values = to_hf(config)
  if (path / CONFIG).exists():
    raise ValueError(f"{path} holds a checkpoint already: choose another directory")
  arrays = {name: np.asarray(leaf) for name, leaf in _leaves(nnx.state(model, nnx.Param))}
  shapes = {name: array.shape for name, array in arrays.items()}
  tensors = {}
  for name, parts in _tensors(config, shapes, fused_norm=True):
    pieces = [_transposed(part, arrays[part] if repetition is None else arrays[part][repetition])
              for part, repetition in parts]
    tensors[name] = np.ascontiguousarray(np.concatenate(pieces).reshape(_stored_shape(parts, shapes)))
  if bounded := _bounded(config, shapes):
    logits = np.stack([arrays[part][repetition] for part, repetition in bounded.values()])
    tensors[_BOUNDS] = bounds.spread(logits, list(bounded), config.depth)
  try:
    with naming(path):
      path.mkdir(parents=True, exist_ok=True)
      # The metadata tells transformers that the tensors are laid out as PyTorch lays them out.
      save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})
  except OSError as e:
    raise Unwritable(f"{path}: cannot be written: {e.strerror}") from e
  write_json(path / CONFIG, values)  # last, because it makes the directory a checkpoint


def _tensors(config: ModelConfig, shapes: dict, fused_norm: bool) -> Iterator[tuple[str, list]]:
  """Yields (tensor there, [(parameter here, layer's index along its leading axis), ...]) for every tensor."""
  family = next(f for f in FAMILIES.values() if f.mixer == name_of(config.mixer))
  names = {"base": family.base, "final_norm": family.final_norm}
  for here, there in MODEL.items():
    if here in shapes:
      yield there.format(**names), [(here, None)]
  for layer, (prefix, repetition, mixer) in enumerate(_layers(config)):
    for here, there in _block(family, mixer, fused_norm).items():
      parts = [prefix + part for part in here]
      if parts[0] in shapes:  # a model without an output gate or convolution has none
        yield f"{family.base}.layers.{layer}.{there}", [(part, repetition) for part in parts]


def _layers(config) -> Iterator[tuple[str, int, Any]]:
  """Yields for each layer the prefix of its parameters, its index along their leading axis, and its mixer's config."""
  for run, (pattern, count) in enumerate(layer_runs(layer_mixers(config))):
    for repetition in range(count):
      for position, mixer in enumerate(pattern):
        yield f"runs.{run}.{position}.", repetition, mixer


def _bounded(config, shapes) -> dict[int, tuple[str, int]]:
  """The layers with a learned lower bound: number -> (parameter, index along its leading axis)."""
  parts = [(f"{prefix}mixer.{bounds.PARAMETER}", repetition) for prefix, repetition, _ in _layers(config)]
  return {layer: part for layer, part in enumerate(parts) if part[0] in shapes}


def _block(family, mixer, fused_norm) -> dict[tuple[str, ...], str]:
  """The parameters of one block, each with its tensor there."""
  own = next(f for f in FAMILIES.values() if f.mixer == name_of(mixer))
  renamed = {} if fused_norm else own.unfused
  tensors = {("mixer_norm.scale",): f"{family.mixer_norm}.weight"}
  tensors |= {(here,): there for here, there in MLP.items()}
  for here, there in own.tensors.items():
    parts = (here,) if isinstance(here, str) else here
    tensors[tuple(f"mixer.{part}" for part in parts)] = f"{family.mixer_name}.{renamed.get(there, there)}"
  return tensors


def _transposed(name: str, array: np.ndarray) -> np.ndarray:
  """Turns a parameter into its stored form, where outputs are the first axis, or back."""
  array = array[:, 0] if array.ndim == 3 else array
  return array.T if name.endswith("kernel") or name == "head" else array


def _outputs(name, shape):
  return shape[-1] if name.endswith("kernel") or name == "head" else shape[0]


def _stored_shape(parts, shapes) -> tuple[int, ...]:
  """The shape of the tensor that concatenates `parts`."""
  own = [shapes[part] if repetition is None else shapes[part][1:] for part, repetition in parts]
  part, shape = parts[0][0], own[0]
  outputs = sum(_outputs(part, shape) for part, shape in zip([p for p, _ in parts], own, strict=True))
  if "convolutions" in part and len(shape) == 2:
    return outputs, 1, shape[0]
  if part.endswith("kernel") or part == "head":
    return outputs, shape[0]
  return outputs, *shape[1:]


def _described(path):
  """Returns the values of `config.json`, the model's config, and nnx's split of the model with shapes for arrays."""
  values = read_json(path / CONFIG)
  try:
    config = from_hf(values)
    return values, config, *nnx.split(abstract_model(config), nnx.Param)
  except ValueError as e:
    raise ValueError(f"{path / CONFIG}: {e}") from e


def _leaves(state):
  return [(_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state)]


def _name(path):
  return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
