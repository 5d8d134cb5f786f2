"""The model as decoding runs it: layer by layer, with weights that are prepared once for many tokens.

A token reads every weight once, and at small batches this is most of its time. So the weights are cast to the compute
dtype before the first token, and the layers are taken apart, because a scan over layers copies slices of what it scans
over, and writes all states anew. Projections of one input become one product, because each kernel costs about 2 us,
however little it does.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float, Int

from lin_jax.layers import Linear, RMSNorm, align
from lin_jax.lora import merge_adapters
from lin_jax.sharding import is_partitioned

# Joint products have a multiple of this many columns, as the tensor cores want their rows.
_ALIGNED = 64


@jax.tree_util.register_pytree_node_class
class Decoder:
  """A language model prepared for `step`. It is made under jit, outside the loop over tokens, and one program may hand
  it to others.

  The weights are copied in the compute dtype, with adapters merged. A program takes about as many times longer to
  compile as the scan over layers has repetitions.
  """

  def __init__(self, model: nnx.Module):
    prepared = jax.tree.map(lambda leaf: leaf, model)
    for name in ("embedding", "head"):
      if (matrix := getattr(model, name)) is not None:
        setattr(prepared, name, matrix.replace(matrix[...].astype(model.dtype)))
    blocks = [_prepared(block) for block in in_order(model.placed_runs())]
    for module in (prepared.norm, *blocks):
      _absorb_offsets(module)
    prepared.runs = nnx.List([])  # the blocks stand for them
    leaves, structure = jax.tree.flatten((prepared, blocks))
    numbers = {}
    places = tuple(numbers.setdefault(id(leaf), len(numbers)) for leaf in leaves)
    # Each array once. Otherwise a program would return, and another one multiply by, copies of a shared matrix.
    self._flat = list(dict(zip(places, leaves, strict=True)).values()), (structure, places)

  def tree_flatten(self) -> tuple[list, tuple]:
    return self._flat  # to flatten the modules anew takes milliseconds, in every call of a program

  @classmethod
  def tree_unflatten(cls, structure: tuple, arrays: list) -> "Decoder":
    decoder = cls.__new__(cls)
    decoder._flat = list(arrays), structure
    return decoder

  @functools.cached_property
  def _parts(self):
    arrays, (structure, places) = self._flat
    return jax.tree.unflatten(structure, [arrays[place] for place in places])

  @property
  def model(self) -> nnx.Module:
    """The model without its layers."""
    return self._parts[0]

  @property
  def blocks(self) -> list:
    """The prepared layers, in the order of the model."""
    return self._parts[1]

  def step(self, tokens: Int[Array, "B"], states: list) -> tuple[Float[Array, "B V"], list]:
    """Float32 logits after one more token per row, and the states of the layers in their order."""
    x, after = self.model.embed(tokens), []
    y = jnp.zeros_like(x)  # the last branch, which is added to x together with the next norm
    for block, state in zip(self.blocks, states, strict=True):
      post, norm = block.post_norm, block.mixer_norm
      x, inputs = _add(x, y, None if post else norm)
      with jax.named_scope("mixer"):
        y, state = block.mixer.step(inputs, state)
        y = norm(y) if post else y
      after.append(state)
      if block.mlp is not None:
        norm = block.mlp_norm
        x, inputs = _add(x, y, None if post else norm)
        with jax.named_scope("mlp"):
          y = block.mlp(inputs)
          y = norm(y) if post else y
    return self.model.logits(self.model.norm.of_sum(x, y)[1]), after


def _add(x, y, norm):
  """The sum x + y, and what the next branch reads of it: its norm, or the sum itself in a post-norm block."""
  if norm is None:
    x = x + y.astype(x.dtype)
    return x, x
  return norm.of_sum(x, y)


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
  """A Linear whose weights are columns of a wider matrix, which is stored transposed and multiplied whole.

  Linears that share the matrix and the input have the same product, which the compiler computes once.
  """

  def __init__(self, linear: Linear, transposed: Float[Array, "joint inputs"], first: int):
    self.bias, self.dtype, self.output_dtype = linear.bias, linear.dtype, linear.output_dtype
    self.transposed, self.first, self.outputs = nnx.data(transposed), first, linear.kernel.shape[-1]

  def __call__(self, x: Float[Array, "*batch inputs"]) -> Float[Array, "*batch outputs"]:
    y = _multiply(x.reshape(-1, x.shape[-1]).astype(self.dtype), self.transposed)
    # Rounding the float32 sums afterwards gives what a product in `output_dtype` gives.
    y = y[:, self.first:self.first + self.outputs].astype(self.output_dtype).reshape(*x.shape[:-1], -1)
    return y if self.bias is None else y + align(self.bias[...].astype(y.dtype), y)


def _multiply(rows, transposed):
  """Float32 products of rows [B, K] and of a matrix [N, K], along K."""
  if rows.shape[0] == 1:
    # XLA replaces a product of one row by a multiplication, which may write as many numbers as the matrix has, and a
    # sum. Sums along the last axis are fused with their multiplication, and read the matrix once.
    return jnp.sum(transposed.astype(jnp.float32) * rows.astype(jnp.float32), axis=1)[None]
  return jnp.einsum("bk,nk->bn", rows, transposed, preferred_element_type=jnp.float32)


def _prepared(block):
  merge_adapters(block)
  for _, module in list(nnx.iter_modules(block)):
    linears = {name: linear for name, linear in vars(module).items() if isinstance(linear, Linear)}
    for group in _shared_inputs(linears):
      _join(module, group)
  return block


def _absorb_offsets(module):
  # The compiler would leave the addition inside of the loop over tokens, as a kernel of its own for each norm.
  for _, norm in nnx.iter_modules(module):
    if isinstance(norm, RMSNorm) and norm.offset:
      norm.absorb_offset()


def _shared_inputs(linears):
  """Groups of the Linears that read the residual stream, and so the same input, and every other Linear by itself."""
  groups = {}
  # Concatenating columns that a mesh splits would move them between its devices.
  alone = is_partitioned(jax.sharding.get_abstract_mesh())
  for name, linear in linears.items():
    reads_stream = linear.kernel.get_metadata()["out_sharding"][0] == "embed"
    key = (linear.kernel.shape[-2], linear.dtype) if reads_stream and not alone else name
    groups.setdefault(key, {})[name] = linear
  return groups.values()


def _join(module, group):
  kernels = [linear.kernel[...].astype(linear.dtype) for linear in group.values()]
  filler = jnp.zeros((kernels[0].shape[0], -sum(kernel.shape[1] for kernel in kernels) % _ALIGNED), kernels[0].dtype)
  transposed = jnp.concatenate([*kernels, filler], axis=1).T
  first = 0
  for (name, linear), kernel in zip(group.items(), kernels, strict=True):
    setattr(module, name, Columns(linear, transposed, first))
    first += kernel.shape[1]
