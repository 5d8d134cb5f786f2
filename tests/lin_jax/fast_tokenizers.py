"""Tokenizers that tests train, of both kinds, and the settings beside them."""

import json

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXT = ("It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness. "
        "user assistant system\n")
# A pattern in the manner of GPT-4's and Qwen's.
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def byte_level(alphabet=True, vocab_size=330):
  """A byte-level BPE tokenizer like Qwen's, whose last token `<think>` is added and not special."""
  model = tokenizers.Tokenizer(models.BPE())
  model.normalizer = normalizers.NFC()
  model.pre_tokenizer = pre_tokenizers.Sequence([
      pre_tokenizers.Split(tokenizers.Regex(WORDS), "isolated"),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
  model.decoder = decoders.ByteLevel()
  letters = pre_tokenizers.ByteLevel.alphabet() if alphabet else []
  model.train_from_iterator([TEXT], trainers.BpeTrainer(
      vocab_size=vocab_size, initial_alphabet=letters, special_tokens=SPECIAL, show_progress=False))
  model.add_tokens([tokenizers.AddedToken("<think>", special=False, normalized=False)])
  return model


def beginning(model, token="<|im_start|>"):
  """The tokenizer, with a post-processor that puts `token` before every text."""
  model.post_processor = processors.TemplateProcessing(
      single=f"{token} $A", special_tokens=[(token, model.token_to_id(token))])
  return model


def byte_fallback(metaspace=False):
  """A BPE tokenizer like those made of Llama's and Mistral's SentencePiece models."""
  pieces = ["<unk>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "\u2581", *"itwas", "it", "as", "was", "\u2581was"]
  merges = [("i", "t"), ("a", "s"), ("w", "as"), ("\u2581", "was")]
  model = tokenizers.Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges, byte_fallback=True,
                                          unk_token="<unk>", fuse_unk=True))
  if metaspace:
    model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    parts = [decoders.Metaspace(prepend_scheme="first", split=False), decoders.ByteFallback(), decoders.Fuse()]
  else:
    model.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
  model.decoder = decoders.Sequence(parts)
  model.add_special_tokens(["<unk>", "</s>"])
  return model


def save(folder, model, **settings):
  """Writes the folder of a tokenizer, with `settings` in `tokenizer_config.json`. Returns the folder."""
  folder.mkdir(parents=True, exist_ok=True)
  model.save(str(folder / "tokenizer.json"))
  if settings:
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
  return folder
