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


def repeated_loss(workdir: pathlib.Path, data: DataConfig) -> dict:
  """Evaluates the run in `workdir` on the whole validation split, in its windows.

  Returns `targets`, the number of targets that complete a repeated pair, and their mean `loss` in nats, None if there
  are none.
  """
  config, model = load_model(workdir)
  batches = [dict(batch, mask=batch["mask"] * repeated(batch))
             for batch in eval_batches(data, "val", 0, vocab_size=config.model.vocab_size)]
  if not any(batch["mask"].any() for batch in batches):
    return {"targets": 0, "loss": None}
  found = evaluate(model, batches)
  return {name: found[name] for name in ("targets", "loss")}


def repeated(batch: dict) -> np.ndarray:
  """Returns, for each token of the batch [B, T], whether it and its target follow each other earlier in its segment.
  """
  marks = np.zeros(batch["tokens"].shape, batch["mask"].dtype)
  for row, *columns in zip(marks, batch["segment_ids"], batch["tokens"], batch["targets"], strict=True):
    _, first = np.unique(np.stack(columns), axis=1, return_index=True)
    row[:] = 1
    row[first] = 0
  return marks
