"""The model as decoding runs it: layer by layer, with weights that are prepared once for many tokens.

A token reads every weight once, and at small batches this is most of its time. So the weights are cast to the compute
dtype before the first token, and the layers are taken apart, because a scan over layers copies slices of what it scans
over, and writes all states anew. Projections of one input become one product, because each kernel costs about 2 us.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float, Int

from lin_jax.layers import Linear, align, multiply
from lin_jax.sharding import is_partitioned

# Columns of a joint product are a multiple of this many, so that its rows stay aligned for the tensor cores.
_ALIGNED = 64


class Decoder:
  """A language model prepared for `step`. It is made and used under one jit, outside the loop over tokens."""

  def __init__(self, model: nnx.Module):
    self.model = jax.tree.map(lambda leaf: leaf, model)
    for name in ("embedding", "head"):
      if (matrix := getattr(model, name)) is not None:
        setattr(self.model, name, matrix.replace(matrix[...].astype(model.dtype)))
    self.blocks = [_prepared(block) for block in in_order(model.placed_runs())]

  def step(self, tokens: Int[Array, "B"], states: list) -> tuple[Float[Array, "B V"], list]:
    """Float32 logits after one more token per row, and the states of the layers in their order."""
    x, after = self.model.embed(tokens), []
    for block, state in zip(self.blocks, states, strict=True):
      x, state = block.step(x, state)
      after.append(state)
    return self.model.logits(self.model.norm(x)), after


def in_order(runs: Any) -> list:
  """The layers of stacked `runs`, blocks or their states, one by one in the order of the model."""
  layers = []
  for pattern in runs:
    for i in range(jax.tree.leaves(pattern[0])[0].shape[0]):
      layers += [jax.tree.map(lambda leaf, i=i: leaf[i], stack) for stack in pattern]
  return layers


def stacked(layers: list, runs: Any) -> list:
  """The layers' states, stacked as in `runs`: the inverse of `in_order`."""
  layers, result = iter(layers), []
  for pattern in runs:
    repetitions = [[next(layers) for _ in pattern] for _ in range(jax.tree.leaves(pattern[0])[0].shape[0])]
    result.append([jax.tree.map(lambda *leaves: jnp.stack(leaves), *stack) for stack in zip(*repetitions, strict=True)])
  return result


class Columns(nnx.Module):
  """A Linear whose weights are columns of a wider matrix, which is multiplied whole.

  Linears that share the matrix and the input have the same product, which the compiler computes once.
  """

  def __init__(self, linear: Linear, joint: Float[Array, "inputs joint"], first: int):
    self.bias, self.dtype, self.output_dtype = linear.bias, linear.dtype, linear.output_dtype
    self.joint, self.first, self.outputs = nnx.data(joint), first, linear.kernel.shape[-1]

  def __call__(self, x: Float[Array, "*batch inputs"]) -> Float[Array, "*batch outputs"]:
    # Rounding the float32 sums afterwards gives what a product in `output_dtype` gives.
    y = multiply(x, self.joint, self.dtype, jnp.float32)[..., self.first:self.first + self.outputs]
    y = y.astype(self.output_dtype)
    return y if self.bias is None else y + align(self.bias[...].astype(y.dtype), y)


def _prepared(block):
  for _, module in list(nnx.iter_modules(block)):
    linears = {name: linear for name, linear in vars(module).items() if isinstance(linear, Linear)}
    for linear in linears.values():
      linear.kernel = linear.kernel.replace(linear.kernel[...].astype(linear.dtype))
    # Concatenating columns that a mesh splits would move them between its devices.
    if not is_partitioned(jax.sharding.get_abstract_mesh()):
      for group in _shared_inputs(linears):
        _join(module, group)
  return block


def _shared_inputs(linears):
  """Groups of names of the Linears that read the residual stream's width, and so probably the same input."""
  groups = {}
  for name, linear in linears.items():
    if linear.kernel.get_metadata()["out_sharding"][0] == "embed":
      groups.setdefault((linear.kernel.shape[-2], linear.dtype), {})[name] = linear
  return [group for group in groups.values() if len(group) > 1]


def _join(module, group):
  kernels = [linear.kernel[...] for linear in group.values()]
  width = sum(kernel.shape[1] for kernel in kernels)
  joint = jnp.pad(jnp.concatenate(kernels, axis=1), ((0, 0), (0, -width % _ALIGNED)))
  first = 0
  for (name, linear), kernel in zip(group.items(), kernels, strict=True):
    setattr(module, name, Columns(linear, joint, first))
    first += kernel.shape[1]
