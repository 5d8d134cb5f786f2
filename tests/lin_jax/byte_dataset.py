"""A dataset of documents of bytes, and what reads it."""

import types

import numpy as np

from corpora import dataset
from lin_jax.config import DataConfig


def write(path, documents, shard_tokens=100, vocab_size=257):
  """A dataset of `documents`, byte arrays, in shards short enough that windows cross them."""
  work = dataset.begin(path, {"documents": len(documents)})
  writer = dataset.DatasetWriter(work, ["train"], shard_tokens=shard_tokens)
  for ids in documents:
    writer.add("train", np.append(ids, 256), len(ids))
  tokenizer = types.SimpleNamespace(name="bytes", vocab_size=vocab_size, eos_id=256)
  writer.finish(path, tokenizer=tokenizer, tokenizer_file=None, recipe={}, manifest={})
  return path


def make_documents(lengths, seed=0):
  random = np.random.default_rng(seed)
  return [random.integers(0, 256, length) for length in lengths]


LENGTHS = [5, 0, 0, 31, 32, 150, 1, 64, 7, 90, 3]


def config(path, **options):
  return DataConfig(path=str(path), **{"sequence_length": 16, "batch_size": 4, "worker_threads": 0, **options})
