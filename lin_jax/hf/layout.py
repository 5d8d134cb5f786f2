"""Where the parameters of a model are in the tensors of a checkpoint.

A family's `Layout` names the tensors that hold the parameters of each layer. `plan` resolves it to rows: which rows of
which tensor are which outputs of which parameter. The plan serves both ways, reading and writing. Parameters of layers
that repeat have a leading axis of repetitions here, and a tensor of its own for each repetition there. Kernels of
linear layers are stored transposed, as [outputs, inputs], and kernels of short convolutions as [channels, 1, taps].
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lin_jax.config import ModelConfig
from lin_jax.model import layer_mixers, layer_runs


@dataclasses.dataclass(frozen=True)
class Interleaved:
  """Parameters that alternate in one tensor: the rows of head 0 of each parameter, then those of head 1, and so on."""

  parameters: tuple[str, ...]
  heads: int


# Parameter -> tensor. A tuple stands for a concatenation along the outputs, of parameters or of tensors.
Names = Mapping[str | tuple[str, ...] | Interleaved, str | tuple[str, ...]]


@dataclasses.dataclass(frozen=True)
class Layout:
  """The names of a checkpoint's tensors.

  Attributes:
    model: tensors of the parameters outside of the layers.
    layers: for each layer, the tensors of the parameters of its block. Parameters that a model does not have are left
      out. Several tensors for a tuple of parameters are equally long where the library writes them, and may be of any
      lengths where it reads them.
    spellings: pairs of texts. A tensor may also be stored under its name with the first replaced by the second.
    skipped: patterns of tensors that are no part of the model.
    optional: tensors that may be stored as well and are not read.
    bounds: the tensor of HGRN2's lower bounds, if the family has one.
    sizes: last part of a tensor's name without "weight" -> the options that set its shape.
  """

  model: Names
  layers: Sequence[Names]
  spellings: tuple[tuple[str, str], ...] = ()
  skipped: tuple[str, ...] = ()
  optional: tuple[str, ...] = ()
  bounds: str = ""
  sizes: Mapping[str, str] = dataclasses.field(default_factory=dict)


class Piece(NamedTuple):
  """The rows `start` to `stop` of a tensor, which are the outputs from `first` on of one repetition of a parameter."""

  tensor: str
  start: int
  stop: int
  parameter: str
  repetition: int | None
  first: int


@dataclasses.dataclass(frozen=True)
class Plan:
  """The pieces of all parameters, and the shape of every tensor."""

  pieces: list[Piece]
  shapes: dict[str, tuple[int, ...]]

  def by_parameter(self) -> dict[tuple[str, int | None], list[Piece]]:
    grouped = {}
    for piece in self.pieces:
      grouped.setdefault((piece.parameter, piece.repetition), []).append(piece)
    return grouped

  def by_tensor(self) -> dict[str, list[Piece]]:
    grouped = {}
    for piece in self.pieces:
      grouped.setdefault(piece.tensor, []).append(piece)
    return grouped


def plan(layout: Layout, config: ModelConfig, shapes: Mapping[str, tuple[int, ...]],
         stored: Mapping[str, tuple[int, ...]] | None = None) -> Plan:
  """The plan of a model whose parameters have `shapes`, for tensors of the shapes `stored`, or for writing if None."""
  pieces, expected = [], {}
  for parts, heads, tensors, repetition in _groups(layout, config):
    if parts[0] not in shapes:
      continue
    tensors = [_spelled(name, layout.spellings, stored or {}) for name in tensors]
    own = [shapes[part] if repetition is None else shapes[part][1:] for part in parts]
    outputs = [shape[output_axis(part)] for part, shape in zip(parts, own, strict=True)]
    lengths = _lengths(tensors, sum(outputs), stored or {})
    expected |= {name: _stored_shape(parts[0], own[0], rows) for name, rows in zip(tensors, lengths, strict=True)}
    for part, intervals in zip(parts, _intervals(outputs, heads), strict=True):
      first = 0
      for name, start, stop in _cut(intervals, tensors, lengths):
        pieces.append(Piece(name, start, stop, part, repetition, first))
        first += stop - start
  return Plan(pieces, expected)


def prefixed(names: Names, prefix: str) -> Names:
  """The same parameters with `prefix` before the names of their tensors."""
  return {here: prefix + there if isinstance(there, str) else tuple(prefix + name for name in there)
          for here, there in names.items()}


def layers(config: ModelConfig) -> Iterator[tuple[str, int, Any]]:
  """Yields for each layer the prefix of its parameters, its index along their leading axis, and its mixer's config."""
  for run, (pattern, count) in enumerate(layer_runs(layer_mixers(config))):
    for repetition in range(count):
      for position, mixer in enumerate(pattern):
        yield f"runs.{run}.{position}.", repetition, mixer


