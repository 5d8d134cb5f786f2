"""Low-rank adapters (LoRA; Hu et al. 2021, arXiv:2106.09685): small products that train beside frozen Linear layers.

  y = x W + (alpha / rank) (x A) B,   W [inputs, outputs] frozen, A [inputs, rank], B [rank, outputs]

A starts uniform with variance 1 / (3 inputs) and B at zero, so that a model starts with the function that it has
without adapters. Stacked layers have stacked adapters. A is split over a mesh like the inputs of W, and B like its
outputs. `merge_adapters` adds the adapters to W, which gives a model without them for generation, evaluation and
export.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lin_jax.config import LoraConfig
from lin_jax.layers import Linear, param
from lin_jax.trainable import chosen


class Adapter(nnx.Module):
  """(alpha / rank) (x A) B for the inputs of one Linear layer, or of a stack of them."""

  def __init__(self, linear: Linear, config: LoraConfig, *, rngs: nnx.Rngs):
    *layers, inputs, outputs = linear.kernel.shape
    axes = linear.kernel.get_metadata()["out_sharding"]
    start = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform", batch_axis=tuple(range(len(layers))))
    self.a = param(rngs, start, (*layers, inputs, config.rank), (axes[0], None))
    self.b = param(rngs, nnx.initializers.zeros, (*layers, config.rank, outputs), (None, axes[1]))
    self.scale = config.alpha / config.rank

  def __call__(self, x: Float[Array, "*rows inputs"], dtype: jnp.dtype) -> Float[Array, "*rows outputs"]:
    """The result in `dtype`, from products with operands in the dtype of x."""
    low = jnp.matmul(x, self.a[...].astype(x.dtype))
    return jnp.matmul(low, self.b[...].astype(x.dtype), preferred_element_type=dtype) * self.scale

  def product(self) -> Float[Array, "*layers inputs outputs"]:
    """The matrix by which the adapter multiplies, in float32."""
    with jax.default_matmul_precision("highest"):
      return self.scale * jnp.matmul(self.a[...], self.b[...])

  def flops_per_token(self) -> int:
    return 2 * self.a.shape[-1] * (self.a.shape[-2] + self.b.shape[-1])


def add_adapters(model: nnx.Module, config: LoraConfig, *, rngs: nnx.Rngs) -> nnx.Module:
  """`model`, after it got adapters beside the Linear layers that `config.targets` chooses by name; none at rank 0.

  Raises ValueError for a target that no layer has, with the names of the layers.
  """
  if config.rank:
    layers = _linear_layers(model)
    names = chosen(config.targets, layers, "lora.targets")  # the empty pattern is found in every name
    for name, layer in layers.items():
      if name in names:
        layer.adapter = Adapter(layer, config, rngs=rngs)
  return model


def merge_adapters(model: nnx.Module) -> nnx.Module:
  """`model`, after its adapters were added to the kernels beside them."""
  for layer in _linear_layers(model).values():
    if layer.adapter is not None:
      layer.kernel = layer.kernel.replace(layer.kernel[...] + layer.adapter.product())
      layer.adapter = None
  return model


def _linear_layers(model) -> dict[str, Linear]:
  return {".".join(map(str, path)): layer for path, layer in nnx.iter_modules(model) if isinstance(layer, Linear)}
