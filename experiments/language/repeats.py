"""Recall within the context: the loss on pairs of tokens that have occurred before in their document.

After Arora et al. 2023 (arXiv:2312.04927), who find most of the difference between attention and models without it in
such pairs. They leave out the pairs that are most frequent in the training data; here all count.
"""

import numpy as np

from lin_jax.evaluate import evaluate
from lin_jax.model import LanguageModel


def pair_losses(model: LanguageModel, batches: list[dict]) -> dict:
  """Mean losses of the model, in nats per token, over the targets of all the batches.

  Returns the losses of `repeated` and of all `other` pairs of a token and its target, and the `repeated_share`.
  """
  marks = [repeated(batch) for batch in batches]
  found = {kind: evaluate(model, [dict(batch, mask=batch["mask"] * (mark == wanted))
                                  for batch, mark in zip(batches, marks, strict=True)])
           for kind, wanted in (("repeated", True), ("other", False))}
  share = found["repeated"]["targets"] / sum(part["targets"] for part in found.values())
  return {**{kind: part["loss"] for kind, part in found.items()}, "repeated_share": round(share, 4)}


def repeated(batch: dict) -> np.ndarray:
  """Returns, for each token of the batch [B, T], whether it and its target follow each other earlier in its segment.
  """
  marks = np.ones(batch["tokens"].shape, bool)
  for row, *columns in zip(marks, batch["segment_ids"], batch["tokens"], batch["targets"], strict=True):
    row[np.unique(np.stack(columns), axis=1, return_index=True)[1]] = False
  return marks
