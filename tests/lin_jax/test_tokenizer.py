import hashlib
import json
import random

import pytest
import sentencepiece

from lin_jax.tokenizer import ByteTokenizer, MistralTokenizer, load_tokenizer, require_vocabulary, stream_decode

TEXT = """It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness,
it was the epoch of belief, it was the epoch of incredulity, it was the season of Light, it was the season of Darkness,
it was the spring of hope, it was the winter of despair; we had everything before us, we had nothing before us.
"""
SAMPLES = ["", "a", " a", "a ", "  two  spaces ", "\n", "line\n\n  indented\ttab", "\r\n", "e\u0301", "\x00",
           "caf\u00e9 \u65e5\u672c \U0001f600", "x" * 100 + " " * 50 + "y", "it was the winter of despair; we had"]


def train_model(folder, **options):
  """A SentencePiece BPE model on a paragraph, with the settings of Mistral's but for `options`."""
  (folder / "text").write_text(TEXT)
  mistral = dict(model_type="bpe", byte_fallback=True, vocab_size=360, normalization_rule_name="identity",
                 remove_extra_whitespaces=False)
  sentencepiece.SentencePieceTrainer.train(input=str(folder / "text"), model_prefix=str(folder / "tokenizer"),
                                           minloglevel=2, **mistral | options)
  return folder / "tokenizer.model"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  return train_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def mistral(model):
  return MistralTokenizer(model)


def random_texts(count):
  source = random.Random(0)
  alphabet = [" ", " ", "\n", "\t", "w", "a", "s", "it", "the", "\u00e9", "\u2581", "\U0001f600", "\r", "<sep>", "<s>",
              "12", "\n\n", "<0x41>"]
  return ["".join(source.choices(alphabet, k=source.randrange(30))) for _ in range(count)]


def test_bytes_are_their_own_ids():
  tokenizer = ByteTokenizer()
  assert tokenizer.encode("A\u00e9") == [65, 0xC3, 0xA9]
  assert (tokenizer.vocab_size, tokenizer.eos_id) == (257, 256)
  assert tokenizer.decode([65, 256, 66]) == "AB"


@pytest.mark.parametrize("text", SAMPLES)
def test_decoding_inverts_encoding(text, mistral):
  for tokenizer in (ByteTokenizer(), mistral):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_mistral_encodes_as_sentencepiece_does(model, mistral):
  expected = sentencepiece.SentencePieceProcessor(model_file=str(model))
  for text in [*SAMPLES, TEXT, *random_texts(500)]:
    assert mistral.encode(text) == expected.encode(text), repr(text)
    assert mistral.encode(text) == expected.encode(text), f"from the cache: {text!r}"
  assert (mistral.vocab_size, mistral.eos_id) == (expected.vocab_size(), expected.eos_id())


def test_mistral_decodes_as_sentencepiece_does(model, mistral):
  expected = sentencepiece.SentencePieceProcessor(model_file=str(model))
  for text in [*SAMPLES, TEXT, *random_texts(500)]:
    ids = expected.encode(text)
    assert mistral.decode(ids) == expected.decode(ids), repr(text)
  assert mistral.decode([*mistral.encode("the end"), mistral.eos_id]) == "the end"


def test_streamed_text_appears_when_its_character_is_complete(mistral):
  pieces = list(stream_decode(ByteTokenizer(), "a\u00e9\U0001f600".encode()))
  assert pieces == ["a", "\u00e9", "\U0001f600"]
  for text in [*SAMPLES, *random_texts(100)]:
    ids = mistral.encode(text)
    assert "".join(stream_decode(mistral, ids)) == mistral.decode(ids)


def test_a_continuation_keeps_its_space(mistral):
  ids = mistral.encode("winter of")
  assert "".join(stream_decode(mistral, ids, first=False)) == " winter of"
  assert "".join(stream_decode(ByteTokenizer(), b" of", first=False)) == " of"


def test_a_tokenizer_may_have_fewer_ids_than_the_model_but_not_more(mistral):
  require_vocabulary(mistral, 360)
  require_vocabulary(mistral, 384)
  with pytest.raises(ValueError, match="tokenizer 'mistral' has 360 tokens, the model 359: not the tokenizer"):
    require_vocabulary(mistral, 359)


@pytest.mark.parametrize("ids, text", [([0xFF, 65], "\ufffdA"), ([65, 0xE2, 0x82], "A\ufffd"), ([0xC3, 256], "\ufffd")])
def test_invalid_utf8_becomes_the_replacement_character(ids, text):
  assert ByteTokenizer().decode(ids) == text
  assert "".join(stream_decode(ByteTokenizer(), ids)) == text


SERVED = {
    "no prefix": dict(add_dummy_prefix=False), "digits alone": dict(split_digits=True),
    "pieces of several words": dict(split_by_whitespace=False), "unigram": dict(model_type="unigram", vocab_size=300),
    "characters": dict(model_type="char", vocab_size=300), "spaces as pieces": dict(allow_whitespace_only_pieces=True),
    "user's symbols": dict(user_defined_symbols=["<sep>", "\n\n", "it t"], vocab_size=370),
    "control symbols": dict(control_symbols=["<sep>"]), "other ids": dict(eos_id=0, unk_id=5, bos_id=-1, pad_id=1),
    "user's symbols, unigram, no prefix": dict(model_type="unigram", user_defined_symbols=["<sep>"], vocab_size=300,
                                               add_dummy_prefix=False),
}


