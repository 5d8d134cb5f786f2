"""Operands that all kernels of the delta rule share, and how a kernel body takes its weights per token from refs."""

import dataclasses

import jax
import jax.numpy as jnp

from kernels import triton_blocks
from kernels.delta_rule.inverse import inverse
from kernels.scalar_decay import weigh


@dataclasses.dataclass
class Operands:
  """Arrays of the launches; `y`, `sums`, `q_norm`, `k_norm` and `vectors` as `inverse` gives them."""

  q: jax.Array
  k: jax.Array
  y: jax.Array
  beta: jax.Array
  log_decay: jax.Array | None
  sums: jax.Array | None
  q_norm: jax.Array | None
  k_norm: jax.Array | None
  vectors: jax.Array | None = None

  def per_token(self, gates):
    """The arrays `[B, T, H]` that are not None: beta, `gates`, and the factors that normalize q and k."""
    return [x for x in (self.beta, gates, self.q_norm, self.k_norm) if x is not None]


jax.tree_util.register_dataclass(Operands)


def prepare(q, k, beta, log_decay, normalize_qk, chunk, by_head=False):
  """Runs the kernel of the inverse on chunks of `chunk` tokens; see there for `by_head`."""
  y, sums, q_norm, k_norm, *vectors = triton_blocks.residuals(
      inverse(q, k, beta, log_decay, normalize_qk, chunk, by_head))
  return Operands(q, k, y, beta, log_decay, sums, q_norm, k_norm, *vectors)


# In kernel bodies.


def take_per_token(refs, count, gated):
  """Takes the first `count` refs: the ref of the gates or None, the other refs of `per_token`, and all further refs."""
  beta, *others = refs[:count]
  gate = others.pop(0) if gated else None
  return gate, (beta, *others), list(refs[count:])


def row_weights(refs, rows):
  """beta, and the factors that normalize the rows of q and k, None without normalization."""
  beta, *norms = (ref[rows] for ref in refs)
  return beta, *(norms or (None, None))


def weigh_columns(x, *weights):
  """Columns of x times each weight that is not None."""
  for weight in weights:
    if weight is not None:
      x = x * (weight if jnp.ndim(weight) == 0 else weight[None])
  return x


def weigh_both(x, row_weight, column_weight):
  """`x [C, C]` with its rows and columns multiplied."""
  return weigh_columns(weigh(x, row_weight), column_weight)
