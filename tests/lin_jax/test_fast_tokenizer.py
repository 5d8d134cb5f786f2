import json
import random
import unicodedata

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from lin_jax.fast_tokenizer import FastTokenizer
from lin_jax.tokenizer import load_tokenizer, require_vocabulary, stream_decode
from tests.lin_jax.fast_tokenizers import SPECIAL, beginning, byte_fallback, byte_level, save
from tests.lin_jax.test_tokenizer import SAMPLES, random_texts

KINDS = {"byte level": byte_level, "fallback": byte_fallback,
         "fallback, metaspace": lambda: byte_fallback(metaspace=True)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return save(tmp_path_factory.mktemp("fast"), byte_level(), eos_token="<|endoftext|>")


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_texts_are_those_of_the_library(tmp_path, kind):
  model = KINDS[kind]()
  end = "<|endoftext|>" if "level" in kind else "</s>"
  ours = load_tokenizer(save(tmp_path / "fast", model, eos_token=end))
  assert ours.vocab_size == model.get_vocab_size() and ours.eos_id == model.token_to_id(end)
  for text in [*SAMPLES, *random_texts(300), "caf\u00e9 \u0142<think>\n it was"]:
    ids = model.encode(text, add_special_tokens=False).ids
    assert ours.encode(text) == ids, repr(text)
    decoded = ours.decode(ids)
    assert decoded == "".join(stream_decode(ours, ids)) == model.decode(ids) == ours.normalized(text), repr(text)


def test_bytes_that_are_no_text_are_decoded_as_in_the_library(folder):
  model, ours = byte_level(), load_tokenizer(folder)
  source = random.Random(0)
  for _ in range(300):
    ids = [source.randrange(3, ours.vocab_size) for _ in range(source.randrange(12))]
    assert ours.decode(ids) == "".join(stream_decode(ours, ids)) == model.decode(ids), ids


def test_the_bytes_of_a_text_are_those_of_its_tokens(folder):
  ours = load_tokenizer(folder)
  text = "e\u0301 caf\u00e9 it was <think> \U0001f600"
  spelled = b"".join(map(ours.token_bytes, ours.encode(text)))
  assert spelled == ours.normalized(text).encode() == unicodedata.normalize("NFC", text).encode()
  assert ours.token_bytes(ours.eos_id) == b""
  with pytest.raises(ValueError, match=f"token id {ours.vocab_size}: tokenizer 'fast' has ids from 0 to"):
    ours.token_bytes(ours.vocab_size)


def test_special_tokens_of_a_text_are_kept_refused_or_text(folder):
  keep, refuse, plain = (load_tokenizer(folder, special_tokens=mode) for mode in ("keep", "refuse", "text"))
  text = "it <|im_end|> was"
  assert keep.encode(text).count(2) == 1 and 2 not in plain.encode(text)
  assert plain.decode(plain.encode(text)) == text and keep.decode(keep.encode(text)) == "it  was"
  with pytest.raises(ValueError, match=r"special token '<\|im_end\|>' at position 3, and special_tokens=refuse"):
    refuse.encode(text)
  assert refuse.encode("it was") == plain.encode("it was") == keep.encode("it was")
  assert keep.encode_chat(text)[0] == plain.encode_chat(text)[0] == keep.encode(text)
  with pytest.raises(ValueError, match="special_tokens='no': must be 'keep' or 'refuse' or 'text'"):
    load_tokenizer(folder, special_tokens="no")


SETTINGS = [
    ({"tokenizer_config.json": {"eos_token": "<|im_end|>", "bos_token": {"content": "<|im_start|>"}, "pad_token": None},
      "special_tokens_map.json": {"eos_token": "<think>", "pad_token": "<|endoftext|>"}}, {}, (1, 2, 0)),
    ({"generation_config.json": {"eos_token_id": [2, 0], "pad_token_id": 0}}, {}, (None, 2, 0)),
    ({"tokenizer_config.json": {"eos_token": "<|im_end|>"}}, dict(eos_token="<|endoftext|>"), (None, 0, None)),
]


@pytest.mark.parametrize("files, settings, ids", SETTINGS)
def test_begin_end_and_padding_come_from_settings_or_arguments(tmp_path, files, settings, ids):
  save(tmp_path, byte_level())
  for name, content in files.items():
    (tmp_path / name).write_text(json.dumps(content))
  found = load_tokenizer(tmp_path, **settings)
  assert (found.bos_id, found.eos_id, found.pad_id) == ids
  texts = {f"{kind}_token": SPECIAL[i] for kind, i in zip(("bos", "eos", "pad"), ids) if i is not None}
  assert found.token_texts() == texts


BAD_SETTINGS = {
    "no end": ({}, "neither it nor a file beside it has an eos_token"),
    "unknown": ({"tokenizer_config.json": '{"eos_token": "<end>"}'}, "eos_token='<end>': the tokenizer has no such"),
    "number": ({"tokenizer_config.json": '{"eos_token": 3}'}, "eos_token=3: must be a text"),
    "damaged": ({"tokenizer_config.json": "{"}, "tokenizer_config.json: not readable settings"),
    "unknown id": ({"generation_config.json": '{"eos_token_id": 99999}'}, "eos_token_id=99999: .* no such id"),
    "template": ({"tokenizer_config.json": '{"chat_template": 1}'}, "chat_template=1: must be a text"),
}


@pytest.mark.parametrize("files, message", BAD_SETTINGS.values(), ids=BAD_SETTINGS)
def test_bad_settings_are_refused(tmp_path, files, message):
  save(tmp_path, byte_level())
  for name, content in files.items():
    (tmp_path / name).write_text(content)
  with pytest.raises(ValueError, match=message):
    load_tokenizer(tmp_path)


def test_a_chat_template_comes_from_its_file_or_the_settings(tmp_path):
  named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "b"}]
  for number, (template, text) in enumerate((("a", "a"), (named, "b"), (None, None))):
    folder = save(tmp_path / str(number), byte_level(), eos_token="<|im_end|>", chat_template=template)
    assert load_tokenizer(folder).chat_template == text
  (folder / "chat_template.jinja").write_text("c")
  assert load_tokenizer(folder).chat_template == "c"
  assert load_tokenizer(folder, chat_template="d").chat_template == "d"