@pytest.mark.parametrize("options", SERVED.values(), ids=SERVED)
def test_other_models_encode_and_decode_as_sentencepiece_does(tmp_path, options):
  path, source = train_model(tmp_path, **options), random.Random(0)
  expected, ours = sentencepiece.SentencePieceProcessor(model_file=str(path)), MistralTokenizer(path)
  for text in [*SAMPLES, TEXT, *random_texts(200)]:
    ids = expected.encode(text)
    assert ours.encode(text) == ids, repr(text)
    assert ours.decode(ids) == expected.decode(ids) == text.replace("\u2581", " "), repr(text)
  for count in range(200):
    # Half of them bytes for the most part, so that characters are broken in many ways.
    ids = source.choices(range(262 if count % 2 else expected.vocab_size()), k=count % 12)
    assert ours.decode(ids) == expected.decode(ids) == "".join(stream_decode(ours, ids)), ids


REFUSED = {
    "byte_fallback=False": dict(byte_fallback=False, vocab_size=80),
    "model_type=word": dict(model_type="word", vocab_size=280),
    "remove_extra_whitespaces=True": dict(remove_extra_whitespaces=True),
    "treat_whitespace_as_suffix=True": dict(treat_whitespace_as_suffix=True),
    "normalization_rule_name=nmt_nfkc": dict(normalization_rule_name="nmt_nfkc"),
    "without an end id": dict(eos_id=-1),
}


@pytest.mark.parametrize("message, options", REFUSED.items(), ids=REFUSED)
def test_models_that_lose_text_or_have_no_end_are_refused(tmp_path, message, options):
  with pytest.raises(ValueError, match=f"tokenizer.model: a SentencePiece model .*{message}"):
    load_tokenizer(train_model(tmp_path, **options))


def test_damaged_models_load_or_are_refused(tmp_path, model):
  source, path, refused = random.Random(0), tmp_path / "tokenizer.model", 0
  for _ in range(200):
    content = bytearray(model.read_bytes())
    at = source.randrange(len(content))
    content[at:at + source.choice([0, 1, len(content)])] = source.randbytes(source.randrange(4))
    path.write_bytes(content)
    try:
      MistralTokenizer(path).decode(MistralTokenizer(path).encode("it was the caf\u00e9"))
    except ValueError as e:
      assert str(path) in str(e) and "\n" not in str(e)
      refused += 1
  assert refused > 50


@pytest.mark.parametrize("token", [-1, 360, 65_535])
def test_an_id_of_no_token_is_refused(mistral, token):
  for tokenizer in (mistral, ByteTokenizer()):
    with pytest.raises(ValueError, match=f"token id {token}: tokenizer '{tokenizer.name}' has ids from 0 to"):
      tokenizer.decode([65, token])


def test_surrogates_are_refused(mistral):
  for tokenizer in (mistral, ByteTokenizer()):
    with pytest.raises(ValueError, match="at position 1: no UTF-8 text has surrogates"):
      tokenizer.encode("a\udcff")


def test_a_file_that_is_no_model_is_refused(tmp_path):
  path = tmp_path / "tokenizer.model"
  path.write_bytes(b"not a model")
  with pytest.raises(ValueError, match="not a SentencePiece model"):
    load_tokenizer(path)


def test_a_dataset_directory_names_its_tokenizer(tmp_path, model):
  manifest = tmp_path / "manifest.json"
  manifest.write_text(json.dumps({"tokenizer": {"name": "bytes"}}))
  assert isinstance(load_tokenizer(tmp_path), ByteTokenizer)
  manifest.write_text(json.dumps({"tokenizer": {"name": "mistral"}}))
  (tmp_path / "tokenizer.model").write_bytes(model.read_bytes())
  assert load_tokenizer(tmp_path).encode("it was") == load_tokenizer(model).encode("it was")
  digest = hashlib.sha256(model.read_bytes()).hexdigest()
  manifest.write_text(json.dumps({"tokenizer": {"name": "mistral", "sha256": digest}}))
  load_tokenizer(tmp_path)
  manifest.write_text(json.dumps({"tokenizer": {"name": "mistral", "sha256": digest[::-1]}}))
  with pytest.raises(ValueError, match=f"tokenizer.model: has SHA-256 {digest}: the manifest says {digest[::-1]}"):
    load_tokenizer(tmp_path)
  manifest.write_text(json.dumps({"tokenizer": {"name": "other"}}))
  with pytest.raises(ValueError, match="'other'"):
    load_tokenizer(tmp_path)
  for content in ("", "[" * 100_000, "[1]", "{}", '{"tokenizer": 1}', '{"tokenizer": null}'):
    manifest.write_text(content)
    with pytest.raises(ValueError, match="must be 'bytes', a .model file, a tokenizer.json or its folder, or"):
      load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["mistral", "no/such/path"])
def test_an_unknown_name_is_refused(name):
  with pytest.raises(ValueError, match=f"'{name}': must be 'bytes'"):
    load_tokenizer(name)
