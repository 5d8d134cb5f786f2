import hashlib
import io
import json
import math
import types

import numpy as np
import pytest

from corpora import dataset
from lin_jax import files
from lin_jax.config import DataConfig
from lin_jax.data import TokenDataset, Windows, eval_batches, train_iterator
from lin_jax.manifests import describe, verify

KEYS = ("tokens", "targets", "segment_ids", "mask")


def write(path, documents, shard_tokens=100, vocab_size=257):
  """A dataset of `documents`, byte arrays, in shards short enough that windows cross them."""
  work = dataset.begin(path, {"documents": len(documents)})
  writer = dataset.DatasetWriter(work, ["train"], shard_tokens=shard_tokens)
  for ids in documents:
    writer.add("train", np.append(ids, 256), len(ids))
  tokenizer = types.SimpleNamespace(name="bytes", vocab_size=vocab_size, eos_id=256)
  writer.finish(path, tokenizer=tokenizer, tokenizer_file=None, recipe={}, manifest={})
  return path


def make_documents(lengths, seed=0):
  random = np.random.default_rng(seed)
  return [random.integers(0, 256, length) for length in lengths]


LENGTHS = [5, 0, 0, 31, 32, 150, 1, 64, 7, 90, 3]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
  return write(tmp_path_factory.mktemp("data") / "set", make_documents(LENGTHS))


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
  """One document of 2001 ids that are all different, so that a window is known by its first token."""
  return write(tmp_path_factory.mktemp("data") / "numbered", [np.arange(1000, 3001)], shard_tokens=333, vocab_size=4000)


def config(path, **options):
  return DataConfig(path=str(path), **{"sequence_length": 16, "batch_size": 4, "worker_threads": 0, **options})


def naive_windows(documents, length, pad):
  """Windows position by position, from the definition."""
  stream = [(int(token), number) for number, ids in enumerate(documents) for token in [*ids, 256]]
  windows = []
  for start in range(0, len(stream) - 1, length):
    if start + length + 1 > len(stream) and not pad:
      break
    window, first = {key: [] for key in KEYS}, stream[start][1]
    for i in range(start, start + length):
      here = stream[i] if i < len(stream) else (0, stream[-1][1] + 1)
      after = stream[i + 1] if i + 1 < len(stream) else (0, None)
      window["tokens"].append(here[0])
      window["targets"].append(after[0])
      window["segment_ids"].append(here[1] - first + 1)
      window["mask"].append(float(here[1] == after[1]))
    windows.append(window)
  return windows


@pytest.mark.parametrize("length", [1, 7, 16, 64, 390])
@pytest.mark.parametrize("pad", [False, True])
def test_windows_equal_the_definition(path, length, pad):
  windows = Windows(TokenDataset(path, "train"), length, pad=pad)
  expected = naive_windows(make_documents(LENGTHS), length, pad)
  assert len(windows) == len(expected)
  for window, naive in zip(windows, expected, strict=True):
    for key in KEYS:
      np.testing.assert_array_equal(window[key], naive[key], err_msg=key)
    assert [window[key].dtype for key in KEYS] == [np.int32] * 3 + [np.float32]


def test_without_resets_a_window_is_one_segment_and_predicts_everything(path):
  window = Windows(TokenDataset(path, "train"), 390, reset_at_documents=False)[0]
  assert set(window["segment_ids"]) == {1} and window["mask"].all()


def test_shapes_counts_and_bytes(path):
  data = TokenDataset(path, "train")
  assert (data.tokens, data.documents, data.bytes) == (sum(LENGTHS) + len(LENGTHS), len(LENGTHS), sum(LENGTHS))
  assert data.bytes_per_token == sum(LENGTHS) / (sum(LENGTHS) + len(LENGTHS))
  batch = next(train_iterator(config(path, batch_size=3, sequence_length=20), 0))
  assert {key: (value.shape, value.dtype.name) for key, value in batch.items()} == {
      "tokens": ((3, 20), "int32"), "targets": ((3, 20), "int32"), "segment_ids": ((3, 20), "int32"),
      "mask": ((3, 20), "float32")}


def test_an_epoch_holds_every_target_once_and_the_next_one_is_shuffled_anew(numbered):
  iterator = train_iterator(config(numbered, batch_size=5), seed=3)
  epochs = [np.concatenate([next(iterator)["targets"] for _ in range(25)]) for _ in range(2)]
  for epoch in epochs:
    np.testing.assert_array_equal(np.sort(epoch.ravel()), np.arange(1001, 3001))
  assert not np.array_equal(*epochs)
  assert not np.array_equal(np.sort(epochs[0][:, 0]), epochs[0][:, 0])


def test_the_seed_decides_the_order(numbered):
  first, same, other = (next(train_iterator(config(numbered), seed))["tokens"] for seed in (1, 1, 2))
  np.testing.assert_array_equal(first, same)
  assert not np.array_equal(first, other)
  plain = next(train_iterator(config(numbered, shuffle=False), 1))["tokens"]
  np.testing.assert_array_equal(plain.ravel(), np.arange(1000, 1064))


@pytest.mark.parametrize("threads", [0, 3])
def test_a_restored_iterator_continues_exactly(numbered, threads):
  options = config(numbered, batch_size=7, worker_threads=threads)
  iterator = train_iterator(options, seed=5)
  for _ in range(20):
    next(iterator)
  state = json.loads(json.dumps(iterator.get_state()))
  # Past the end of the first epoch, where the next shuffle begins.
  expected = [next(iterator)["tokens"] for _ in range(10)]
  resumed = train_iterator(options, seed=5)
  resumed.set_state(state)
  np.testing.assert_array_equal([next(resumed)["tokens"] for _ in range(10)], expected)


