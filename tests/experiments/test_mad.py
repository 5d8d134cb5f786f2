"""The MAD tasks: answers found again from the tokens alone, vocabularies, rates, and refused settings."""

import dataclasses
import itertools

import numpy as np
import pytest

from synthetic.mad import Compression, FuzzyRecall, InContextRecall, Memorization, NoisyRecall, SelectiveCopying

TASKS = [InContextRecall, NoisyRecall, FuzzyRecall, SelectiveCopying, Compression, Memorization]
RECALL = [InContextRecall, NoisyRecall, FuzzyRecall]
COUNT = 300


def changed(task):
  """The baseline and every change of one field."""
  yield task()
  if task in RECALL:
    yield task(training=True)
  yield from (task(**{name: value}) for name, values in task.changes.items() for value in values)


def drawn(task, seed=0, count=COUNT):
  return task.draw(np.random.default_rng(seed), count)


@pytest.mark.parametrize("task", TASKS)
def test_changes_draw_what_a_batch_promises(task):
  for setting in changed(task):
    batch = drawn(setting, count=2)
    for array, dtype in ((batch.tokens, np.int32), (batch.targets, np.int32), (batch.mask, np.float32)):
      assert array.shape == (2, setting.sequence_length) and array.dtype == dtype
    assert batch.tokens.min() >= 0 and batch.tokens.max() < setting.vocab_size
    assert batch.targets.min() >= 0 and batch.targets.max() < setting.vocab_size
    assert set(np.unique(batch.mask)) <= {0, 1} and (batch.mask.sum(axis=1) > 0).all()


@pytest.mark.parametrize("task", TASKS)
def test_seed_decides(task):
  first, again, other = drawn(task(), 1, 5), drawn(task(), 1, 5), drawn(task(), 2, 5)
  assert all(np.array_equal(getattr(first, name), getattr(again, name)) for name in ("tokens", "targets", "mask"))
  assert not np.array_equal(first.tokens, other.tokens)


def recalled(tokens, keys, symbols):
  """Position -> answer of every key in `tokens` that was seen before; a pair is a key and a value beside each other."""
  values, answers = {}, {}
  for t, (key, value) in enumerate(itertools.pairwise(tokens)):
    if t % 2 == 0 and key < keys:
      assert keys <= value < symbols and values.get(key, value) == value
      if key in values:
        answers[t] = value
      values[key] = value
  return answers


@pytest.mark.parametrize("task, keys, symbols", [(InContextRecall(), 8, 16), (NoisyRecall(), 8, 16),
                                                 (NoisyRecall(sequence_length=8, noise_fraction=0.9), 8, 16),
                                                 (InContextRecall(vocab_size=128), 64, 128)])
def test_recall_asks_for_every_key_seen_before(task, keys, symbols):
  batch = drawn(task)
  for tokens, targets, mask in zip(batch.tokens, batch.targets, batch.mask):
    answers = recalled(tokens.tolist(), keys, symbols)
    assert answers == {t: targets[t] for t in np.nonzero(mask)[0]}
    assert len(tokens) - 2 in answers


def test_recall_uses_all_keys_and_values_evenly():
  tokens = drawn(InContextRecall(), count=2000).tokens
  for part, offset in ((tokens[:, ::2], 0), (tokens[:, 1::2], 8)):
    shares = np.bincount(part.ravel() - offset) / part.size
    assert shares.shape == (8,)
    np.testing.assert_allclose(shares, 1 / 8, atol=0.008)
  # Each sequence has a map of its own: all 64 pairs occur.
  assert len(set(zip(tokens[:, ::2].ravel(), tokens[:, 1::2].ravel()))) == 64


@pytest.mark.parametrize("fraction", [0.2, 0.8])
def test_noise_takes_its_share_of_pairs(fraction):
  tokens = drawn(NoisyRecall(noise_fraction=fraction), count=2000).tokens
  noisy = tokens >= 16
  assert np.array_equal(noisy[:, ::2], noisy[:, 1::2])
  assert not noisy[:, -2:].any() and (~noisy[:, :-2]).any(axis=1).all()
  # One pair of the body's 63 is never noise.
  assert noisy[:, :-2].mean() == pytest.approx(fraction * 62 / 63, abs=0.006)
  np.testing.assert_allclose(np.bincount(tokens[noisy] - 16) / noisy.sum(), 1 / 16, atol=0.005)


