"""Evaluates a trained model on held-out text: perplexity and bits per byte, over all tokens and by position.

  python experiments/evaluate.py --workdir=runs/gla_tiny
  python experiments/evaluate.py --workdir=runs/gla_small --sequence_length=1024,4096,16384 --piece=2048 \
      --bucket_width=1024 --noreset_at_documents
"""

import dataclasses
import pathlib

from absl import flags

from lin_jax import files, strict_json
from lin_jax.checkpoint import load_model
from lin_jax.data import TokenDataset, eval_batches
from lin_jax.evaluate import evaluate
from running import commands, meshes, records

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of a training run.", required=True)
_CHECKPOINT = commands.define_checkpoint()
_MESH = meshes.define()
_DATA = flags.DEFINE_string("data", "", "Dataset directory; by default the run's own.")
_SPLIT = flags.DEFINE_string("split", "val", "Split of the dataset.")
_BATCHES = flags.DEFINE_integer("batches", 0, "Batches to evaluate, spread evenly over the split; 0 is the whole "
                                "split.", lower_bound=0)
_LENGTHS = flags.DEFINE_list("sequence_length", [], "Tokens per window. Several lengths, as in 512,1024, are "
                             "evaluated one after the other; by default the length of training.")
_PIECE = flags.DEFINE_integer("piece", 0, "Tokens per forward pass. Each pass starts from the state of the one before, "
                              "so windows may be longer than memory allows in one pass. 0 is the whole window.",
                              lower_bound=0)
_RESET = flags.DEFINE_bool("reset_at_documents", None, "Hides earlier documents of a window; by default as in "
                           "training.")
_BUCKET = flags.DEFINE_integer("bucket_width", 0, "Positions per row of the table; 0 doubles them from row to row.")


def main(_):
  workdir = pathlib.Path(_WORKDIR.value)
  for text in _LENGTHS.value:
    if not text.isdecimal() or not int(text):
      raise ValueError(f"--sequence_length={text}: must be a positive number, or several: 512,1024")
  with meshes.using(_MESH.value) as mesh:
    config, model = load_model(workdir, commands.checkpoint_step(_CHECKPOINT.value), mesh)
    for length in map(int, _LENGTHS.value or [config.data.sequence_length]):
      _evaluate(workdir, config, model, length)


def _evaluate(workdir, config, model, length):
  data = config.data
  # As many tokens per batch as an accumulation step of the training run had, because that is known to fit.
  rows = max(1, data.batch_size // config.optim.accumulation * data.sequence_length // length)
  data = dataclasses.replace(data, path=_DATA.value or data.path, sequence_length=length, batch_size=rows,
                             reset_at_documents=data.reset_at_documents if _RESET.value is None else _RESET.value)
  split = TokenDataset(data.path, _SPLIT.value, vocab_size=config.model.vocab_size)
  batches = eval_batches(data, _SPLIT.value, _BATCHES.value, vocab_size=config.model.vocab_size)
  result = evaluate(model, batches, bytes_per_token=split.bytes_per_token, bucket_width=_BUCKET.value,
                    piece=min(_PIECE.value, length))

  print(f"{'position':>15} {'targets':>12} {'loss':>8} {'perplexity':>11}")
  for row in result["buckets"]:
    print(_line(f"{row['start']}-{row['stop'] - 1}", row))
  print(_line("all", result), f"   {result['bits_per_byte']:.4f} bits per byte")
  path = workdir / f"evaluation_{_SPLIT.value}_{length}.json"
  record = {"run": records.now(), **records.provenance(), "model": config.name, "seed": config.seed,
            "trained_length": config.data.sequence_length, "data": data.path, "split": _SPLIT.value,
            "checkpoint": _CHECKPOINT.value, "sequence_length": length, "piece": _PIECE.value,
            "reset_at_documents": data.reset_at_documents, **result}
  files.write(path, strict_json.dumps(record, indent=2) + "\n")
  print(f"written to {path}")


def _line(name, row):
  return f"{name:>15} {row['targets']:>12,} {row['loss']:>8.4f} {row['perplexity']:>11.3f}"


if __name__ == "__main__":
  commands.run(main, cached=True)
