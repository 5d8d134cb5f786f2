"""Parameters of repeated layers, stacked as the model holds them, or apart as a step with unrolled layers updates them.

The model holds each parameter of layers that repeat as one array with a leading axis of layers, and so do checkpoints.
A step whose layers are unrolled would copy every weight out of its stack, and every gradient into one. It therefore
keeps one array per layer in the training state. The compiler removes the stacks that `together` builds inside of such a
step, because each of their slices is an array that exists.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lin_jax.optim import axis_count


@jax.tree_util.register_pytree_node_class
class Layers(tuple):
  """One parameter of all repetitions of a layer, apart."""

  def tree_flatten(self):
    return tuple(self), None

  @classmethod
  def tree_unflatten(cls, _, layers):
    return cls(layers)


def apart(tree: Any) -> Any:
  """`tree` with `Layers` in the place of each stacked parameter. It may be an optimizer state made from parameters."""

  def separate(leaf):
    if not isinstance(leaf, nnx.Variable) or leaf.ndim == axis_count(leaf):
      return leaf
    return Layers(leaf.replace(leaf[...][i]) for i in range(leaf.shape[0]))

  return jax.tree.map(separate, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def together(tree: Any) -> Any:
  """The inverse of `apart`, which leaves a tree without `Layers` as it is."""

  def stack(leaf):
    if not isinstance(leaf, Layers):
      return leaf
    return leaf[0].replace(jnp.stack([layer[...] for layer in leaf]))

  return jax.tree.map(stack, tree, is_leaf=lambda leaf: isinstance(leaf, Layers))
