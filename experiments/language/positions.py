"""The loss by the place in a document, with all of the document before it and with a model that forgets at intervals.

A recurrent model whose loss stays flat over long texts may use long context well, or ignore it. The second loss is the
control: the model reads the same text, and its state is reset every `reset_every` tokens of a document.
"""

import numpy as np

from lin_jax.evaluate import evaluate
from lin_jax.model import LanguageModel


def losses_by_place(model: LanguageModel, batches: list[dict], reset_every: int = 128) -> list[dict]:
  """Returns a dict for each range of places in a document, from `reset_every` on in doubling steps, without empty ones.

  Its keys are `start`, `stop` and `targets`, the mean `loss` in nats per token, and `reset_loss` of the control.
  """
  places = [_places(batch["segment_ids"]) for batch in batches]
  found, start, length = [], reset_every, batches[0]["tokens"].shape[1]
  while start < length:
    kept = [dict(batch, mask=batch["mask"] * ((place >= start) & (place < 2 * start)))
            for batch, place in zip(batches, places, strict=True)]
    if any(batch["mask"].any() for batch in kept):
      whole = evaluate(model, kept)
      reset = evaluate(model, [dict(batch, segment_ids=_cut(batch["segment_ids"], place, reset_every))
                               for batch, place in zip(kept, places, strict=True)])
      found.append({"start": start, "stop": min(2 * start, length), "targets": whole["targets"],
                    "loss": whole["loss"], "reset_loss": reset["loss"]})
    start *= 2
  return found


def _places(segment_ids):
  """int [B, T]: the number of tokens of its segment before each token."""
  time = np.arange(segment_ids.shape[1])
  begins = np.diff(segment_ids, axis=1, prepend=-1) != 0
  return time - np.maximum.accumulate(np.where(begins, time, 0), axis=1)


def _cut(segment_ids, places, reset_every):
  """Segments that also begin after every `reset_every` tokens."""
  begins = (np.diff(segment_ids, axis=1, prepend=-1) != 0) | (places % reset_every == 0)
  return np.cumsum(begins, axis=1, dtype=np.int32)