@pytest.mark.parametrize("task", RECALL)
def test_recall_trains_on_every_next_token(task):
  batch = drawn(task(training=True))
  assert np.array_equal(batch.targets[:, :-1], batch.tokens[:, 1:])
  assert batch.mask[:, :-1].all() and not batch.mask[:, -1].any()


def motif_pairs(tokens, keys, pad):
  """[(start of the value, key, value)]: a key's motif ends where tokens of the upper half begin."""
  runs, t = [], 0
  for _, run in itertools.groupby(tokens, key=lambda token: (token >= keys) + (token == pad)):
    run = tuple(run)
    runs.append((t, run))
    t += len(run)
  if runs[0][1][0] == pad:
    runs = runs[1:]
  assert pad not in itertools.chain(*(run for _, run in runs)) and len(runs) % 2 == 0
  return [(start, key, value) for (_, key), (start, value) in zip(runs[::2], runs[1::2])]


@pytest.mark.parametrize("task", [FuzzyRecall(), FuzzyRecall(vocab_size=32, sequence_length=64, key_motif=2)])
def test_fuzzy_recall_asks_for_every_key_seen_before(task):
  batch, pad = drawn(task), task.vocab_size - 1
  value_sizes, repeated, of_first = [], 0, 0
  for tokens, targets, mask in zip(batch.tokens, batch.targets, batch.mask):
    pairs, values, answers = motif_pairs(tokens.tolist(), pad // 2, pad), {}, {}
    for start, key, value in pairs:
      assert len(key) == task.key_motif == len(set(key)) and len(set(value)) == len(value) <= task.value_motif
      if key in values:
        assert values[key] == value
        answers.update((start - 1 + i, symbol) for i, symbol in enumerate(value))
      values[key] = value
    assert answers == {t: targets[t] for t in np.nonzero(mask)[0]}
    assert len(tokens) - 2 in answers
    assert len(tokens) - sum(len(key) + len(value) for _, key, value in pairs) < 2 * (task.key_motif + task.value_motif)
    value_sizes += [len(value) for value in values.values()]
    repeated += len(pairs) - len(values) > 1
    of_first += pairs[-1][1] == pairs[0][1]
  np.testing.assert_allclose(np.bincount(value_sizes)[1:] / len(value_sizes), 1 / task.value_motif, atol=0.04)
  # Keys repeat in the body too, and the probe may be any pair of it.
  assert repeated and 0 < of_first < COUNT / 4


def test_fuzzy_recall_trains_on_keys_of_all_sizes():
  batch = drawn(FuzzyRecall(training=True), count=1000)
  # The probe is chosen among a body's pairs, so it tells the sizes without the cut at the body's end.
  keys = [motif_pairs(tokens.tolist(), 7, 15)[-1][1] for tokens in batch.tokens]
  np.testing.assert_allclose(np.bincount([len(key) for key in keys])[1:] / 1000, 1 / 3, atol=0.05)
  triples = {key for tokens in batch.tokens for _, key, _ in motif_pairs(tokens.tolist(), 7, 15) if len(key) == 3}
  assert triples == set(itertools.permutations(range(7), 3))


def test_selective_copying_says_the_tokens_in_order():
  task = SelectiveCopying()
  batch = drawn(task)
  ask, blank, first = 15, 14, task.sequence_length - task.copies
  for tokens, targets in zip(batch.tokens, batch.targets):
    assert tokens[first - 1] == ask and (tokens[first:] == blank).all()
    assert [token for token in tokens[:first - 1] if token != blank] == targets[first:].tolist()
    assert tokens[first - 2] != blank
  assert not batch.mask[:, :first].any() and batch.mask[:, first:].all()
  copied = batch.targets[:, first:]
  np.testing.assert_allclose(np.bincount(copied.ravel()) / copied.size, 1 / 14, atol=0.02)
  # 223 blanks over 16 gaps: the first token stands behind 223 / 16 of them on average.
  where = np.argmax(batch.tokens != blank, axis=1)
  assert where.mean() == pytest.approx(223 / 16, abs=1) and where.std() == pytest.approx(3.6, abs=0.6)


def test_compression_gives_the_sequence_back():
  batch = drawn(Compression())
  assert Compression.decodes_last
  assert np.array_equal(batch.tokens, batch.targets) and batch.mask.all()
  assert (batch.tokens[:, -1] == 15).all()
  body = batch.tokens[:, :-1]
  np.testing.assert_allclose(np.bincount(body.ravel()) / body.size, 1 / 15, atol=0.015)


def test_memorization_has_one_table_for_all_sequences():
  task = Memorization()
  batches = [drawn(task, seed) for seed in (0, 1)]
  table = {}
  for batch in batches:
    assert (batch.tokens[:, 1::2] == 255).all()
    assert not batch.mask[:, ::2].any() and batch.mask[:, 1::2].all()
    for key, value in zip(batch.tokens[:, ::2].ravel(), batch.targets[:, 1::2].ravel()):
      assert table.setdefault(key, value) == value
  assert sorted(table) == list(range(127))
  assert len(set(table.values())) == 127 and set(table.values()) <= set(range(127, 255))
  assert list(table.values()) != sorted(table.values())
  assert not np.array_equal(task.table(), Memorization(table_seed=1).table())


@pytest.mark.parametrize("task, setting, message", [
    (InContextRecall, {"sequence_length": 127}, "sequence_length=127: must be even"),
    (InContextRecall, {"vocab_size": 1}, "vocab_size=1: must be at least 2 to hold a key, a value"),
    (NoisyRecall, {"vocab_size": 16}, "vocab_size=16: must be at least 18"),
    (NoisyRecall, {"noise_fraction": 1.0}, r"noise_fraction=1.0: must be in \[0, 1\)"),
    (NoisyRecall, {"noise_vocab_size": 0}, "noise_vocab_size=0: noise needs"),
    (FuzzyRecall, {"vocab_size": 6}, "vocab_size=6: half of it"),
    (FuzzyRecall, {"key_motif": 0}, "key_motif=0, value_motif=3: each must be"),
    (FuzzyRecall, {"sequence_length": 11}, r"sequence_length=11: must hold two pairs of 3 \+ 3"),
    (SelectiveCopying, {"copies": 128}, "sequence_length=256, copies=128: .* greater than"),
    (SelectiveCopying, {"copies": 0}, "copies=0: copies must be positive"),
    (SelectiveCopying, {"vocab_size": 2}, "vocab_size=2: must be at least 3"),
    (Compression, {"vocab_size": 1}, "vocab_size=1: must be at least 2"),
    (Compression, {"sequence_length": 1}, "sequence_length=1: must be at least 2"),
    (Memorization, {"vocab_size": 2}, "vocab_size=2: must be at least 3"),
    (Memorization, {"sequence_length": 31}, "sequence_length=31: must be even"),
])
def test_wrong_settings_are_refused(task, setting, message):
  with pytest.raises(ValueError, match=message):
    task(**setting)


@pytest.mark.parametrize("task, smallest", [
    (InContextRecall, {"vocab_size": 2, "sequence_length": 4}), (FuzzyRecall, {"vocab_size": 7, "sequence_length": 12}),
    (NoisyRecall, {"vocab_size": 18}), (SelectiveCopying, {"vocab_size": 3, "sequence_length": 4, "copies": 1}),
    (Compression, {"vocab_size": 2, "sequence_length": 2}), (Memorization, {"vocab_size": 3, "sequence_length": 2}),
])
def test_smallest_settings_draw(task, smallest):
  setting = dataclasses.replace(task(), **smallest)
  assert setting.draw(np.random.default_rng(0), 20).tokens.max() < setting.vocab_size