def test_worker_threads_do_not_change_the_batches(numbered):
  plain, threaded = (train_iterator(config(numbered, worker_threads=threads), 0) for threads in (0, 4))
  for _ in range(40):
    np.testing.assert_array_equal(next(plain)["tokens"], next(threaded)["tokens"])


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_the_global_batches(numbered, count):
  whole = train_iterator(config(numbered, batch_size=4), 0)
  parts = [train_iterator(config(numbered, batch_size=4), 0, process_index=i, process_count=count)
           for i in range(count)]
  for _ in range(40):
    rows = [row for part in parts for row in next(part)["tokens"][:, 0]]
    assert len(set(rows)) == 4
    assert sorted(rows) == sorted(next(whole)["tokens"][:, 0])


def visible(batches):
  return np.concatenate([batch["targets"][batch["mask"] > 0] for batch in batches])


@pytest.mark.parametrize("count", [1, 2])
def test_evaluation_covers_the_split_once_in_order(numbered, count):
  passes = [eval_batches(config(numbered, sequence_length=30), "train", process_index=i, process_count=count)
            for i in range(count)]
  # 2001 targets (the end id among them) in windows of 30: 67 of them, in 17 batches of 4 rows, the last one short.
  assert [len(batches) for batches in passes] == [17] * count
  targets = np.concatenate([visible(batches) for batches in passes])
  np.testing.assert_array_equal(np.sort(targets), np.append(256, np.arange(1001, 3001)))
  if count == 1:
    np.testing.assert_array_equal(targets[:-1], np.arange(1001, 3001))
  for batch in passes[0]:
    assert batch["tokens"].shape == (4 // count, 30) and batch["segment_ids"].min() == 1
  assert not passes[-1][16]["mask"][-1].any()


def test_every_pass_of_an_evaluation_is_the_same(path):
  batches = eval_batches(config(path), "train")
  for first, second in zip(list(batches), batches, strict=True):
    for key in KEYS:
      np.testing.assert_array_equal(first[key], second[key])


def test_a_short_evaluation_spreads_over_the_split(numbered):
  batches = eval_batches(config(numbered, sequence_length=10), "train", 5)
  starts = np.concatenate([batch["tokens"][:, 0] for batch in batches])
  assert len(batches) == 5
  assert len(set(np.diff(starts))) <= 2 and np.diff(starts).min() >= 100 and starts[-1] >= 2900


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
    "later version": (lambda p: edit(p, lambda m: m.update(version=2)), "version 2"),
    "other dtype": (lambda p: edit(p, lambda m: m.update(dtype="<u4")), "dtype '<u4'"),
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


def test_a_file_is_read_once_for_its_checksum(path, monkeypatch):
  read = []
  monkeypatch.setattr(files, "sha256", lambda file: read.append(file) or hashlib.sha256(file.read_bytes()).hexdigest())
  files._sha256.cache_clear()
  for _ in range(2):
    list(eval_batches(config(path), "train"))
  assert len(read) == len(set(read)) == len(list(path.glob("train*")))


def test_a_dataset_is_verified_whole_and_every_fault_named(tmp_path):
  path = write(tmp_path / "set", make_documents(LENGTHS))
  assert verify(path) == sum(file.stat().st_size for file in path.glob("train*"))
  set_id(path)
  (path / "train.idx.npy").unlink()
  with pytest.raises(ValueError, match="train.idx.npy: .*not readable.*; .*train-00000.bin: has SHA-256"):
    verify(path)


def test_a_description_tells_datasets_apart(tmp_path):
  one, same, other = (write(tmp_path / name, make_documents(LENGTHS, seed)) for name, seed in zip("abc", (0, 0, 1)))
  first = describe(one)
  assert first["train_tokens"] == sum(LENGTHS) + len(LENGTHS) and first["path"] == str(one)
  assert first["sha256"] == describe(same)["sha256"] != describe(other)["sha256"]


def test_an_unknown_split_is_refused(path):
  with pytest.raises(ValueError, match="no split 'val': it has train"):
    TokenDataset(path, "val")


def test_an_empty_split_is_refused(tmp_path):
  with pytest.raises(ValueError, match="split 'train' is empty"):
    TokenDataset(write(tmp_path / "set", []), "train")


def test_ids_outside_the_vocabulary_are_refused(path):
  TokenDataset(path, "train", vocab_size=257)
  for make in (lambda: TokenDataset(path, "train", vocab_size=256),
               lambda: train_iterator(config(path), 0, vocab_size=256),
               lambda: eval_batches(config(path), "train", vocab_size=256)):
    with pytest.raises(ValueError, match="token id 256: ids must be less than the model's vocab_size=256"):
      make()


def test_a_sequence_longer_than_the_split_is_refused(path):
  longest = sum(LENGTHS) + len(LENGTHS) - 1
  assert len(Windows(TokenDataset(path, "train"), longest)) == 1
  for make in (lambda c: train_iterator(c, 0), lambda c: eval_batches(c, "train")):
    with pytest.raises(ValueError, match=f"sequence_length={longest + 1}: must be less than"):
      make(config(path, sequence_length=longest + 1))


def test_processes_must_divide_the_batch(path):
  with pytest.raises(ValueError, match="batch_size=4: must be divisible by the 3 processes"):
    train_iterator(config(path), 0, process_index=0, process_count=3)


def test_bits_per_byte_of_a_uniform_model(path):
  data = TokenDataset(path, "train")
  loss = math.log(256)
  # 8 bits a token, and fewer bytes than tokens because of the end ids.
  assert loss / math.log(2) / data.bytes_per_token == pytest.approx(8 * data.tokens / data.bytes)
