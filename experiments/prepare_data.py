"""Turns text into a dataset of token shards that `config.data.path` can name.

  python experiments/prepare_data.py --corpus=shakespeare --out=data/shakespeare
  python experiments/prepare_data.py --corpus=english --tier=full --out=data/english
  python experiments/prepare_data.py --corpus=code --out=data/code
  python experiments/prepare_data.py --join=data/english,data/code --out=data/english_code
  python experiments/prepare_data.py --input='books/*.txt' --input=web.jsonl.zst --out=data/mine
  python experiments/prepare_data.py --hf_dataset=cerebras/SlimPajama-627B --tokens=16000000000 --out=data/slimpajama
  python experiments/prepare_data.py --input=chats.jsonl --format=messages --tokenizer=FOLDER --out=data/chats
  python experiments/prepare_data.py --pack=data/english --tokens=48000000 --out=english-packed
  python experiments/prepare_data.py --unpack=english-packed --out=data/english
  python experiments/prepare_data.py --verify=data/english

The same inputs and options give the same bytes. An interrupted run continues when it is started again. Two runs may not
make the same --out at once.
"""

import functools
import pathlib
import time

from absl import flags

from lin_jax import files
from running import commands

_OUT = flags.DEFINE_string("out", "", "Directory to make.")
_INPUT = flags.DEFINE_multi_string(
    "input", [], "Text, JSON or Parquet file, or a glob of them; may be repeated. Text and JSON may be compressed "
    "(.gz, .bz2, .xz, .zst).")
_FORMAT = flags.DEFINE_enum(
    "format", None, ["text", "jsonl", "json", "parquet", "messages"], "How to read --input; by default each file's "
    "ending decides. messages are JSON Lines with a list of messages under that key, which the chat template of "
    "--tokenizer turns into documents with a mask of the answers. "
    ".jsonl, .ndjson and .jsonlines are JSON Lines. .json is JSON Lines, an array of rows or one row. .parquet and .pq "
    "are Parquet. .txt, .md, .rst, .tex and endings of source code such as .py are text. Others are refused.")
_HF_DATASET = flags.DEFINE_string("hf_dataset", "", "Name of a Hugging Face dataset, which is streamed.")
_HF_SPLIT = flags.DEFINE_string("hf_split", "train", "Split of --hf_dataset to read.")
_HF_REVISION = flags.DEFINE_string("hf_revision", "", "Revision of --hf_dataset; by default the latest.")
_CORPUS = flags.DEFINE_enum("corpus", None, ["shakespeare", "english", "code"], "Recipe that makes a corpus from "
                            "published packages.")
_TIER = flags.DEFINE_enum("tier", "full", ["quick", "prose", "full"], "How much of --corpus=english to make.")
_TEXT_FIELD = flags.DEFINE_string("text_field", "text", "JSON key or Parquet column that holds the text.")
_SEPARATOR = flags.DEFINE_string("separator", "", "Text between documents of a text file; by default each file is one "
                                 "document.")
_TOKENIZER = flags.DEFINE_string(
    "tokenizer", "", "bytes, mistral, a SentencePiece file, or a tokenizer.json or its folder; by default bytes for "
    "shakespeare, mistral otherwise.")
_SPECIAL = flags.DEFINE_enum(
    "special_tokens", None, ["keep", "refuse", "text"], "What a text's special tokens become, with a tokenizer.json: "
    "their ids (by default), an error, or text like any other.")
_BOS = flags.DEFINE_string("bos_token", "", "Begin token of a tokenizer.json; by default a file beside it has one.")
_EOS = flags.DEFINE_string("eos_token", "", "End token of a tokenizer.json, which closes each document; by default a "
                           "file beside it has one.")
_PAD = flags.DEFINE_string("pad_token", "", "Padding token of a tokenizer.json; by default a file beside it has one.")
_TEMPLATE = flags.DEFINE_string("chat_template", "", "File of a chat template, in the place of the tokenizer's own.")
_VAL = flags.DEFINE_float("val_fraction", 0.01, "Fraction of the documents that is held out as split val.")
_TEST = flags.DEFINE_float("test_fraction", 0.01, "Fraction of the documents that is held out as split test.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the split, and of the order of documents where a recipe shuffles "
                             "them.", lower_bound=0)
_CACHE = flags.DEFINE_string("cache", "data/cache", "Directory that keeps downloads.")
_PACK = flags.DEFINE_string("pack", "", "Dataset to compress into --out, with its training split cut to --tokens.")
_TOKENS = flags.DEFINE_integer("tokens", 0, "Tokens to take from --input or --hf_dataset, over all splits, or training "
                               "tokens to keep with --pack; 0 is all.", lower_bound=0)
_VERIFY = flags.DEFINE_string("verify", "", "Dataset whose files are all compared with the manifest's checksums.")
_JOIN = flags.DEFINE_list("join", [], "Datasets of one tokenizer to join. Held-out text is also kept apart, by the "
                          "names of their folders.")
_UNPACK = flags.DEFINE_string("unpack", "", "Directory made by --pack, to turn back into a dataset.")


