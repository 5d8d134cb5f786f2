"""HGRN2's lower bounds: logits of HGRN2 layers alone here, of all layers there.

There, with P = softmax of the logits [L, D] over all layers, the bound of layer l is P_1 + ... + P_l, whatever mixers
the layers have; here P is over the HGRN2 layers alone. A hybrid whose first layer is HGRN2 has the same bounds when an
attention layer's share counts for the next HGRN2 layer, or for the first one where none follows: the first share is the
one that no bound contains.
"""

from collections.abc import Sequence

import numpy as np

TENSOR = "lower_bounds"
PARAMETER = "bound_logits"
_NO_SHARE = -1e4  # exp of it is 0


def merge(logits: np.ndarray, layers: Sequence[int]) -> np.ndarray:
  """Logits of all layers [L, D] -> those of the HGRN2 layers `layers`, which begin with 0."""
  owner = np.searchsorted(layers, np.arange(len(logits))) % len(layers)
  return np.stack([np.logaddexp.reduce(logits[owner == i], axis=0) for i in range(len(layers))])


def spread(logits: np.ndarray, layers: Sequence[int], depth: int) -> np.ndarray:
  """Inverse of `merge`: the other layers get no share."""
  full = np.full((depth, logits.shape[-1]), _NO_SHARE, logits.dtype)
  full[list(layers)] = logits
  return full
