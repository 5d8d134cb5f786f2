"""Recall within the context: the loss on pairs of tokens that have occurred before in their document.

After Arora et al. 2023 (arXiv:2312.04927), who find most of the difference between attention and models without it in
such pairs. They leave out the pairs that are most frequent in the training data; here all count.
"""

import pathlib

import numpy as np

from lin_jax.checkpoint import load_model
from lin_jax.config import DataConfig
from lin_jax.data import eval_batches
from lin_jax.evaluate import evaluate


def pair_losses(workdir: pathlib.Path, data: DataConfig) -> dict:
  """Mean losses, in nats per token, of the run in `workdir` on the whole validation split, in its windows.

  Returns the losses of `repeated` and of all `other` pairs of a token and its target, and the `repeated_share`.
  """
  config, model = load_model(workdir)
  batches = list(eval_batches(data, "val", 0, vocab_size=config.model.vocab_size))
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
