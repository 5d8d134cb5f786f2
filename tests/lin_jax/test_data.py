import hashlib
import json
import math

import numpy as np
import pytest

from lin_jax import files
from lin_jax.data import TokenDataset, Windows, eval_batches, train_iterator
from lin_jax.manifests import describe
from tests.lin_jax.byte_dataset import LENGTHS, config, make_documents, make_masks, write

KEYS = ("tokens", "targets", "segment_ids", "mask")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
  return write(tmp_path_factory.mktemp("data") / "set", make_documents(LENGTHS))


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
  """One document of 2001 ids that are all different, so that a window is known by its first token."""
  return write(tmp_path_factory.mktemp("data") / "numbered", [np.arange(1000, 3001)], shard_tokens=333, vocab_size=4000)


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
  documents = make_documents(LENGTHS)
  return write(tmp_path_factory.mktemp("data") / "masked", documents, vocab_size=70_000, masks=make_masks(documents))


def naive_windows(documents, length, pad, masks=None):
  """Windows position by position, from the definition."""
  stream = [(int(token), number) for number, ids in enumerate(documents) for token in [*ids, 256]]
  answers = [True] * len(stream) if masks is None else np.concatenate(masks)
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
      window["mask"].append(float(here[1] == after[1] and answers[i + 1]))
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


@pytest.mark.parametrize("length, pad", [(1, False), (7, True), (64, True), (390, False)])
def test_a_mask_hides_all_but_the_answers(masked, length, pad):
  documents = make_documents(LENGTHS)
  windows = Windows(TokenDataset(masked, "train"), length, pad=pad)
  expected = naive_windows(documents, length, pad, make_masks(documents))
  for window, naive in zip(windows, expected, strict=True):
    for key in KEYS:
      np.testing.assert_array_equal(window[key], naive[key], err_msg=key)


def test_a_masked_split_counts_the_bytes_of_answers(masked):
  data, masks = TokenDataset(masked, "train"), make_masks(make_documents(LENGTHS))
  assert data.masked and json.loads((masked / "manifest.json").read_text())["version"] == 2
  assert data.bytes_per_token == sum(mask[:-1].sum() for mask in masks) / np.concatenate(masks).sum()
  assert (masked / "train-00000.mask").stat().st_size == 100 == (masked / "train-00000.bin").stat().st_size / 4


def test_a_mask_goes_with_windows_that_carry_no_state(masked):
  with pytest.raises(ValueError, match="carried_windows=2: must be 1 with .*masked, which has a mask of answers"):
    train_iterator(config(masked, carried_windows=2), 0)


@pytest.mark.parametrize("vocab_size, name", [(65_536, "<u2"), (65_537, "<u4")])
def test_the_vocabulary_decides_the_width_of_ids(tmp_path, vocab_size, name):
  path = write(tmp_path / "set", [np.arange(vocab_size - 300, vocab_size)], vocab_size=vocab_size)
  assert json.loads((path / "manifest.json").read_text())["dtype"] == name
  np.testing.assert_array_equal(TokenDataset(path, "train").read(0, 300), np.arange(vocab_size - 300, vocab_size))


def test_a_dataset_of_bytes_is_written_as_it_always_was(tmp_path):
  """The digest covers the checksums of all files, and was computed before ids could have four bytes."""
  path = write(tmp_path / "set", make_documents(LENGTHS))
  assert describe(path)["sha256"] == "d83c5fdb6ed8bdfa1f1302acad6eab6419ca3c0232a950e80931d1bf36e93d32"


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


def test_batches_of_one_row_are_the_rows_of_larger_ones(numbered):
  ones, pairs = (train_iterator(config(numbered, batch_size=rows), 0) for rows in (1, 2))
  np.testing.assert_array_equal(np.concatenate([next(ones)["tokens"] for _ in range(2)]), next(pairs)["tokens"])


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


def test_a_file_is_read_once_for_its_checksum(path, monkeypatch):
  read = []
  monkeypatch.setattr(files, "sha256", lambda file: read.append(file) or hashlib.sha256(file.read_bytes()).hexdigest())
  files._sha256.cache_clear()
  for _ in range(2):
    list(eval_batches(config(path), "train"))
  assert len(read) == len(set(read)) == len(list(path.glob("train*")))


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
