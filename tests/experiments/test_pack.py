"""Datasets that are packed, carried and unpacked."""

import lzma

import pytest

from corpora import pack, unpack
from lin_jax.data import TokenDataset
from tests.experiments.datasets import SPLITS, decoded, prepare, tokens


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
