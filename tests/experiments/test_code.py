"""The corpus of source code: its files, the archive inside Linux's package; and datasets that are joined."""

import io
import tarfile

import numpy as np
import pytest

from corpora import code, dataset, join
from lin_jax.data import TokenDataset
from lin_jax.manifests import read_manifest, verify
from lin_jax.tokenizer import ByteTokenizer
from tests.experiments.datasets import deb

LONG = "x = 1\n" * 50


def test_files_are_documents_once_and_of_middling_size(tmp_path, monkeypatch):
  inner = io.BytesIO()
  with tarfile.open(fileobj=inner, mode="w:xz") as tar:
    for name, text in (("linux/mm/a.c", LONG + "1"), ("linux/sound/b.c", LONG + "2"), ("linux/fs/c.txt", LONG + "3")):
      info = tarfile.TarInfo(name)
      info.size = len(text)
      tar.addfile(info, io.BytesIO(text.encode()))
  files = {"linux-source-6.1": {"usr/src/linux.tar.xz": inner.getvalue()},
           "rust-src": {"a.rs": LONG.encode(), "b.rs": LONG.encode(), "c.rs": b"short", "d.rs": b"\xff" * 300,
                        "e.py": LONG.encode() + b"4", "f.rs": b"y" * 300_000}}
  packages = {name: deb(tmp_path / f"{name}_1.0_all.deb", members) for name, members in files.items()}
  monkeypatch.setattr(code.apt, "packages", lambda names, cache: packages)
  assert [(d.source, d.name) for d in code.documents(tmp_path)] == [("linux-source-6.1", "linux/mm/a.c"),
                                                                    ("rust-src", "a.rs")]
  assert [d.name for d in code.documents(tmp_path, 1)] == ["a.rs"]
  with pytest.raises(ValueError, match="deb:golang-1.19-src: not in this machine's apt sources"):
    code.sources(tmp_path)


def made(path, lengths, begin):
  """A dataset whose splits have documents of the given lengths."""
  work = dataset.begin(path, {"name": path.name})
  with dataset.DatasetWriter(work, list(lengths), shard_tokens=8) as writer:
    for split, sizes in lengths.items():
      for size in sizes:
        writer.add(split, np.arange(begin, begin + size), size)
    writer.finish(path, tokenizer=ByteTokenizer(), recipe={"name": path.name}, manifest={"sources": []})
  return path


def test_joined_datasets_keep_held_out_text_apart(tmp_path):
  lengths = {"train": [5, 12], "val": [4], "test": [3], "val_prose": [4], "long": [9], "recall": [3, 7]}
  english = made(tmp_path / "english", lengths, 0)
  source = made(tmp_path / "code", {"train": [6], "val": [2, 2], "test": [5]}, 100)
  assert join.join([english, source], tmp_path / "both") and not join.join([english, source], tmp_path / "both")
  verify(tmp_path / "both")
  data = TokenDataset(tmp_path / "both", "train")
  parts = [TokenDataset(folder, "train").read(0, size) for folder, size in ((english, 17), (source, 6))]
  np.testing.assert_array_equal(data.read(0, 23), np.concatenate(parts))
  assert data.document_starts.tolist() == [0, 5, 17] and data.bytes == 23
  sizes = {split: TokenDataset(tmp_path / "both", split).tokens for split in (
      "val", "test", "val_english", "val_code", "test_english", "test_code")}
  assert list(sizes.values()) == [8, 8, 4, 4, 3, 5]
  # One source alone has recall and long, and its parts of val stay out.
  assert {*read_manifest(tmp_path / "both")["splits"]} == {"train", "recall", "long", *sizes}
  recall, own = (TokenDataset(folder, "recall") for folder in (tmp_path / "both", english))
  np.testing.assert_array_equal(recall.read(0, 10), own.read(0, 10))
  assert recall.document_starts.tolist() == [0, 3] and recall.bytes == recall.tokens == 10
  with pytest.raises(ValueError, match="must name two or more datasets with different names"):
    join.join([english, english], tmp_path / "twice")
