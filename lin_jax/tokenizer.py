"""Tokenizers: text to token ids and back, each with an end-of-document id, which closes every document.

`bytes` needs no file. `mistral` reads a SentencePiece model, such as Mistral-7B-v0.1's (32,000 pieces, the vocabulary
of the GLA and DeltaNet papers). `fast` reads a `tokenizer.json` (`lin_jax.fast_tokenizer`). A prepared dataset carries
its tokenizer, so `load_tokenizer("data/english")` is enough for decoding.

Encoding keeps every text, except for U+2581, which SentencePiece takes for a space, and for what `normalized` says.
That matters because bits per byte count the bytes of the text, and would be too low if some of it were dropped or
became the unknown token.
"""

import codecs
import hashlib
import pathlib
import re
from collections.abc import Iterable, Iterator
from typing import Protocol

from lin_jax import files
from lin_jax.typed_json import read_object

MODEL_FILE = "tokenizer.model"
MANIFEST_FILE = "manifest.json"


class Tokenizer(Protocol):
  """The interface of a tokenizer that a dataset, a model and a sampler need."""

  name: str
  vocab_size: int
  eos_id: int
  begin_ids: tuple[int, ...]  # every document begins with them, and encoding leaves them out
  prefix: str  # encoding puts it before a text, and decoding removes it
  decoding_errors: str  # the name of a handler of `codecs`, for bytes that are not UTF-8

  def encode(self, text: str) -> list[int]:
    """Ids of `text`, without `begin_ids` and `eos_id`."""

  def decode(self, ids: Iterable[int]) -> str:
    """Text of `ids`. Invalid UTF-8 becomes U+FFFD, and control ids give nothing. Raises ValueError as `token_bytes`."""

  def token_bytes(self, token: int, *, first: bool = False) -> bytes:
    """The bytes of `token`, without the prefix if it is the `first` of a text. Control ids have none.

    Raises ValueError for an id that the tokenizer does not have.
    """

  def normalized(self, text: str) -> str:
    """The text that is encoded in the place of `text`. Its bytes are counted."""

  def files(self) -> dict[str, bytes]:
    """The files by name with which a dataset carries the tokenizer."""


class ByteTokenizer:
  """Ids 0..255 are the bytes of UTF-8, and 256 ends a document, so `vocab_size` is 257."""

  name = "bytes"
  vocab_size = 257
  eos_id = 256
  begin_ids = ()
  prefix = ""
  decoding_errors = "replace"

  def encode(self, text: str) -> list[int]:
    return list(require_utf8(text))

  def decode(self, ids: Iterable[int]) -> str:
    return decode(self, ids)

  def token_bytes(self, token: int, *, first: bool = False) -> bytes:
    require_id(self, token)
    return bytes((token,)) if token < self.eos_id else b""

  def normalized(self, text: str) -> str:
    return text

  def files(self) -> dict[str, bytes]:
    return {}


class MistralTokenizer:
  """A SentencePiece model with byte fallback, read from `path`. Its ids and texts are those that SentencePiece gives.

  Encoding is faster for a BPE model whose pieces span no newline and no space that follows another character. The text
  is then split at these places, and each distinct word is encoded once and remembered. The result is exact, because no
  merge crosses a split. Raises ValueError for a file that is not such a model, and for a model without an end id or
  with an option that makes encoding lose a part of some texts.
  """

  name = "mistral"
  begin_ids = ()  # although such models may have a begin id
  decoding_errors = "lin_jax.replace_each_byte"
  _WORD = re.compile("\n|[ \u2581]*[^ \u2581\n]+|[ \u2581]+")
  _LONGEST_CACHED = 40
  _CACHE_SIZE = 4_000_000

  def __init__(self, path: str | pathlib.Path):
    self._model, options, self._content = _read_sentencepiece(pathlib.Path(path))
    self.vocab_size = self._model.vocab_size()
    self.eos_id = self._model.eos_id()
    self.prefix = " " if options.normalizer_spec.add_dummy_prefix else ""
    self._bytes = [self._piece_bytes(i, piece.piece, options) for i, piece in enumerate(options.pieces)]
    self._prefixed = {i for i, piece in enumerate(options.pieces)
                      if self.prefix and piece.piece.startswith("\u2581") and not self._model.is_unknown(i)}
    # A word is encoded after a newline, because alone it would lose the distinction between " a" and "a".
    newline = self._model.encode("\n")
    self._cache = {"\n": (newline[-1],)}
    self._newline_ids = len(newline) if _splits_at_words(options, newline[-1]) else 0

  def encode(self, text: str) -> list[int]:
    require_utf8(text)
    if not self._newline_ids:
      return self._model.encode(text)
    ids, cache = [], self._cache
    if not text:
      return ids
    for word in self._WORD.findall(self.prefix + text):
      known = cache.get(word)
      if known is None:
        known = tuple(self._model.encode("\n" + word)[self._newline_ids:])
        if len(word) < self._LONGEST_CACHED and len(cache) < self._CACHE_SIZE:
          cache[word] = known
      ids.extend(known)
    return ids

  def decode(self, ids: Iterable[int]) -> str:
    return decode(self, ids)

  def token_bytes(self, token: int, *, first: bool = False) -> bytes:
    require_id(self, token)
    return self._bytes[token][len(self.prefix):] if first and token in self._prefixed else self._bytes[token]

  def normalized(self, text: str) -> str:
    return text

  def files(self) -> dict[str, bytes]:
    return {MODEL_FILE: self._content}

  def _piece_bytes(self, token, piece, options):
    if self._model.is_control(token):
      return b""
    if self._model.is_byte(token):
      return bytes((int(piece[3:-1], 16),))
    if self._model.is_unknown(token):
      return options.trainer_spec.unk_surface.encode()
    return piece.replace("\u2581", " ").encode()


