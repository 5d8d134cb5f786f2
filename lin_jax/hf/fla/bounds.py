"""HGRN2's lower bounds. Here only the HGRN2 layers have logits, and in flash-linear-attention all layers have them.

There P is the softmax of the logits [L, D] over all layers, and the bound of layer l is P_1 + ... + P_l whatever the
layers' mixers. Here P is over the HGRN2 layers alone. A hybrid whose first layer is HGRN2 has the same bounds if an
attention layer's share counts for the next HGRN2 layer, or for the first one where no HGRN2 layer follows. That works
because no bound contains the first share.
"""

from collections.abc import Sequence

import numpy as np

TENSOR = "lower_bounds"
PARAMETER = "bound_logits"
_NO_SHARE = -1e4  # exp of it is 0


def merge(logits: np.ndarray, layers: Sequence[int]) -> np.ndarray:
  """Turns the logits of all layers [L, D] into those of the HGRN2 layers `layers`, which begin with layer 0."""
  owner = np.searchsorted(layers, np.arange(len(logits))) % len(layers)
  return np.stack([np.logaddexp.reduce(logits[owner == i], axis=0) for i in range(len(layers))])


def spread(logits: np.ndarray, layers: Sequence[int], depth: int) -> np.ndarray:
  """Inverse of `merge`, in which the other layers get no share."""
  full = np.full((depth, logits.shape[-1]), _NO_SHARE, logits.dtype)
  full[list(layers)] = logits
  return full
