"""Tokenizers: text to token ids and back, each with an end-of-document id and no beginning-of-document id.

`bytes` needs no file; `mistral` reads the SentencePiece model of Mistral-7B-v0.1 (32,000 pieces, the vocabulary of the
GLA and DeltaNet papers). A prepared dataset carries its tokenizer: `load_tokenizer("data/english")` is all that
decoding needs.
"""

import codecs
import json
import pathlib
import re
from collections.abc import Iterable, Iterator
from typing import Protocol

from lin_jax import files

MODEL_FILE = "tokenizer.model"
MANIFEST_FILE = "manifest.json"


class Tokenizer(Protocol):
  """What a dataset, a model and a sampler need to know of a tokenizer."""

  name: str
  vocab_size: int
  eos_id: int
  prefix: str  # what encoding puts before a text, and decoding takes off again

  def encode(self, text: str) -> list[int]:
    """Ids of `text`, without `eos_id`."""

  def decode(self, ids: Iterable[int]) -> str:
    """Text of `ids`; invalid UTF-8 becomes U+FFFD, control ids nothing."""

  def token_bytes(self, token: int) -> bytes:
    """The bytes that `token` stands for; none for control ids."""


class ByteTokenizer:
  """Ids 0..255 are the bytes of UTF-8; 256 ends a document, so `vocab_size` is 257."""

  name = "bytes"
  vocab_size = 257
  eos_id = 256
  prefix = ""

  def encode(self, text: str) -> list[int]:
    return list(text.encode())

  def decode(self, ids: Iterable[int]) -> str:
    return _decode(self, ids)

  def token_bytes(self, token: int) -> bytes:
    return bytes((token,)) if token < self.eos_id else b""


class MistralTokenizer:
  """A SentencePiece BPE model with byte fallback, read from `path`; the ids are those of SentencePiece's own `encode`.

  Encoding splits the text at spaces and newlines, encodes each distinct word once and remembers it. That is exact
  because no piece spans a newline or a space that follows another character, so no merge crosses a split; a model of
  which this is not true is refused with ValueError.
  """

  name = "mistral"
  prefix = " "
  _WORD = re.compile("\n|[ \u2581]*[^ \u2581\n]+|[ \u2581]+")
  _LONGEST_CACHED = 40
  _CACHE_SIZE = 4_000_000

  def __init__(self, path: str | pathlib.Path):
    import sentencepiece

    try:
      model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as e:
      raise ValueError(f"{path}: not a SentencePiece model ({e})") from e
    pieces = [model.id_to_piece(i) for i in range(model.vocab_size())]
    crossing = next((p for p in pieces if re.search("\n|[^\u2581]\u2581", p)), None)
    if crossing is not None or model.encode("\n")[-1:] != [model.piece_to_id("<0x0A>")]:
      raise ValueError(f"{path}: piece {crossing!r}: pieces must not span newlines or word ends, and bytes need ids")
    self._model = model
    self._bytes = [self._piece_bytes(i, piece) for i, piece in enumerate(pieces)]
    # A word is encoded after a newline: alone, it would lose the distinction between " a" and "a".
    newline = model.encode("\n")
    self._prefix = len(newline)
    self._cache = {"\n": (newline[-1],)}
    self.vocab_size = model.vocab_size()
    self.eos_id = model.eos_id()

  def encode(self, text: str) -> list[int]:
    ids, cache = [], self._cache
    if not text:
      return ids
    for word in self._WORD.findall(self.prefix + text):
      known = cache.get(word)
      if known is None:
        known = tuple(self._model.encode("\n" + word)[self._prefix:])
        if len(word) < self._LONGEST_CACHED and len(cache) < self._CACHE_SIZE:
          cache[word] = known
      ids.extend(known)
    return ids

  def decode(self, ids: Iterable[int]) -> str:
    return _decode(self, ids)

  def token_bytes(self, token: int) -> bytes:
    return self._bytes[token]

  def _piece_bytes(self, token, piece):
    if self._model.is_control(token):
      return b""
    if self._model.is_byte(token):
      return bytes((int(piece[3:-1], 16),))
    return piece.replace("\u2581", " ").encode()


def stream_decode(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
  """Yields the text of `ids` as it becomes certain: a character of several ids appears with its last one.

  The joined pieces equal `tokenizer.decode(ids)`.
  """
  decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
  prefix = tokenizer.prefix
  for token in ids:
    text = decoder.decode(tokenizer.token_bytes(int(token)))
    if text:
      text, prefix = text.removeprefix(prefix), ""
    if text:
      yield text
  if text := decoder.decode(b"", final=True):
    yield text


def _decode(tokenizer, ids):
  return "".join(stream_decode(tokenizer, ids))


def load_tokenizer(name_or_path: str | pathlib.Path) -> Tokenizer:
  """The tokenizer called `bytes`, of a SentencePiece `.model` file, or of a prepared dataset directory.

  Raises ValueError when it is none of these, and when the dataset's file is not the one that its manifest describes.
  """
  if str(name_or_path) == ByteTokenizer.name:
    return ByteTokenizer()
  path = pathlib.Path(name_or_path)
  if path.is_file():
    return MistralTokenizer(path)
  try:
    described = json.loads((path / MANIFEST_FILE).read_text(encoding="utf-8"))["tokenizer"]
    name, sha256 = described["name"], described.get("sha256")
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
    raise ValueError(f"tokenizer {str(name_or_path)!r}: must be 'bytes', a .model file, or a dataset directory written "
                     "by experiments/prepare_data.py") from e
  if name == ByteTokenizer.name:
    return ByteTokenizer()
  if name == MistralTokenizer.name:
    if sha256:
      files.require_sha256(path / MODEL_FILE, sha256)
    return MistralTokenizer(path / MODEL_FILE)
  raise ValueError(f"{path / MANIFEST_FILE}: tokenizer {name!r}: known ones are 'bytes' and 'mistral'")
