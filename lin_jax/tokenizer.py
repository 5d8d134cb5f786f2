"""Tokenizers: text to token ids and back, each with an end-of-document id and no beginning-of-document id.

`bytes` needs no file; `mistral` reads a SentencePiece model, such as that of Mistral-7B-v0.1 (32,000 pieces, the
vocabulary of the GLA and DeltaNet papers). A prepared dataset carries its tokenizer: `load_tokenizer("data/english")`
is all that decoding needs.

Encoding keeps every text, but for U+2581, which SentencePiece takes for a space: bits per byte count the bytes of the
text, and would be too low if some of it were dropped or became the unknown token.
"""

import codecs
import pathlib
import re
from collections.abc import Iterable, Iterator
from typing import Protocol

from lin_jax import files
from lin_jax.typed_json import read_object

MODEL_FILE = "tokenizer.model"
MANIFEST_FILE = "manifest.json"


class Tokenizer(Protocol):
  """What a dataset, a model and a sampler need to know of a tokenizer."""

  name: str
  vocab_size: int
  eos_id: int
  prefix: str  # what encoding puts before a text, and decoding takes off again
  decoding_errors: str  # the name of a handler of `codecs`, for bytes that are no UTF-8

  def encode(self, text: str) -> list[int]:
    """Ids of `text`, without `eos_id`."""

  def decode(self, ids: Iterable[int]) -> str:
    """Text of `ids`; invalid UTF-8 becomes U+FFFD, control ids nothing. Raises ValueError as `token_bytes` does."""

  def token_bytes(self, token: int, *, first: bool = False) -> bytes:
    """The bytes that `token` stands for, less the prefix if it is the `first` of a text; none for control ids.

    Raises ValueError for an id that the tokenizer does not have.
    """


class ByteTokenizer:
  """Ids 0..255 are the bytes of UTF-8; 256 ends a document, so `vocab_size` is 257."""

  name = "bytes"
  vocab_size = 257
  eos_id = 256
  prefix = ""
  decoding_errors = "replace"

  def encode(self, text: str) -> list[int]:
    return list(_utf8(text))

  def decode(self, ids: Iterable[int]) -> str:
    return _decode(self, ids)

  def token_bytes(self, token: int, *, first: bool = False) -> bytes:
    _require_id(self, token)
    return bytes((token,)) if token < self.eos_id else b""


class MistralTokenizer:
  """A SentencePiece model with byte fallback, read from `path`: ids and texts are those of SentencePiece itself.

  A BPE model whose pieces span no newline and no space that follows another character is encoded faster: the text is
  split there, and each distinct word is encoded once and remembered. That is exact because no merge crosses a split.
  Raises ValueError for a file that is no such model, and for a model without an end id or with an option that makes
  encoding lose a part of some texts.
  """

  name = "mistral"
  decoding_errors = "lin_jax.replace_each_byte"
  _WORD = re.compile("\n|[ \u2581]*[^ \u2581\n]+|[ \u2581]+")
  _LONGEST_CACHED = 40
  _CACHE_SIZE = 4_000_000

  def __init__(self, path: str | pathlib.Path):
    self._model, options = _read_sentencepiece(pathlib.Path(path))
    self.vocab_size = self._model.vocab_size()
    self.eos_id = self._model.eos_id()
    self.prefix = " " if options.normalizer_spec.add_dummy_prefix else ""
    self._bytes = [self._piece_bytes(i, piece.piece, options) for i, piece in enumerate(options.pieces)]
    self._prefixed = {i for i, piece in enumerate(options.pieces)
                      if self.prefix and piece.piece.startswith("\u2581") and not self._model.is_unknown(i)}
    # A word is encoded after a newline: alone, it would lose the distinction between " a" and "a".
    newline = self._model.encode("\n")
    self._cache = {"\n": (newline[-1],)}
    self._newline_ids = len(newline) if _splits_at_words(options, newline[-1]) else 0

  def encode(self, text: str) -> list[int]:
    _utf8(text)
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
    return _decode(self, ids)

  def token_bytes(self, token: int, *, first: bool = False) -> bytes:
    _require_id(self, token)
    return self._bytes[token][len(self.prefix):] if first and token in self._prefixed else self._bytes[token]

  def _piece_bytes(self, token, piece, options):
    if self._model.is_control(token):
      return b""
    if self._model.is_byte(token):
      return bytes((int(piece[3:-1], 16),))
    if self._model.is_unknown(token):
      return options.trainer_spec.unk_surface.encode()
    return piece.replace("\u2581", " ").encode()


