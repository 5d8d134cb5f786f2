"""Documents out of text, JSONL and Parquet files, and out of datasets on a hub."""

import glob
import gzip
import itertools
import json
import os
import pathlib
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from corpora.dataset import sha256


class Document(NamedTuple):
  """A text that is never split between training and evaluation. `source` is what the manifest counts it under."""

  source: str
  name: str
  text: str


def find(patterns: list[str]) -> dict[str, pathlib.Path]:
  """The files that paths and glob patterns name, by their path relative to the folder common to all.

  Raises ValueError for a pattern that matches no file.
  """
  paths = set()
  for pattern in patterns:
    found = [path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path)]
    if not found:
      raise ValueError(f"--input={pattern}: no such file")
    paths.update(os.path.abspath(path) for path in found)
  common = os.path.commonpath([os.path.dirname(path) for path in paths])
  return {os.path.relpath(path, common): pathlib.Path(path) for path in sorted(paths)}


def describe(files: dict[str, pathlib.Path]) -> list[dict]:
  """What a recipe says of its files: name and checksum, nothing that depends on where or when."""
  return [dict(client="file", package=name, sha256=sha256(path)) for name, path in files.items()]


def read(files: dict[str, pathlib.Path], skip: int = 0, *, field: str, separator: str) -> Iterator[Document]:
  """Documents of `.jsonl` (the string under `field` of each line), `.parquet` (column `field`) and other files.

  Those are UTF-8 text: one document each, or cut at `separator` where one is given. `.gz` of JSONL and text is
  unpacked on the way. The first `skip` documents are left out. Raises ValueError naming the file, and the line or row,
  that cannot be read so.
  """
  return itertools.islice(_read(files, field, separator), skip, None)


def _read(files, field, separator):
  for name, path in files.items():
    kind = name.removesuffix(".gz")
    if kind.endswith(".parquet"):
      texts = _parquet(path, field)
    elif kind.endswith((".jsonl", ".ndjson")):
      texts = _jsonl(path, field)
    else:
      texts = _text(path, separator)
    for i, text in enumerate(texts):
      yield Document(name, str(i), text)


def hub(name: str, skip: int = 0, *, split: str, revision: str, field: str) -> Iterator[Document]:
  """Streams a dataset of the Hugging Face hub, or a local folder that its library reads, from row `skip` on.

  Raises ValueError when the library is not installed, or a row has no string under `field`.
  """
  try:
    import datasets
  except ImportError as e:
    raise ValueError("--hf_dataset needs the package datasets: pip install 'lin-jax[hub]'") from e
  rows = datasets.load_dataset(name, split=split, revision=revision or None, streaming=True)
  for i, row in enumerate(rows.skip(skip), skip):
    yield Document(name, str(i), _field(row, field, f"{name}: row {i}"))


def _text(path, separator):
  content = b"".join(_lines(path))
  try:
    text = content.decode()
  except UnicodeDecodeError as e:
    raise ValueError(f"{path}: byte {e.start} is not UTF-8: text files must be") from e
  return text.split(separator) if separator else [text]


def _jsonl(path, field):
  for number, line in enumerate(_lines(path), 1):
    if line.strip():
      try:
        row = json.loads(line)
      except ValueError as e:
        raise ValueError(f"{path}: line {number} is not JSON ({e})") from e
      yield _field(row, field, f"{path}: line {number}")


def _lines(path):
  try:
    with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as f:
      yield from f
  except (OSError, EOFError, zlib.error) as e:
    raise ValueError(f"{path}: not readable ({e})") from e


def _parquet(path, field):
  import pyarrow
  import pyarrow.parquet

  try:
    file = pyarrow.parquet.ParquetFile(path)
  except pyarrow.ArrowException as e:
    raise ValueError(f"{path}: not a Parquet file ({e})") from e
  names = file.schema_arrow.names
  if field not in names:
    raise ValueError(f"{path}: no column {field!r}: --text_field must be one of {', '.join(names)}")
  # Batches, not whole row groups: those of web corpora hold gigabytes.
  number = 0
  for batch in file.iter_batches(batch_size=1024, columns=[field]):
    for text in batch.column(0).to_pylist():
      yield _field({field: text}, field, f"{path}: row {number}")
      number += 1


def _field(row, field, where):
  text = row.get(field) if isinstance(row, dict) else None
  if not isinstance(text, str):
    raise ValueError(f"{where} has no string under {field!r}, which --text_field names")
  # JSON can spell surrogates that no UTF-8 text holds.
  return text.encode("utf-8", "replace").decode()
