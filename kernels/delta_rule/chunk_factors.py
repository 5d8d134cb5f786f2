"""Everything in a chunk of the delta rule that depends on its decay, in plain jnp and for every form of decay.

`README.md` of this folder has the symbols. A decay per key channel takes the dyadic levels of `kernels.chunks`, so no
exponent is a difference of sums, and no array has an entry for each pair of tokens and channel.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels import chunks
from kernels.chunk_states import scalar_decays

dot = chunks.product(jnp.float32)


class Factors(NamedTuple):
  """P and X `[B, H, C, C]`, decayed queries and keys `[B, H, C, K]`, and the chunk's decay `[B, H, K, 1]`."""

  scores: jax.Array
  overlaps: jax.Array
  q_upto: jax.Array
  k_upto: jax.Array
  k_after: jax.Array
  total: jax.Array


def factors(q, k, gate) -> Factors:
  """The factors of a chunk's q and k `[B, H, C, K]`, of which q is scaled, and gate `[B, H, C, K or 1]` or None."""
  return _per_token(q, k, gate) if gate is None or gate.shape[3] == 1 else _per_channel(q, k, gate)


def _per_token(q, k, gate):
  exponents = None if gate is None else chunks.exponents(gate)
  between, upto, after, total = scalar_decays(exponents, k.shape[2])
  below = np.tril(np.ones((1, 1, *between.shape[2:]), np.float32), -1)
  scores = between * dot("bhik,bhjk->bhij", q, k)
  overlaps = below * between * dot("bhik,bhjk->bhij", k, k)
  total = jnp.broadcast_to(jnp.asarray(total, jnp.float32), (*k.shape[:2], k.shape[3], 1))
  return Factors(scores, overlaps, upto * q, upto * k, after * k, total)


def _per_channel(q, k, gate):
  _, pairs, _ = chunks.level_masks(gate.shape[2])
  decays = chunks.decays(gate)
  levels, upto, after = decays[:, :, :-2], decays[:, :, -2], decays[:, :, -1]
  zq, zk = levels * q[:, :, None], levels * k[:, :, None]
  scores, overlaps = (jnp.sum(pairs[None, None] * dot("bhlik,bhljk->bhlij", z, zk), axis=2) for z in (zq, zk))
  # No gate lies between a token and itself.
  scores += np.eye(gate.shape[2], dtype=np.float32)[None, None] * chunks.rowsum(q * k)
  return Factors(scores, overlaps, upto * q, upto * k, after * k, upto[:, :, -1, :, None])
