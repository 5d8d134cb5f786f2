"""Datasets that are packed, carried and unpacked."""

import lzma

import numpy as np
import pytest

from corpora import pack, unpack
from lin_jax.data import TokenDataset
from lin_jax.manifests import verify
from tests.experiments.datasets import SPLITS, decoded, prepare, tokens
from tests.lin_jax.byte_dataset import LENGTHS, make_documents, make_masks, write


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


@pytest.mark.parametrize("limit", [0, 300])
def test_masks_and_wide_ids_are_packed_too(tmp_path, limit):
  documents = make_documents(LENGTHS)
  write(tmp_path / "set", documents, vocab_size=257 if limit else 70_000, masks=make_masks(documents))
  pack.pack(tmp_path / "set", tmp_path / "packed", limit)
  unpack.unpack(tmp_path / "packed", tmp_path / "again")
  verify(tmp_path / "again")
  before, after = (TokenDataset(tmp_path / name, "train") for name in ("set", "again"))
  assert after.masked and limit - 200 < after.tokens <= (limit or before.tokens)
  for read in ("read", "read_mask"):
    np.testing.assert_array_equal(getattr(after, read)(0, after.tokens), getattr(before, read)(0, after.tokens))
  spelled = after.read(0, after.tokens)[after.read_mask(0, after.tokens)] < 256
  assert after.bytes_per_token == spelled.mean()


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
