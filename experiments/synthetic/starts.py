"""The rules by which the kernels of a synthetic task's model start, and `draw`, which draws a model's kernels by one.

  layers    the library's own rule of each layer
  normal    N(0, 0.02^2) for all kernels
  fan_in    N(0, 1 / (3 inputs)) for all kernels
  zoology   MQAR's authors (HazyResearch/zoology, model.py): N(0, 0.02^2), for softmax attention's output projection
            divided by sqrt(2 depth). Mamba keeps PyTorch's rule, with its output projection divided by sqrt(depth).
  mad       MAD's authors (athms/mad-lab, language_model.py): PyTorch's rule. GLA's projections keep the rule of the
            authors' GLA layer, and RetNet's the library's. The encoder for compression (auto_encoder.py) starts from
            N(0, 0.02^2), the projection to Mamba's time step included. The authors also zero the time step's bias in
            the encoder, which is not done here.

PyTorch's rule for a Linear layer is uniform with variance 1 / (3 inputs). Under it, the projection to Mamba's time step
keeps Mamba's own rule. Embeddings and convolutions start alike under all rules, and biases of Linear layers at 0.
"""

import dataclasses
from collections.abc import Callable

import jax
from flax import nnx

from lin_jax.layers import Linear

STARTS = ("layers", "normal", "fan_in", "zoology", "mad")


@dataclasses.dataclass(frozen=True)
class Place:
  """Where a Linear layer stands: its attribute's name, the registered mixer that it is a part of ("" for none), the
  mixer of the model, the model's number of blocks, and whether the model encodes for a decoder."""

  name: str
  inside: str
  mixer: str
  depth: int
  encodes: bool


def draw(start: str, module: nnx.Module, mixer: str, depth: int, encodes: bool, rngs: nnx.Rngs) -> None:
  """Draws the kernels of all Linear layers of `module` again by the rule `start`, where it replaces the layer's own."""
  for path, layer in nnx.iter_modules(module):
    if isinstance(layer, Linear):
      place = Place(str(path[-1]), mixer if "mixer" in path else "", mixer, depth, encodes)
      if initializer := _initializer(start, place):
        layer.kernel[...] = initializer(rngs.params(), layer.kernel[...].shape)


def _initializer(start: str, place: Place) -> Callable | None:
  """Returns the rule as a function of key and shape, or None for the layer's own rule."""
  if start == "normal":
    return _normal(0.02)
  if start == "fan_in":
    return _scaled(1 / 3, "fan_in", "normal")
  if start == "zoology":
    return _zoology(place)
  return _mad(place) if start == "mad" else None


def _zoology(place):
  if place.mixer == "mamba":
    return _torch(place, 1 / place.depth if place.name == "output" else 1.0)
  return _normal(0.02 / (2 * place.depth) ** 0.5 if (place.inside, place.name) == ("attention", "output") else 0.02)


def _mad(place):
  if place.encodes:
    return _normal(0.02)
  if place.inside == "gla":
    return _scaled(2**-5, "fan_avg", "uniform")
  return None if place.inside == "retention" else _torch(place)


def _torch(place, scale=1.0):
  return None if (place.inside, place.name) == ("mamba", "dt") else _scaled(scale / 3, "fan_in", "uniform")


def _normal(deviation):
  return lambda key, shape: deviation * jax.random.normal(key, shape)


def _scaled(scale, mode, distribution):
  # The layers of a stack have one kernel, with an axis before those of inputs and outputs.
  return lambda key, shape: nnx.initializers.variance_scaling(
      scale, mode, distribution, batch_axis=tuple(range(len(shape) - 2)))(key, shape)
