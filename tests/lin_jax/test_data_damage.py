"""Datasets that are damaged, before or while they are read."""

import hashlib
import io
import json

import numpy as np
import pytest

from lin_jax.data import TokenDataset, Windows
from lin_jax.manifests import verify
from tests.lin_jax.byte_dataset import LENGTHS, make_documents, make_masks, write


def edit(path, change):
  manifest = json.loads((path / "manifest.json").read_text())
  change(manifest)
  (path / "manifest.json").write_text(json.dumps(manifest))


def set_id(path, file="train-00000.bin", offset=6, value=65):
  """Changes one byte."""
  with open(path / file, "r+b") as f:
    f.seek(offset)
    f.write(bytes([f.read(1)[0] ^ value]))


def set_index(path, content):
  (path / "train.idx.npy").write_bytes(content)
  edit(path, lambda m: m["splits"]["train"]["index"].update(sha256=hashlib.sha256(content).hexdigest()))


def npy(array):
  np.save(file := io.BytesIO(), array)
  return file.getvalue()


DAMAGE = {
    "no directory": (lambda p: p.rename(p.with_name("elsewhere")), "no such directory"),
    "no manifest": (lambda p: (p / "manifest.json").unlink(), "no manifest.json"),
    "manifest is not JSON": (lambda p: (p / "manifest.json").write_text("{"), "not readable as JSON"),
    "manifest is a chain": (lambda p: (p / "manifest.json").write_text("[" * 10**6), "not readable as JSON"),
    "manifest of something else": (lambda p: (p / "manifest.json").write_text("[]"), "must be a manifest of format"),
    "manifest without splits": (lambda p: edit(p, lambda m: m.pop("splits")), "incomplete or malformed: .*splits"),
    "later version": (lambda p: edit(p, lambda m: m.update(version=3)), "version 3"),
    "other dtype": (lambda p: edit(p, lambda m: m.update(dtype="<i8")), "dtype '<i8': .* reads '<u2' and '<u4'"),
    "dtype of others": (lambda p: edit(p, lambda m: m.update(dtype="<u4")), "200 bytes: the manifest says 400"),
    "shard truncated": (lambda p: (p / "train-00001.bin").write_bytes(b"\0" * 198), "198 bytes: .* says 200"),
    "shard missing": (lambda p: (p / "train-00001.bin").unlink(), "train-00001.bin: .*not readable"),
    "index missing": (lambda p: (p / "train.idx.npy").unlink(), "train.idx.npy: .*not readable"),
    "index foreign": (lambda p: set_index(p, np.zeros(3, np.uint64).tobytes()), "train.idx.npy: not readable as a doc"),
    "index of others": (lambda p: set_index(p, npy(np.zeros(3, np.uint64))), "uint64.3.: must hold"),
    "index truncated": (lambda p: (p / "train.idx.npy").write_bytes(b"\x93NUMPY"), "train.idx.npy: has SHA-256"),
    "id changed": (set_id, "train-00000.bin: has SHA-256 .*: the manifest says .* so it was changed"),
    "index changed": (lambda p: set_id(p, "train.idx.npy", 128 + 8), "train.idx.npy: has SHA-256"),
    "checksum missing": (lambda p: edit(p, lambda m: m["splits"]["train"]["shards"][0].pop("sha256")), "incomplete"),
}


MASK_DAMAGE = {
    "mask truncated": (lambda p: (p / "train-00001.mask").write_bytes(b"\1" * 99), "99 bytes: .* says 100"),
    "mask missing": (lambda p: (p / "train-00001.mask").unlink(), "train-00001.mask: .*not readable"),
    "mask changed": (lambda p: set_id(p, "train-00000.mask", value=1), "train-00000.mask: has SHA-256"),
    "mask of one shard absent": (lambda p: edit(p, lambda m: m["splits"]["train"]["shards"][0].pop("mask")), "'mask'"),
    "no answers": (lambda p: edit(p, lambda m: m["splits"]["train"]["answers"].update(tokens=0)), "no token of an ans"),
}


@pytest.mark.parametrize("damage, message", MASK_DAMAGE.values(), ids=MASK_DAMAGE)
def test_a_damaged_mask_is_refused(tmp_path, damage, message):
  documents = make_documents(LENGTHS)
  path = write(tmp_path / "set", documents, masks=make_masks(documents))
  damage(path)
  with pytest.raises(ValueError, match=message):
    Windows(TokenDataset(path, "train"), 16)[0]
  if "mask" in message:
    with pytest.raises(ValueError, match=r"train-0000\d.mask: |'mask'"):
      verify(path)


@pytest.mark.parametrize("damage, message", DAMAGE.values(), ids=DAMAGE)
def test_damaged_data_is_refused(tmp_path, damage, message):
  path = write(tmp_path / "set", make_documents(LENGTHS))
  damage(path)
  with pytest.raises(ValueError, match=message):
    Windows(TokenDataset(path, "train"), 16)[0]


def test_a_shard_that_is_cut_short_while_it_is_read_is_a_message_and_no_signal(tmp_path):
  windows = Windows(TokenDataset(write(tmp_path / "set", make_documents(LENGTHS)), "train"), 16)
  windows[0], windows[6]
  for name in ("train-00000.bin", "train-00001.bin"):
    with open(tmp_path / "set" / name, "r+b") as file:
      file.truncate(20)
  with pytest.raises(ValueError, match="train-00000.bin: ends before id 33: it was cut short after it was opened"):
    windows[1]
  (tmp_path / "set" / "train-00001.bin").unlink()
  with pytest.raises(ValueError, match="train-00001.bin: no longer readable"):
    windows[7]


def test_a_dataset_is_verified_whole_and_every_fault_named(tmp_path):
  path = write(tmp_path / "set", make_documents(LENGTHS))
  assert verify(path) == sum(file.stat().st_size for file in path.glob("train*"))
  set_id(path)
  (path / "train.idx.npy").unlink()
  with pytest.raises(ValueError, match="train.idx.npy: .*not readable.*; .*train-00000.bin: has SHA-256"):
    verify(path)
