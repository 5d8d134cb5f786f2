"""Scores of a finished run on held-out text: losses on the splits apart from the one that chose its rate, on repeated
pairs and by place, and the recall of facts."""

import pathlib

from lin_jax.checkpoint import load_model
from lin_jax.config import TrainConfig
from lin_jax.data import TokenDataset, eval_batches
from lin_jax.evaluate import evaluate
from lin_jax.manifests import read_manifest

from .facts import questions, recall
from .positions import losses_by_place
from .repeats import pair_losses


def held_out(workdir: pathlib.Path, config: TrainConfig, by_place: bool = False) -> dict:
  """Evaluates the run in `workdir`, in the windows of its training, on as many batches of each split as it has of val.

  Returns `pair_losses` on split val as `repeats.pair_losses` has them, and `losses`: for the split test and for every
  part of val and test, such as val_code, its `loss` in nats per token, `bits_per_byte` and `tokens`.
  `by_place` adds `places`, the losses on the split test that `positions.losses_by_place` describes, and `facts`, the
  recall of facts of the split recall that `facts.recall` describes.
  """
  model, data = load_model(workdir)[1], config.data
  read = lambda split: eval_batches(data, split, config.eval.batches, vocab_size=config.model.vocab_size)
  losses = {}
  for split in sorted(read_manifest(data.path)["splits"]):
    if split == "test" or split.startswith(("val_", "test_")):
      text = TokenDataset(data.path, split)
      found = evaluate(model, read(split), bytes_per_token=text.bytes_per_token)
      losses[split] = {"loss": found["loss"], "bits_per_byte": found["bits_per_byte"], "tokens": text.tokens}
  places = {}
  if by_place:
    places = {"places": losses_by_place(model, list(read("test"))), "facts": recall(model, questions(data), data)}
  return places | {"pair_losses": pair_losses(model, list(read("val"))), "losses": losses}