def _read_sentencepiece(path):
  """The model of a file, and the message that describes it. Raises ValueError as `MistralTokenizer` does."""
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
  return model, options


def _splits_at_words(options, newline):
  """Whether no merge of the model crosses a newline, or a space after another character."""
  piece = type(options).SentencePiece
  return (options.trainer_spec.model_type == options.trainer_spec.BPE and options.pieces[newline].type == piece.BYTE
          and not any(p.type == piece.USER_DEFINED or re.search("\n|[^\u2581]\u2581", p.piece) for p in options.pieces))


def _utf8(text):
  try:
    return text.encode()
  except UnicodeEncodeError as e:
    raise ValueError(f"the text holds {text[e.start]!r} at position {e.start}: no UTF-8 text has surrogates") from e


def _require_id(tokenizer, token):
  if not 0 <= token < tokenizer.vocab_size:
    raise ValueError(f"token id {token}: tokenizer {tokenizer.name!r} has ids from 0 to {tokenizer.vocab_size - 1}")


# As SentencePiece does; Python's "replace" writes one character for several bytes of a broken one.
codecs.register_error(MistralTokenizer.decoding_errors, lambda e: ("\ufffd" * (e.end - e.start), e.end))


def stream_decode(tokenizer: Tokenizer, ids: Iterable[int], *, first: bool = True) -> Iterator[str]:
  """Yields the text of `ids` as it becomes certain: a character of several ids appears with its last one.

  The joined pieces equal `tokenizer.decode(ids)`. Ids that continue a text are not `first`: they keep the space that
  they begin with.
  """
  decoder = codecs.getincrementaldecoder("utf-8")(errors=tokenizer.decoding_errors)
  for token in ids:
    content = tokenizer.token_bytes(int(token), first=first)
    # What is empty without its prefix was first as well; control ids are not.
    first = first and not tokenizer.token_bytes(int(token))
    # What spells no bytes ends a character that is incomplete.
    if text := decoder.decode(content, final=not content):
      yield text
  if text := decoder.decode(b"", final=True):
    yield text


def _decode(tokenizer, ids):
  return "".join(stream_decode(tokenizer, ids))


def require_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
  """Raises ValueError when the tokenizer has ids that a model of `vocab_size` does not have.

  The model may have more: those pad its vocabulary and stand for nothing.
  """
  if tokenizer.vocab_size > vocab_size:
    raise ValueError(f"tokenizer {tokenizer.name!r} has {tokenizer.vocab_size} tokens, the model {vocab_size}: not the "
                     "tokenizer that it was trained with")


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
    described = read_object(path / MANIFEST_FILE, "a readable manifest")["tokenizer"]
    name, sha256 = described["name"], described.get("sha256")
  except (ValueError, KeyError, TypeError, AttributeError) as e:
    raise ValueError(f"tokenizer {str(name_or_path)!r}: must be 'bytes', a .model file, or a dataset directory written "
                     f"by experiments/prepare_data.py ({e})") from e
  if name == ByteTokenizer.name:
    return ByteTokenizer()
  if name == MistralTokenizer.name:
    if sha256:
      files.require_sha256(path / MODEL_FILE, sha256)
    return MistralTokenizer(path / MODEL_FILE)
  raise ValueError(f"{path / MANIFEST_FILE}: tokenizer {name!r}: known ones are 'bytes' and 'mistral'")
