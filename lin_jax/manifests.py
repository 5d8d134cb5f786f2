"""The manifest of a dataset directory (see `lin_jax.data`): counts and checksums of every file.

It needs the standard library alone, because unpacking a dataset must run where nothing else is installed.
"""

import hashlib
import json
import pathlib
from collections.abc import Iterator

from lin_jax import files
from lin_jax.tokenizer import MANIFEST_FILE, carried_files

FORMAT = "lin_jax.tokens"
VERSION = 1
MASKED_VERSION = 2  # of datasets with masks: a reader of version 1 would ignore them, and train on every token
DTYPES = "<u2", "<u4"  # of ids


def dtype_for(vocab_size: int) -> str:
  """The dtype of the shards' ids: uint16 if all ids of the vocabulary fit, and otherwise uint32.

  Raises ValueError for a vocabulary whose ids do not fit the int32 of batches.
  """
  if vocab_size > 2**31:
    raise ValueError(f"vocabulary of {vocab_size}: ids must be less than 2^31")
  return "<u2" if vocab_size <= 2**16 else "<u4"


def read_manifest(path: str | pathlib.Path) -> dict:
  """The manifest of a dataset directory. Raises ValueError if it is missing or of another format."""
  path = pathlib.Path(path)
  if not path.is_dir():
    raise ValueError(f"data path {str(path)!r}: no such directory; experiments/prepare_data.py makes one")
  file = path / MANIFEST_FILE
  try:
    manifest = json.loads(file.read_text(encoding="utf-8"))
  except FileNotFoundError as e:
    raise ValueError(f"{path}: no {MANIFEST_FILE}: not a directory written by experiments/prepare_data.py") from e
  except (OSError, ValueError, RecursionError) as e:
    raise ValueError(f"{file}: not readable as JSON ({e})") from e
  if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
    raise ValueError(f"{file}: must be a manifest of format {FORMAT!r}")
  for key, known in (("version", (VERSION, MASKED_VERSION)), ("dtype", DTYPES)):
    if manifest.get(key) not in known:
      raise ValueError(f"{file}: {key} {manifest.get(key)!r}: this version of lin_jax reads "
                       f"{' and '.join(map(repr, known))}")
  return manifest


def split_files(entry: dict) -> Iterator[dict]:
  """The files of a split's manifest entry, each with `file` and `sha256`: the index, the shards and their masks."""
  yield entry["index"]
  for shard in entry["shards"]:
    yield shard
    if "answers" in entry:
      yield shard["mask"]


def describe(path: str | pathlib.Path) -> dict:
  """The record that a run keeps of its dataset: `path`, `train_tokens` and `sha256`.

  The hash covers the manifest's entries for everything that training and its evaluation read: the splits train and val
  with their checksums and counts, and the tokenizer. Raises ValueError.
  """
  manifest = read_manifest(path)
  try:
    splits = {name: manifest["splits"][name] for name in ("train", "val") if name in manifest["splits"]}
    digest = hashlib.sha256(json.dumps([splits, manifest["tokenizer"]], sort_keys=True).encode()).hexdigest()
    return {"path": str(path), "sha256": digest, "train_tokens": splits["train"]["tokens"] if "train" in splits else 0}
  except (KeyError, TypeError, AttributeError) as e:
    raise ValueError(f"{pathlib.Path(path) / MANIFEST_FILE}: incomplete or malformed: {e!r}") from e


def verify(path: str | pathlib.Path) -> int:
  """Compares every file of a dataset with its manifest, and returns the number of bytes read. Raises ValueError that
  names all files that differ."""
  path, faults, size = pathlib.Path(path), [], 0
  manifest = read_manifest(path)
  try:
    parts = [part for entry in manifest["splits"].values() for part in split_files(entry)]
    expected = {path / part["file"]: part["sha256"] for part in parts}
    expected |= {path / file: sha256 for file, sha256 in carried_files(manifest["tokenizer"]).items()}
  except (KeyError, TypeError, AttributeError) as e:
    raise ValueError(f"{path / MANIFEST_FILE}: incomplete or malformed: {e!r}") from e
  for file, sha256 in expected.items():
    try:
      files.require_sha256(file, sha256)
      size += file.stat().st_size
    except ValueError as e:
      faults.append(str(e))
  if faults:
    raise ValueError("; ".join(faults))
  return size


def require_size(file: pathlib.Path, expected: int) -> None:
  """Raises ValueError if the file cannot be read or does not have `expected` bytes."""
  try:
    size = file.stat().st_size
  except OSError as e:
    raise ValueError(f"{file}: named in the manifest, but not readable ({e.strerror})") from e
  if size != expected:
    raise ValueError(f"{file}: {size} bytes: the manifest says {expected}, so the file is truncated or was changed")