def main(_) -> None:
  actions = "input", "hf_dataset", "corpus", "join", "pack", "unpack", "verify"
  chosen = [name for name in actions if flags.FLAGS[name].value]
  if len(chosen) != 1:
    raise ValueError("give exactly one of --input, --hf_dataset, --corpus, --join, --pack, --unpack and --verify: got "
                     f"{len(chosen)}")
  if _TOKENS.value and chosen[0] in ("corpus", "join", "unpack", "verify"):
    raise ValueError(f"--tokens={_TOKENS.value}: goes with --input, --hf_dataset and --pack, not with --{chosen[0]}")
  if _FORMAT.value and chosen[0] != "input":
    raise ValueError(f"--format={_FORMAT.value}: goes with --input, not with --{chosen[0]}")
  if _FORMAT.value == "messages" and not _TOKENIZER.value:
    raise ValueError("--format=messages: needs --tokenizer, a tokenizer.json with a chat template or its folder")
  if _VERIFY.value:
    _verify()
    return
  if not _OUT.value:
    raise ValueError("--out is required: the directory to make")
  out = pathlib.Path(_OUT.value)
  # The lock lies beside the directory, which appears only once it is complete.
  with files.lock(out.absolute().with_name(out.absolute().name + ".lock"), f"{out} is being made"), files.naming(out):
    try:
      made = {"join": _join, "pack": _pack, "unpack": _unpack}.get(chosen[0], _prepare)(out)
    except OSError as e:  # errors of a network have no number
      if e.errno:
        raise
      raise ValueError(f"{out}: {e}") from e
  print(f"{out}: {'written' if made else 'complete already, nothing to do'}")


def _verify():
  from lin_jax.manifests import verify

  start = time.perf_counter()
  size = verify(_VERIFY.value)
  print(f"{_VERIFY.value}: as its manifest says; {size / 1e9:.3f} GB in {time.perf_counter() - start:.1f} s")


def _pack(out):
  from corpora import pack

  return pack.pack(pathlib.Path(_PACK.value), out, _TOKENS.value)


def _join(out):
  from corpora import join

  return join.join([pathlib.Path(name) for name in _JOIN.value], out)


def _unpack(out):
  from corpora import unpack

  return unpack.unpack(pathlib.Path(_UNPACK.value), out)


# The corpora are imported where they are used, because unpacking must run with the standard library and JAX alone.
def _prepare(out):
  from corpora import code, shakespeare, tokenize

  cache = pathlib.Path(_CACHE.value)
  if _CORPUS.value == "english":
    from corpora import english

    return english.prepare(out, tier=_TIER.value, seed=_SEED.value, cache=cache,
                           tokenizer=_tokenizer(cache, "mistral"))
  if _CORPUS.value == "code":
    return tokenize.prepare(out, functools.partial(code.documents, cache),
                            tokenize.hash_split(_SEED.value, code.HELD_OUT, code.HELD_OUT),
                            splits=["train", "val", "test"], tokenizer=_tokenizer(cache, "mistral"),
                            recipe=dict(sources=code.sources(cache), rules=code.RULES, seed=_SEED.value))
  if _CORPUS.value == "shakespeare":
    return tokenize.prepare(out, functools.partial(shakespeare.documents, cache), shakespeare.split_of,
                            splits=["train", "val", "test"], recipe=shakespeare.RECIPE,
                            tokenizer=_tokenizer(cache, "bytes"))
  split_of = tokenize.hash_split(_SEED.value, _VAL.value, _TEST.value)
  splits = ["train"] + ["val"] * (_VAL.value > 0) + ["test"] * (_TEST.value > 0)
  stream, recipe = _hub() if _HF_DATASET.value else _files()
  recipe |= dict(split="by a hash of the text", val_fraction=_VAL.value, test_fraction=_TEST.value, seed=_SEED.value)
  # This comes after the checks of the input, because it may download.
  return tokenize.prepare(out, stream, split_of, splits=splits, recipe=recipe, limit=_TOKENS.value,
                          tokenizer=_tokenizer(cache, "mistral"), conversations=_FORMAT.value == "messages")


def _tokenizer(cache, default):
  from corpora import tokenize

  settings = {flag.name: commands.text(flag) for flag in (_SPECIAL, _BOS, _EOS, _PAD) if flag.value}
  if _TEMPLATE.value:
    try:
      settings["chat_template"] = pathlib.Path(_TEMPLATE.value).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
      raise ValueError(f"--chat_template={_TEMPLATE.value}: not readable as UTF-8 ({e})") from e
  return tokenize.find_tokenizer(_TOKENIZER.value or default, cache, **settings)


def _files():
  from corpora import documents

  found = documents.find(_INPUT.value, _FORMAT.value or "")
  options = dict(field=_TEXT_FIELD.value, separator=commands.text(_SEPARATOR))
  if _FORMAT.value:
    options["kind"] = _FORMAT.value
  return functools.partial(documents.read, found, **options), dict(sources=documents.describe(found), **options)


def _hub():
  from corpora import documents

  options = dict(split=_HF_SPLIT.value, revision=_HF_REVISION.value, field=_TEXT_FIELD.value)
  stream = functools.partial(documents.hub, _HF_DATASET.value, **options)
  return stream, dict(sources=[dict(client="hf", package=_HF_DATASET.value, **options)])


if __name__ == "__main__":
  commands.run(main)