def output_axis(parameter: str) -> int:
  """The axis of a parameter, without repetitions, that is the first axis of its tensor."""
  return -1 if _transposed(parameter) else 0


def to_stored(parameter: str, array: np.ndarray) -> np.ndarray:
  """Turns a parameter, or some of its outputs, into the form that a tensor has."""
  if _transposed(parameter):
    array = array.T
  return array[:, None] if _convolution(parameter) else array


def from_stored(parameter: str, array: np.ndarray) -> np.ndarray:
  """Inverse of `to_stored`."""
  array = array[:, 0] if _convolution(parameter) else array
  return array.T if _transposed(parameter) else array


def _groups(layout, config):
  """Yields (parameters, heads that they alternate by, tensors, repetition) for every entry of the layout."""
  blocks = [("", None, layout.model)]
  blocks += [(prefix, repetition, names)
             for (prefix, repetition, _), names in zip(layers(config), layout.layers, strict=True)]
  for prefix, repetition, names in blocks:
    for here, there in names.items():
      heads, parts = (here.heads, here.parameters) if isinstance(here, Interleaved) else (1, here)
      parts, tensors = ((names,) if isinstance(names, str) else names for names in (parts, there))
      yield [prefix + part for part in parts], heads, tensors, repetition


def _spelled(name, spellings, stored):
  """The spelling of a tensor's name that is stored, or `name` if none is."""
  spelled = [name, *(name.replace(*pair, 1) for pair in spellings)]
  return next((other for other in spelled if other in stored), name)


def _lengths(tensors, total, stored):
  """The rows of each of several tensors with `total` rows: as stored, or else equally many."""
  found = [stored[name][0] for name in tensors if stored.get(name)]
  if len(tensors) > 1 and len(found) == len(tensors) and sum(found) == total:
    return found
  most = math.ceil(total / len(tensors))
  return [min(most, total - i * most) for i in range(len(tensors))]


def _intervals(outputs, heads):
  """For each of several parameters, the rows that it has in the tensor of all of them."""
  per_head = [size // heads for size in outputs]
  offsets = [sum(per_head[:i]) for i in range(len(outputs))]
  return [[(start := head * sum(per_head) + offset, start + size) for head in range(heads)]
          for offset, size in zip(offsets, per_head, strict=True)]


def _cut(intervals, tensors, lengths):
  """Yields (tensor, start, stop) for the rows `intervals` of the concatenation of `tensors`."""
  for start, stop in intervals:
    offset = 0
    for name, length in zip(tensors, lengths, strict=True):
      first, last = max(start, offset), min(stop, offset + length)
      if first < last:
        yield name, first - offset, last - offset
      offset += length


def _stored_shape(parameter, shape, rows):
  if _convolution(parameter):
    return rows, 1, shape[0]
  return (rows, shape[0]) if _transposed(parameter) else (rows, *shape[1:])


def _transposed(parameter):
  return parameter.endswith("kernel") or parameter == "head"


def _convolution(parameter):
  return "convolutions." in parameter and parameter.endswith("kernel")
