"""From the tensors of a checkpoint to the parameters of a model, each part read for the device that holds it.

No more of the model is in host memory at a time than about its largest tensor, and no device holds more than its own
shards of the parameters.
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from lin_jax.hf.files import Tensors
from lin_jax.hf.layout import Plan, from_stored, output_axis


class Placement:
  """Reads parameters as float32 arrays on the devices of a sharding.

  Args:
    shapes: of the parameters, with their axis of repetitions.
    known: values that are not read but given, by parameter and repetition.
  """

  def __init__(self, tensors: Tensors, plan: Plan, shapes: Mapping[str, tuple[int, ...]],
               known: Mapping[tuple[str, int], np.ndarray]):
    self._tensors, self._known, self._shapes = tensors, known, shapes
    self._pieces = plan.by_parameter()
    self._stacked = {name for name, repetition in (*self._pieces, *known) if repetition is not None}
    self._most = max(math.prod(shape[name in self._stacked:]) for name, shape in shapes.items())

  def place(self, name: str, sharding: Sharding) -> jax.Array:
    """The parameter `name`. Devices with equal shards read them once."""
    shape, shards, arrays = self._shapes[name], {}, []
    for device, index in sharding.addressable_devices_indices_map(shape).items():
      index = tuple(slice(*part.indices(size)[:2]) for part, size in zip(index, shape, strict=True))
      if index not in shards:
        shards[index] = self._shard(name, index, device)
      arrays.append(jax.device_put(shards[index], device))
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)

  def _shard(self, name, index, device):
    """Reads as many repetitions at a time as the largest tensor has room for."""
    if name not in self._stacked:
      return _put(self._read(name, None, index), device)
    numbers, index = range(index[0].start, index[0].stop), index[1:]
    step = max(1, self._most // math.prod(part.stop - part.start for part in index))
    parts = [_put(self._layers(name, numbers[first:first + step], index), device)
             for first in range(0, len(numbers), step)]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)

  def _layers(self, name, repetitions, index):
    layers = np.empty((len(repetitions), *(part.stop - part.start for part in index)), np.float32)
    for target, repetition in zip(layers, repetitions, strict=True):
      target[...] = self._read(name, repetition, index)
    return layers

  def _read(self, name, repetition, index):
    """The slices `index` of one repetition of a parameter."""
    if (name, repetition) in self._known:
      return self._known[name, repetition][index]
    outputs = index[output_axis(name)]
    inputs = index[:-1] if output_axis(name) else index[1:]
    parts = []
    for piece in self._pieces[name, repetition]:
      first, last = max(outputs.start, piece.first), min(outputs.stop, piece.first + piece.stop - piece.start)
      if first < last:
        rows = slice(piece.start + first - piece.first, piece.start + last - piece.first)
        parts.append(from_stored(name, self._tensors.read(piece.tensor, rows, inputs)))
    return np.concatenate(parts, axis=output_axis(name), dtype=np.float32)


def _put(array, device):
  # Waits, so that the host holds no copies of arrays that are still on their way.
  return jax.block_until_ready(jax.device_put(array, device))