def changed(**components):
  model = byte_level()
  for name, component in components.items():
    setattr(model, name, component)
  return model


LOSSY = {
    "normalizer {'type': 'Lowercase'}": lambda: changed(normalizer=normalizers.Lowercase()),
    "normalizer {'type': 'Replace', .*}": lambda: changed(
        normalizer=normalizers.Sequence([normalizers.NFC(), normalizers.Replace("a", "b")])),
    "pre_tokenizer without ByteLevel": lambda: changed(pre_tokenizer=pre_tokenizers.Whitespace()),
    "pre_tokenizer {'type': 'Split', .*": lambda: changed(pre_tokenizer=pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel()])),
    "pre_tokenizer {.*'add_prefix_space': True": lambda: changed(pre_tokenizer=pre_tokenizers.ByteLevel()),
    "decoder without ByteFallback": lambda: changed(decoder=decoders.WordPiece()),
    "decoder without Byte": lambda: tokenizers.Tokenizer(models.BPE()),
    "no token for some bytes": lambda: byte_level(alphabet=False),
}


@pytest.mark.parametrize("message, make", LOSSY.items(), ids=LOSSY)
def test_tokenizers_that_lose_text_are_refused(tmp_path, message, make):
  with pytest.raises(ValueError, match=f"tokenizer.json: {message}.*: a tokenizer of this kind does not give back"):
    load_tokenizer(save(tmp_path, make(), eos_token="<|im_end|>"))


@pytest.mark.parametrize("content", ["", "[1]", "{}", '{"model": {"type": "BPE"}}', "[" * 100_000, "\xff"])
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path, content):
  (tmp_path / "tokenizer.json").write_bytes(content.encode("latin-1"))
  with pytest.raises(ValueError, match="tokenizer.json: not a tokenizer"):
    load_tokenizer(tmp_path / "tokenizer.json")


def test_the_post_processor_says_how_documents_begin(tmp_path):
  model = beginning(byte_level())
  ours = load_tokenizer(save(tmp_path, model, eos_token="<|im_end|>"))
  assert [*ours.begin_ids, *ours.encode("it was")] == model.encode("it was").ids and ours.begin_ids == (1,)


def test_truncation_and_padding_of_the_file_are_switched_off(tmp_path):
  model = byte_level()
  model.enable_truncation(3)
  model.enable_padding(length=50)
  ids = load_tokenizer(save(tmp_path, model, eos_token="<|im_end|>")).encode("it was the age of wisdom")
  assert ids == byte_level().encode("it was the age of wisdom").ids


def test_a_vocabulary_larger_than_the_model_is_refused(folder):
  tokenizer = load_tokenizer(folder)
  require_vocabulary(tokenizer, tokenizer.vocab_size)
  with pytest.raises(ValueError, match=f"tokenizer 'fast' has {tokenizer.vocab_size} tokens, the model 300"):
    require_vocabulary(tokenizer, 300)


def test_the_files_that_a_dataset_carries_make_the_same_tokenizer(tmp_path, folder):
  first = load_tokenizer(folder, pad_token="<think>", chat_template="{{ messages }}")
  for name, content in first.files().items():
    (tmp_path / name).write_bytes(content)
  again = load_tokenizer(tmp_path)
  assert again.files() == first.files() and again.pad_id == first.pad_id == first.encode("<think>")[0]
  assert isinstance(again, FastTokenizer) and again.chat_template == "{{ messages }}"


def test_settings_go_with_a_fast_tokenizer_only():
  with pytest.raises(ValueError, match="eos_token=x: goes with a tokenizer.json, which 'bytes' is not"):
    load_tokenizer("bytes", eos_token="x")
