"""Tokenizes a stream of documents, assigns each document to a split, and writes them with checkpoints."""

import hashlib
import pathlib
import shutil
from collections.abc import Callable, Iterable

import numpy as np

from corpora import fetch
from corpora.conversations import encoder
from corpora.dataset import SHARD_TOKENS, DatasetWriter, begin
from corpora.documents import Document
from corpora.progress import Progress
from lin_jax.manifests import dtype_for
from lin_jax.tokenizer import ByteTokenizer, MistralTokenizer, Tokenizer, describe_tokenizer, load_tokenizer

CHECKPOINT_TOKENS = 2**24


def find_tokenizer(name: str, cache: pathlib.Path, **settings: str) -> Tokenizer:
  """Returns the tokenizer `mistral` (fetched into `cache`), or the one that `load_tokenizer` finds under `name`.

  Raises ValueError as `load_tokenizer` does.
  """
  path = fetch.mistral_tokenizer(cache) if name == MistralTokenizer.name else pathlib.Path(name)
  if name != ByteTokenizer.name and not path.exists():
    raise ValueError(f"--tokenizer={name}: must be 'bytes', 'mistral', a SentencePiece .model file, or a "
                     "tokenizer.json or its folder")
  return load_tokenizer(path, **settings)


def hash_split(seed: int, val_fraction: float, test_fraction: float) -> Callable[[Document], str]:
  """Assigns splits by a hash of the text, so that equal documents meet in one split wherever they come from."""
  if min(val_fraction, test_fraction) < 0 or val_fraction + test_fraction >= 1:
    raise ValueError(f"--val_fraction={val_fraction} --test_fraction={test_fraction}: must not be negative and must "
                     "leave a part to train on")

  def split_of(document):
    digest = hashlib.blake2b(document.text.encode(), digest_size=8, salt=seed.to_bytes(8, "little")).digest()
    position = int.from_bytes(digest, "little") / 2**64
    return "val" if position < val_fraction else "test" if position < val_fraction + test_fraction else "train"

  return split_of


def prepare(out: pathlib.Path, documents: Callable[[int], Iterable[Document]], split_of: Callable[[Document], str], *,
            splits: list[str], recipe: dict, tokenizer: Tokenizer, conversations: bool = False, limit: int = 0,
            shard_tokens: int = SHARD_TOKENS, checkpoint_tokens: int = CHECKPOINT_TOKENS) -> bool:
  """Writes the dataset `out` from documents in their order, and returns whether there was anything to do.

  `documents(n)` yields all but the first n. `recipe` determines the bytes: an existing `out` of the same recipe stays
  as it is, and an interrupted one is continued. A positive `limit` ends the stream with the document that brings the
  tokens of all splits to that number. The recipe's "sources" become the manifest's, with counts of the documents that
  name their "package". With `conversations` the texts are read as `conversations.encoder` says, and the dataset has
  masks. Raises ValueError when `out` has another recipe, or a split stays empty.
  """
  dtype, encode = dtype_for(tokenizer.vocab_size), (encoder if conversations else _plain_encoder)(tokenizer)
  if limit:
    recipe = recipe | dict(limit=limit)
  recipe = recipe | dict(tokenizer=describe_tokenizer(tokenizer))
  work = begin(out, recipe)
  if work is None:
    return False
  with DatasetWriter(work, splits, shard_tokens=shard_tokens, dtype=dtype, masked=conversations) as writer:
    try:
      number, counts = _write(writer, documents, split_of, encode, limit, checkpoint_tokens)
      empty = [split for split, tokens in writer.totals().items() if not tokens]
      if empty:
        raise ValueError(f"split {empty[0]!r} would be empty: it got none of the {number} documents; give more "
                         "documents, or a larger (or zero) fraction for it")
    except ValueError:
      # A user who mends bad input has another input, so the work is kept only if a checkpoint has progress.
      if not writer.done:
        shutil.rmtree(work)
      raise
    sources = [source | counts.get(source["package"], {}) for source in recipe["sources"]]
    writer.finish(out, tokenizer=tokenizer, recipe=recipe, manifest=dict(sources=sources))
  return True


def _plain_encoder(tokenizer):
  def encode(text):
    ids = np.array([*tokenizer.begin_ids, *tokenizer.encode(text), tokenizer.eos_id])
    return ids, len(tokenizer.normalized(text).encode())

  return encode


def _write(writer, documents, split_of, encode, limit, checkpoint_tokens):
  counts, progress = writer.notes, Progress("tokenize: documents")
  total = saved = sum(writer.totals().values())
  number = writer.done
  for document in documents(writer.done):
    if limit and total >= limit:
      break
    number += 1
    if not document.text.strip():
      continue
    try:
      ids, size, *answers = encode(document.text)
    except ValueError as e:
      raise ValueError(f"{document.source}: document {document.name}: {e}") from e
    writer.add(split_of(document), ids, size, *answers)
    count = counts.setdefault(document.source, dict(documents=0, bytes=0, tokens=0))
    for key, amount in (("documents", 1), ("bytes", size), ("tokens", len(ids))):
      count[key] += amount
    total += len(ids)
    if total - saved >= checkpoint_tokens:
      writer.checkpoint(number, counts)
      saved = total
    progress.update(number, f"{total / 1e6:.1f} M tokens")
  progress.close(number, f"{total / 1e6:.1f} M tokens")
  return number, counts
