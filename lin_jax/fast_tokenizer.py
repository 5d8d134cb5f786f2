"""The tokenizer in a `tokenizer.json`, the file of Hugging Face's library `tokenizers`, with the settings beside it."""

import json
import pathlib
import re
import unicodedata
from collections.abc import Iterable

from lin_jax.tokenizer import decode, require_id, require_utf8
from lin_jax.tokenizer_components import SPACE, examine
from lin_jax.typed_json import read_object, shown

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
SPECIAL_TOKENS = "keep", "refuse", "text"


class FastTokenizer:
  """The tokenizer in the file `path`, whose settings lie in files beside it.

  The begin, end and padding tokens are `bos_token`, `eos_token` and `pad_token`, or else those that
  `tokenizer_config.json`, `special_tokens_map.json` or `generation_config.json` name, in this order. The chat template
  is the text `chat_template`, or else `chat_template.jinja`, or else the one of `tokenizer_config.json`.

  `special_tokens` says what a text's special tokens, such as "<|endoftext|>", become. With "keep" they become their
  ids, as in `transformers`. With "refuse" the text is refused, and with "text" they are read as any other text.

  Attributes:
    bos_id, eos_id, pad_id: ids. `bos_id` and `pad_id` may be None.
    begin_ids: the ids that the file's post-processor puts before a text, such as `bos_id` or none.
    special: texts of the special tokens, by id. These ids decode to nothing.
    chat_template: a text, or None.

  Raises ValueError for a file that is no tokenizer or makes encoding lose a part of some texts, for damaged settings,
  for a begin, end or padding token that the tokenizer does not have, and if there is no end token.
  """

  name = "fast"

  def __init__(self, path: str | pathlib.Path, *, special_tokens: str = "keep", bos_token: str = "",
               eos_token: str = "", pad_token: str = "", chat_template: str = ""):
    path = pathlib.Path(path)
    if special_tokens not in SPECIAL_TOKENS:
      raise ValueError(f"special_tokens={special_tokens!r}: must be {' or '.join(map(repr, SPECIAL_TOKENS))}")
    self._model, self._content, described = _read(path)
    self._components = examine(path, described, self._model.get_vocab(with_added_tokens=False))
    self.prefix = " " if self._components.prefixed else ""
    self.decoding_errors = "replace" if self._components.byte_level else "lin_jax.replace_each_byte"
    self.special_tokens = special_tokens
    processed = self._model.encode("a")
    self.begin_ids = tuple(processed.ids[:processed.special_tokens_mask.index(0)])
    added = self._model.get_added_tokens_decoder()
    self.special = {token: entry.content for token, entry in added.items() if entry.special}
    texts = "|".join(map(re.escape, sorted(self.special.values(), key=len, reverse=True)))
    self._special_text = re.compile(texts or "(?!)")
    vocabulary = self._model.get_vocab(with_added_tokens=True)
    self.vocab_size = max(vocabulary.values()) + 1
    self._bytes = [b""] * self.vocab_size  # of ids that stand for nothing too
    for text, token in vocabulary.items():
      if token not in self.special:
        self._bytes[token] = text.encode() if token in added else self._components.spelled(text)
    settings = _Settings(path.parent)
    self.chat_template = chat_template or settings.chat_template()
    self._texts = dict(bos_token=bos_token, eos_token=eos_token, pad_token=pad_token)
    self.bos_id, self.eos_id, self.pad_id = (self._find(path, kind, settings) for kind in self._texts)
    if self.eos_id is None:
      raise ValueError(f"{path}: neither it nor a file beside it has an eos_token: give one, because documents need it")

  def _find(self, path, kind, settings):
    text = self._texts[kind] or settings.token(kind, self._model.id_to_token)
    token = self._model.token_to_id(text) if text else None
    if text and token is None:
      raise ValueError(f"{path}: {kind}={shown(text)}: the tokenizer has no such token")
    self._texts[kind] = text
    return token

  def encode(self, text: str) -> list[int]:
    self.require_allowed(text)
    return self._encoded(text, self.special_tokens == "text").ids

  def encode_chat(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """The ids of a rendered chat, whose special tokens are kept, and the characters [start, stop) of each id."""
    encoded = self._encoded(text, False)
    return encoded.ids, encoded.offsets

  def require_allowed(self, text: str) -> None:
    """Raises ValueError if the text holds a special token, and these are refused."""
    if self.special_tokens == "refuse" and (found := self._special_text.search(text)):
      raise ValueError(f"the text holds the special token {found[0]!r} at position {found.start()}, and "
                       "special_tokens=refuse: 'keep' would read it as its id, 'text' as any other text")

  def _encoded(self, text, special_as_text):
    require_utf8(text)
    self._model.encode_special_tokens = special_as_text
    return self._model.encode(text, add_special_tokens=False)

  def decode(self, ids: Iterable[int]) -> str:
    return decode(self, ids)

  def token_bytes(self, token: int, *, first: bool = False) -> bytes:
    require_id(self, token)
    return self._bytes[token].removeprefix(self.prefix.encode()) if first else self._bytes[token]

  def normalized(self, text: str) -> str:
    if self._components.composed:
      text = unicodedata.normalize("NFC", text)
    if not self._components.byte_level:
      text = text.replace(SPACE, " ")
    return text.removeprefix(" ") if self._components.prefixed == "missing" else text

  def token_texts(self) -> dict[str, str]:
    """The begin, end and padding tokens under `bos_token`, `eos_token` and `pad_token`, without those that are None."""
    return {kind: text for kind, text in self._texts.items() if text}

  def files(self) -> dict[str, bytes]:
    settings = self.token_texts() | ({"chat_template": self.chat_template} if self.chat_template else {})
    return {TOKENIZER_FILE: self._content, CONFIG_FILE: (json.dumps(settings, indent=1) + "\n").encode()}


def _read(path):
  """The library's tokenizer of a file, the file's content and the object that it holds. Raises ValueError."""
  import tokenizers

  described = read_object(path, "a tokenizer")
  try:
    content = path.read_bytes()
    model = tokenizers.Tokenizer.from_buffer(content)
  except Exception as e:  # the library raises nothing more specific
    raise ValueError(f"{path}: not a tokenizer ({' '.join(str(e).split())})") from e
  model.no_truncation()
  model.no_padding()
  return model, content, described


class _Settings:
  """The files beside a tokenizer. Raises ValueError if one is damaged."""

  def __init__(self, folder: pathlib.Path):
    self._folder = folder
    self._config, self._map, self._generation = (
        read_object(folder / name, "readable settings of a tokenizer") if (folder / name).is_file() else {}
        for name in (CONFIG_FILE, "special_tokens_map.json", "generation_config.json"))

  def token(self, kind, text_of):
    """The text of the token `kind`, such as "eos_token", or None. `text_of` gives that of an id."""
    for settings in (self._config, self._map):
      if found := settings.get(kind):
        text = found.get("content") if isinstance(found, dict) else found
        if not isinstance(text, str):
          raise ValueError(f"{self._folder}: {kind}={shown(found)}: must be a text")
        return text
    ids = self._generation.get(f"{kind}_id")
    first = ids[0] if isinstance(ids, list) and ids else ids
    if first is None:
      return None
    text = text_of(first) if type(first) is int and first >= 0 else None
    if text is None:
      raise ValueError(f"{self._folder}: {kind}_id={shown(ids)}: the tokenizer has no such id")
    return text

  def chat_template(self):
    file, found = self._folder / TEMPLATE_FILE, self._config.get("chat_template")
    if file.is_file():
      try:
        return file.read_text(encoding="utf-8")
      except (OSError, UnicodeDecodeError) as e:
        raise ValueError(f"{file}: not readable as UTF-8 ({e})") from e
    if isinstance(found, list):  # several templates by name
      found = next((entry.get("template") for entry in found if entry.get("name") == "default"), None)
    if found is not None and not isinstance(found, str):
      raise ValueError(f"{self._folder / CONFIG_FILE}: chat_template={shown(found)}: must be a text")
    return found
