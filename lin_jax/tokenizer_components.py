"""The components of a `tokenizer.json`: which of them give back every text, and what their tokens spell.

Two kinds of tokenizers do. Byte-level ones (GPT-2, Llama 3, Qwen, OLMo) write the 256 bytes in an alphabet of 256
letters. Those made of SentencePiece models with byte fallback (Llama 2, Mistral, Gemma) write a space as U+2581, and a
byte as <0x0A>.
"""

import dataclasses
import pathlib
import re

from lin_jax.typed_json import shown

SPACE = "\u2581"
_SPLITTERS = {"Split", "Digits", "Punctuation", "UnicodeScripts"}
# The types of parts that each component needs and may have besides.
_BYTE_LEVEL = {"decoder": ({"ByteLevel"}, set()), "normalizer": (set(), {"NFC"}),
               "pre_tokenizer": ({"ByteLevel"}, _SPLITTERS)}
_BYTE_FALLBACK = {"decoder": ({"ByteFallback"}, {"Replace", "Fuse", "Strip", "Metaspace"}),
                  "normalizer": (set(), {"NFC", "Prepend", "Replace"}),
                  "pre_tokenizer": (set(), _SPLITTERS | {"Metaspace"})}
_LOSSY = "a tokenizer of this kind does not give back every text"


def _alphabet():
  """The letter of each byte: printable characters stand for themselves, and others for 256, 257, ... in their order."""
  printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  others = [byte for byte in range(256) if byte not in printable]
  return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _alphabet()


@dataclasses.dataclass(frozen=True)
class Components:
  """What the components of a tokenizer do with texts.

  Attributes:
    byte_level: the kind of the tokenizer.
    composed: the text is brought into Unicode's form NFC.
    prefixed: "always" if a space is put before each text, "missing" if only before those that do not begin with one,
      and otherwise "".
  """

  byte_level: bool
  composed: bool
  prefixed: str

  def spelled(self, token: str) -> bytes:
    """The bytes of a token of the model."""
    if self.byte_level:
      return bytes(_BYTES[letter] for letter in token) if all(letter in _BYTES for letter in token) else token.encode()
    if byte := re.fullmatch("<0x([0-9A-F]{2})>", token):
      return bytes.fromhex(byte[1])
    return token.replace(SPACE, " ").encode()


def examine(path: pathlib.Path, described: dict, vocabulary: dict[str, int]) -> Components:
  """The components of the tokenizer in the file `path`, which holds the object `described`.

  Raises ValueError, naming the component, for a tokenizer that loses a part of some texts.
  """
  parts = {key: _parts(described.get(key)) for key in ("decoder", "normalizer", "pre_tokenizer")}
  types = {key: {part["type"] for part in found} for key, found in parts.items()}
  byte_level = types["decoder"] == {"ByteLevel"}
  for key, (needed, allowed) in (_BYTE_LEVEL if byte_level else _BYTE_FALLBACK).items():
    if absent := needed - types[key]:
      raise ValueError(f"{path}: {key} without {absent.pop()}: {_LOSSY}")
    for part in parts[key]:
      if part["type"] not in needed | allowed or not (key == "decoder" or _keeps(part, alone=len(parts[key]) == 1)):
        raise ValueError(f"{path}: {key} {shown(part)}: {_LOSSY}")
  missing = set(_BYTES if byte_level else (f"<0x{i:02X}>" for i in range(256))) - vocabulary.keys()
  if missing or not (byte_level or described["model"].get("byte_fallback")):
    raise ValueError(f"{path}: no token for some bytes: {_LOSSY}")
  spaced = any(part.get("prepend_scheme") in ("always", "first") for part in parts["pre_tokenizer"])
  return Components(byte_level, "NFC" in types["normalizer"],
                    "missing" if spaced else "always" if "Prepend" in types["normalizer"] else "")


def _parts(component):
  """The parts of a component, which may be a sequence of sequences."""
  if not component:
    return []
  inner = next((component[key] for key in ("normalizers", "pretokenizers", "decoders") if key in component), None)
  return [component] if inner is None else [part for each in inner for part in _parts(each)]


def _keeps(part, alone):
  """Whether a part of a normalizer or of a pre-tokenizer keeps every character and adds none between words."""
  if part["type"] in ("Prepend", "Replace"):
    return part in ({"type": "Prepend", "prepend": SPACE},
                    {"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
  if part["type"] == "Metaspace":
    return alone and part.get("replacement") == SPACE
  # If what a pattern describes is kept and all else removed, the pattern describes all text.
  return not part.get("add_prefix_space") and (part.get("behavior") != "Removed" or bool(part.get("invert")))
