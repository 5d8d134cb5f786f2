"""A dataset of documents of bytes, and what reads it."""

import types

import numpy as np

from corpora import dataset
from lin_jax.config import DataConfig
from lin_jax.manifests import dtype_for


def write(path, documents, shard_tokens=100, vocab_size=257, masks=None):
  """A dataset of `documents`, byte arrays, in shards short enough that windows cross them.

  `masks` has for each document which of its ids, the end id among them, belong to answers.
  """
  work = dataset.begin(path, {"documents": len(documents)})
  writer = dataset.DatasetWriter(work, ["train"], shard_tokens=shard_tokens, dtype=dtype_for(vocab_size),
                                 masked=masks is not None)
  for ids, *mask in zip(documents, *[masks] * (masks is not None), strict=True):
    writer.add("train", np.append(ids, 256), len(ids), *mask, *(int(m[:-1].sum()) for m in mask))
  tokenizer = types.SimpleNamespace(name="bytes", vocab_size=vocab_size, eos_id=256, files=dict)
  writer.finish(path, tokenizer=tokenizer, recipe={}, manifest={})
  return path


def make_documents(lengths, seed=0):
  random = np.random.default_rng(seed)
  return [random.integers(0, 256, length) for length in lengths]


def make_masks(documents, seed=1):
  random = np.random.default_rng(seed)
  return [random.random(len(ids) + 1) < 0.4 for ids in documents]


LENGTHS = [5, 0, 0, 31, 32, 150, 1, 64, 7, 90, 3]


def config(path, **options):
  return DataConfig(path=str(path), **{"sequence_length": 16, "batch_size": 4, "worker_threads": 0, **options})
