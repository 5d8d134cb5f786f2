"""A dataset of a few thousand ids and a model of a few thousand parameters, for tests that train."""

import hashlib
import json
import pathlib

import numpy as np

from lin_jax.config import CheckpointConfig, DataConfig, EvalConfig, LogConfig, ModelConfig, OptimConfig, TrainConfig
from lin_jax.mixers.gla import GLAConfig

VOCAB = 64


def write_dataset(path: pathlib.Path, train_tokens: int = 3000, val_tokens: int = 1200, **others: int) -> pathlib.Path:
  """Documents of noisy counting, which a model learns in a few steps; an epoch is less than six batches of 8 x 64.

  `others` are the tokens of further splits by their names.
  """
  path.mkdir(parents=True)
  random = np.random.default_rng(0)
  splits = {}
  for split, size in {"train": train_tokens, "val": val_tokens, **others}.items():
    steps = random.choice([1, 1, 1, 5], size)
    ids = (np.cumsum(steps) % VOCAB).astype("<u2")
    starts = np.arange(0, size, 150, dtype=np.uint64)
    ids.tofile(path / f"{split}-00000.bin")
    np.save(path / f"{split}.idx.npy", starts)
    shard = {"file": f"{split}-00000.bin", "tokens": size, "max_id": int(ids.max()),
             "sha256": _sha256(path / f"{split}-00000.bin")}
    splits[split] = {"tokens": size, "documents": len(starts), "bytes": 2 * size, "shards": [shard],
                     "index": {"file": f"{split}.idx.npy", "sha256": _sha256(path / f"{split}.idx.npy")}}
  manifest = {"format": "lin_jax.tokens", "version": 1, "dtype": "<u2", "splits": splits,
              "tokenizer": {"name": "bytes", "vocab_size": VOCAB, "sha256": None}}
  (path / "manifest.json").write_text(json.dumps(manifest))
  return path


def _sha256(file):
  return hashlib.sha256(file.read_bytes()).hexdigest()


def config(data: pathlib.Path | str, **optim) -> TrainConfig:
  """Twelve steps of a two-layer float32 GLA model; `optim` sets fields of `OptimConfig`."""
  mixer = GLAConfig(heads=2, gate_rank=4, implementation="xla_chunked")  # the tests' compiler makes the scan slow
  return TrainConfig(
      name="tiny",
      model=ModelConfig(mixer=mixer, vocab_size=VOCAB, width=32, depth=2, mlp_width=64, dtype="float32"),
      data=DataConfig(path=str(data), sequence_length=64, batch_size=8, worker_threads=1),
      optim=OptimConfig(**dict(steps=12, warmup_steps=2, learning_rate=1e-2, final_learning_rate=1e-3) | optim),
      eval=EvalConfig(every=4, batches=2),
      checkpoint=CheckpointConfig(every=4, keep_last=2, keep_best=1),
      log=LogConfig(every=1, tensorboard=False),
  )