def _read_sentencepiece(path):
  """A file's model, the message that describes it, and its bytes. Raises ValueError as `MistralTokenizer` does."""
  import sentencepiece
  from google.protobuf.message import DecodeError
  from sentencepiece import sentencepiece_model_pb2

  options = sentencepiece_model_pb2.ModelProto()
  try:
    content = path.read_bytes()
    options.ParseFromString(content)
    texts = [piece.piece for piece in options.pieces] + [options.trainer_spec.unk_surface]
    if len(texts) < 2 or not all(isinstance(text, str) for text in texts):
      raise ValueError("it has no pieces, or one that is no text")
    model = sentencepiece.SentencePieceProcessor(model_proto=content)
  except (OSError, RuntimeError, ValueError, DecodeError) as e:
    raise ValueError(f"{path}: not a SentencePiece model ({' '.join(str(e).split())})") from e
  trainer, normalizer = options.trainer_spec, options.normalizer_spec
  kind = sentencepiece_model_pb2.TrainerSpec.ModelType.Name(trainer.model_type).lower()
  spelled = {piece.piece for piece in options.pieces if piece.type == piece.BYTE}
  rewriting = (normalizer.name or "custom") if normalizer.precompiled_charsmap else "identity"
  for option, value, served in (
      ("model_type", kind, ("bpe", "unigram", "char")),
      ("byte_fallback", trainer.byte_fallback and spelled == {f"<0x{i:02X}>" for i in range(256)}, (True,)),
      ("normalization_rule_name", rewriting, ("identity",)),
      ("denormalization", bool(options.denormalizer_spec.precompiled_charsmap), (False,)),
      ("remove_extra_whitespaces", normalizer.remove_extra_whitespaces, (False,)),
      ("escape_whitespaces", normalizer.escape_whitespaces, (True,)),
      ("treat_whitespace_as_suffix", trainer.treat_whitespace_as_suffix, (False,))):
    if value not in served:
      raise ValueError(f"{path}: a SentencePiece model with {option}={value}, which does not give back every text: "
                       f"must be {' or '.join(map(str, served))}")
  if model.eos_id() < 0:
    raise ValueError(f"{path}: a SentencePiece model without an end id (eos_id={model.eos_id()}): documents need one")
  return model, options, content


def _splits_at_words(options, newline):
  """Whether no merge of the model crosses a newline, or a space after another character."""
  piece = type(options).SentencePiece
  return (options.trainer_spec.model_type == options.trainer_spec.BPE and options.pieces[newline].type == piece.BYTE
          and not any(p.type == piece.USER_DEFINED or re.search("\n|[^\u2581]\u2581", p.piece) for p in options.pieces))


def require_utf8(text: str) -> bytes:
  """`text` in UTF-8. Raises ValueError if it holds a surrogate."""
  try:
    return text.encode()
  except UnicodeEncodeError as e:
    raise ValueError(f"the text holds {text[e.start]!r} at position {e.start}: no UTF-8 text has surrogates") from e


def require_id(tokenizer: Tokenizer, token: int) -> None:
  """Raises ValueError for an id that the tokenizer does not have."""
  if not 0 <= token < tokenizer.vocab_size:
    raise ValueError(f"token id {token}: tokenizer {tokenizer.name!r} has ids from 0 to {tokenizer.vocab_size - 1}")


# This is how SentencePiece does it. Python's "replace" writes one character for several bytes of a broken one.
codecs.register_error(MistralTokenizer.decoding_errors, lambda e: ("\ufffd" * (e.end - e.start), e.end))


