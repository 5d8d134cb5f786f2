"""Datasets of documents: whole documents in splits, resumption to the same bytes, and refused input."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from corpora import documents, tokenize
from lin_jax.data import TokenDataset
from lin_jax.files import sha256
from lin_jax.manifests import read_manifest
from tests.experiments.datasets import SPLITS, TEXTS, content, decoded, interrupt, prepare, tokens


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
      assert shard["sha256"] == sha256(tmp_path / "out" / shard["file"])
  source, = manifest["sources"]
  assert source["package"] == "all.txt" and source["sha256"] == sha256(text_file)
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
