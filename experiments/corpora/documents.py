"""Reads documents from text, JSON and Parquet files, and from datasets on a hub."""

import glob
import itertools
import os
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

from corpora import files
from corpora.dataset import sha256


class Document(NamedTuple):
  """A text that is never divided between training and evaluation. The manifest counts it under `source`."""

  source: str
  name: str
  text: str


def find(patterns: list[str], kind: str = "") -> dict[str, pathlib.Path]:
  """Finds the files that paths and glob patterns name, by their path relative to the folder common to all.

  Raises ValueError for a pattern that matches no file, and for a file that `files.format_of` cannot tell or refuses.
  """
  paths = set()
  for pattern in patterns:
    found = [path for path in {pattern, *glob.glob(pattern, recursive=True)} if os.path.isfile(path)]
    if not found:
      hint = f"a folder, whose files are {pattern}/*" if os.path.isdir(pattern) else "no such file"
      raise ValueError(f"--input={pattern}: {hint}")
    paths.update(os.path.abspath(path) for path in found)
  # All files are checked first, because a corpus takes hours to read.
  for path in sorted(paths):
    files.format_of(pathlib.Path(path), kind)
  common = os.path.commonpath([os.path.dirname(path) for path in paths])
  return {os.path.relpath(path, common): pathlib.Path(path) for path in sorted(paths)}


def describe(found: dict[str, pathlib.Path]) -> list[dict]:
  """Describes files for a recipe by name and checksum, without anything that depends on place or time."""
  return [dict(client="file", package=name, sha256=sha256(path)) for name, path in found.items()]


def read(found: dict[str, pathlib.Path], skip: int = 0, *, field: str, separator: str,
         kind: str = "") -> Iterator[Document]:
  """Yields documents of files, read as `files.texts` says, in the format `kind` or the one that each name says.

  The first `skip` documents are left out. Raises ValueError with the file, and the line or row, that cannot be read.
  """
  documents = (Document(name, str(i), text) for name, path in found.items() for i, text in enumerate(
      files.texts(path, files.format_of(path, kind), field=field, separator=separator)))
  return itertools.islice(documents, skip, None)


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
    yield Document(name, str(i), files.text_field(row, field, f"{name}: row {i}").removeprefix("\ufeff"))
