"""Reads files as texts, by the format and the compression that their names say.

A name ends with its format and perhaps with a compression, as in `web.jsonl.zst`. Nothing counts as text by default: an
ending that is not listed here is refused unless the caller names the format. Content that contradicts the name is
refused too. Text is UTF-8.
"""

import bz2
import gzip
import io
import json
import lzma
import pathlib
import re
import zlib
from collections.abc import Iterator

import pyarrow
import pyarrow.parquet

FORMATS = {
    "text": ".txt .text .md .markdown .rst .tex .py .c .h .cc .cpp .java .js .ts .go .rs .jl .r .sh .lua .el".split(),
    "jsonl": [".jsonl", ".ndjson", ".jsonlines"],
    "json": [".json"],  # an array of rows, one row, or JSON Lines, because many corpora name them so
    "parquet": [".parquet", ".pq"],
    "messages": [],  # JSON Lines of conversations, which must be named
}
_COMPRESSIONS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open,
                 ".zst": lambda path: io.BufferedReader(pyarrow.CompressedInputStream(str(path), "zstd"))}
_MAGIC = {
    ".gz": rb"\x1f\x8b", ".bz2": rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", ".xz": rb"\xfd7zXZ\x00",
    ".zst": rb"\x28\xb5\x2f\xfd", "lz4": rb"\x04\x22\x4d\x18", "zip": rb"PK\x03\x04", "7z": rb"7z\xbc\xaf",
    "Parquet": rb"PAR1", "Arrow": rb"ARROW1\x00\x00", "PDF": rb"%PDF-",
    "UTF-32": rb"\xff\xfe\x00\x00|\x00\x00\xfe\xff", "UTF-16": rb"\xff\xfe|\xfe\xff",
}
_BOM = "\ufeff"
_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError, pyarrow.ArrowException)


def format_of(path: pathlib.Path, named: str = "") -> str:
  """Returns the format of a file, which is `named` or what its name says.

  Raises ValueError when neither gives a format, or when the content has another format or compression.
  """
  stem, compression = _split(path)
  suffix = pathlib.PurePath(stem).suffix
  kind = named or next((kind for kind, suffixes in FORMATS.items() if suffix in suffixes), "")
  if not kind:
    raise ValueError(f"{path}: {f'the ending {suffix!r}' if suffix else 'a name without an ending'} does not say how "
                     f"to read it: --format must name one of {', '.join(FORMATS)}")
  head = _head(path)
  if kind == "parquet":
    if compression:
      raise ValueError(f"{path}: Parquet files are compressed inside: unpack the {compression} first")
    if not re.match(_MAGIC["Parquet"], head):
      raise ValueError(f"{path}: not a Parquet file")
    return kind
  if compression and head and not re.match(_MAGIC[compression], head):
    raise ValueError(f"{path}: not readable (the content is not {compression})")
  _require_text(path, _head(path, compression) if compression else head)
  return kind


def texts(path: pathlib.Path, kind: str, *, field: str, separator: str) -> Iterator[str]:
  """Yields the texts of a file of the format `kind`, in their order.

  For `text` that is the whole file, or its parts between `separator` if one is given. For the other formats it is the
  string under `field` of each row, and for `messages` the JSON of each row's list under "messages". A byte order mark
  at the start of a text is left out. Raises ValueError with the file, and the line or row, that cannot be read so.
  """
  if kind == "text":
    found = _text(path, separator)
  elif kind == "messages":
    found = (_messages(row, where) for where, row in _json_lines(path))
  else:
    rows = {"jsonl": _json_lines, "json": _json, "parquet": lambda path: _parquet(path, field)}[kind](path)
    found = (text_field(row, field, where) for where, row in rows)
  return (text.removeprefix(_BOM) for text in found)


def text_field(row: dict, field: str, where: str) -> str:
  """Returns the string under `field`. Raises a ValueError that begins with `where` when there is none."""
  text = row.get(field) if isinstance(row, dict) else None
  if not isinstance(text, str):
    raise ValueError(f"{where} has no string under {field!r}, which --text_field names")
  # JSON can spell surrogates that no UTF-8 text holds.
  return text.encode("utf-8", "replace").decode()


def _messages(row, where):
  messages = row.get("messages") if isinstance(row, dict) else None
  if not isinstance(messages, list):
    raise ValueError(f"{where} has no list under 'messages', as --format=messages reads it")
  return json.dumps(messages)


def _split(path):
  name = path.name.lower()
  compression = next((suffix for suffix in _COMPRESSIONS if name.endswith(suffix)), "")
  return name.removesuffix(compression), compression


def _require_text(path, head):
  """Raises ValueError when a file that begins with `head` is no UTF-8 text for a reason that can be named."""
  found = next((name for name, magic in _MAGIC.items() if re.match(magic, head)), None)
  # In UTF-16 without a mark, every second byte of Latin letters is zero.
  if found is None and head.count(0) > len(head) // 4:
    found = "UTF-16"
  if found:
    hint = f"name it so ({path.name}{found})" if found in _COMPRESSIONS else "convert it to UTF-8 text"
    raise ValueError(f"{path}: holds {found} data, not what its name or --format says: {hint}")


def _head(path, compression=""):
  try:
    with _COMPRESSIONS[compression](path) if compression else open(path, "rb") as file:
      return file.read(1000)
  except _ERRORS as e:
    raise ValueError(f"{path}: not readable ({e})") from e


def _lines(path):
  if not path.stat().st_size:
    return
  compression = _split(path)[1]
  try:
    with _COMPRESSIONS[compression](path) if compression else open(path, "rb") as file:
      yield from file
  except _ERRORS as e:
    raise ValueError(f"{path}: not readable ({e})") from e


def _text(path, separator):
  content = b"".join(_lines(path))
  try:
    text = content.decode()
  except UnicodeDecodeError as e:
    raise ValueError(f"{path}: byte {e.start} is not UTF-8: text files must be") from e
  return text.split(separator) if separator else [text]


def _json_lines(path):
  for number, line in enumerate(_lines(path), 1):
    if line.strip():
      yield f"{path}: line {number}", _parse(line, f"{path}: line {number} is not JSON")


def _json(path):
  """Yields the rows of a file whose first line is a row, the rows of an array, or the one row that is the file."""
  first = next((line for line in _lines(path) if line.strip()), b"")
  try:
    is_lines = isinstance(_parse(first, ""), dict)
  except ValueError:
    is_lines = False
  if is_lines or not first:
    yield from _json_lines(path)
    return
  value = _parse(b"".join(_lines(path)), f"{path}: neither JSON Lines nor one JSON value")
  rows = value if isinstance(value, list) else [value]
  yield from ((f"{path}: row {number}", row) for number, row in enumerate(rows))


def _parse(content, message):
  try:
    # Files that were joined leave their byte order marks before later lines.
    return json.loads(content.decode().removeprefix(_BOM))
  except (ValueError, RecursionError) as e:
    raise ValueError(f"{message} ({e})") from e


def _parquet(path, field):
  try:
    file = pyarrow.parquet.ParquetFile(path)
    names = file.schema_arrow.names
    if field not in names:
      raise ValueError(f"{path}: no column {field!r}: --text_field must be one of {', '.join(names)}")
    number = 0
    # Rows are read in batches, because whole row groups of web corpora hold gigabytes.
    for batch in file.iter_batches(batch_size=1024, columns=[field]):
      for text in batch.column(0).to_pylist():
        yield f"{path}: row {number}", {field: text}
        number += 1
  except (pyarrow.ArrowException, OSError) as e:
    raise ValueError(f"{path}: not a Parquet file that can be read ({e})") from e