def stream_decode(tokenizer: Tokenizer, ids: Iterable[int], *, first: bool = True) -> Iterator[str]:
  """Yields the text of `ids` as it becomes certain. A character of several ids appears with its last one.

  The joined texts equal `tokenizer.decode(ids)`. Ids that continue a text are not `first`, so they keep the space with
  which they begin.
  """
  decoder = codecs.getincrementaldecoder("utf-8")(errors=tokenizer.decoding_errors)
  for token in ids:
    content = tokenizer.token_bytes(int(token), first=first)
    # A token that is empty without the prefix counts as the first one too, whereas control ids do not.
    first = first and not tokenizer.token_bytes(int(token))
    # An id that spells no bytes ends a character that is incomplete.
    if text := decoder.decode(content, final=not content):
      yield text
  if text := decoder.decode(b"", final=True):
    yield text


def decode(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
  """The text of `ids`, as `Tokenizer.decode` describes it."""
  return "".join(stream_decode(tokenizer, ids))


def require_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
  """Raises ValueError when the tokenizer has ids that a model of `vocab_size` does not have.

  The model may have more ids. They pad its vocabulary and stand for nothing.
  """
  if tokenizer.vocab_size > vocab_size:
    raise ValueError(f"tokenizer {tokenizer.name!r} has {tokenizer.vocab_size} tokens, the model {vocab_size}: not the "
                     "tokenizer that it was trained with")


def load_tokenizer(name_or_path: str | pathlib.Path, **settings: str) -> Tokenizer:
  """The tokenizer called `bytes`, or the one in a file or a folder.

  A file is a SentencePiece model or a `tokenizer.json`. A folder holds a `tokenizer.json` or a prepared dataset. The
  `settings` are keyword arguments of `FastTokenizer`, and go with a `tokenizer.json` only.

  Raises ValueError for anything else, and if a dataset's files are not those that its manifest describes.
  """
  from lin_jax.fast_tokenizer import FastTokenizer

  name, file, stored = _locate(name_or_path)
  if name == FastTokenizer.name:
    return FastTokenizer(file, **stored | settings)
  for key, value in settings.items():
    raise ValueError(f"{key}={value}: goes with a tokenizer.json, which {str(name_or_path)!r} is not")
  return ByteTokenizer() if name == ByteTokenizer.name else MistralTokenizer(file)


def _locate(name_or_path):
  """A tokenizer's name, its file, and the settings that a dataset's manifest has for it."""
  from lin_jax.fast_tokenizer import TOKENIZER_FILE, FastTokenizer

  path = pathlib.Path(name_or_path)
  if str(name_or_path) == ByteTokenizer.name:
    return ByteTokenizer.name, None, {}
  if path.is_file():
    return FastTokenizer.name if path.suffix == ".json" else MistralTokenizer.name, path, {}
  if (path / TOKENIZER_FILE).is_file() and not (path / MANIFEST_FILE).exists():
    return FastTokenizer.name, path / TOKENIZER_FILE, {}
  try:
    described = read_object(path / MANIFEST_FILE, "a readable manifest")["tokenizer"]
    name, checksums = described["name"], carried_files(described)
  except (ValueError, KeyError, TypeError, AttributeError) as e:
    raise ValueError(f"tokenizer {str(name_or_path)!r}: must be 'bytes', a .model file, a tokenizer.json or its "
                     f"folder, or a dataset directory written by experiments/prepare_data.py ({e})") from e
  known = {ByteTokenizer.name: None, MistralTokenizer.name: MODEL_FILE, FastTokenizer.name: TOKENIZER_FILE}
  if name not in known:
    raise ValueError(f"{path / MANIFEST_FILE}: tokenizer {name!r}: known ones are {', '.join(map(repr, known))}")
  for file, sha256 in checksums.items():
    files.require_sha256(path / file, sha256)
  stored = {key: described[key] for key in ("special_tokens",) if key in described}
  return name, known[name] and path / known[name], stored


def describe_tokenizer(tokenizer: Tokenizer) -> dict:
  """What determines the ids of a tokenizer, for a dataset's manifest: its name, checksums of its files, settings."""
  checksums = {name: hashlib.sha256(content).hexdigest() for name, content in tokenizer.files().items()}
  described = dict(name=tokenizer.name, sha256=checksums.pop(MODEL_FILE, None))
  return described | (dict(files=checksums, special_tokens=tokenizer.special_tokens) if checksums else {})


def carried_files(described: dict) -> dict[str, str]:
  """The checksums, by name, of the files that `describe_tokenizer` names."""
  model = {MODEL_FILE: described["sha256"]} if described.get("sha256") else {}
  return model | described.get("files", {})
