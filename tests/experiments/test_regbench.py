"""RegBench: automata, strings and right answers against the paper's description, and refused settings."""

import numpy as np
import pytest

from synthetic.regbench import Regbench

TASK = Regbench()
BAR, PADDING = 18, 19


@pytest.fixture(scope="module")
def automata():
  return TASK.automata(np.random.default_rng(0), 400)


@pytest.fixture(scope="module")
def batch():
  return TASK.draw(np.random.default_rng(0), 400)


def strings(batch):
  """The strings of each sequence; none is cut."""
  for tokens in batch.tokens:
    text = tokens.tolist()
    length = text.index(PADDING)
    assert set(text[length:]) == {PADDING}
    found = [[]]
    for token in text[:length]:
      found.append([]) if token == BAR else found[-1].append(token)
    yield found


def test_automata_are_as_described():
  tables = TASK.automata(np.random.default_rng(1), 4000)
  edges = tables >= 0
  degrees = edges.sum(axis=-1)
  nodes = (degrees > 0).sum(axis=1)
  np.testing.assert_allclose(np.bincount(nodes)[4:] / 4000, 1 / 9, atol=0.02)
  assert np.array_equal(degrees > 0, np.arange(12) < nodes[:, None])
  np.testing.assert_allclose(np.bincount(degrees[degrees > 0]) / nodes.sum(), [0, 1 / 3, 1 / 3, 1 / 3], atol=0.01)
  for table, n in zip(tables[:500], nodes):
    for state, row in enumerate(table):
      targets = row[row >= 0]
      assert len(set(targets)) == len(targets) and state not in targets and (targets < n).all()
  # A letter of an alphabet of s is missing from all of n states, with two edges on average, with (1 - 2 / s) ** n.
  letters = edges.any(axis=1)
  expected = np.mean([s * (1 - (1 - 2 / s) ** n) for s in range(4, 19) for n in range(4, 13)])
  assert letters.sum(axis=1).mean() == pytest.approx(expected, abs=0.1)
  np.testing.assert_allclose(letters.mean(axis=0), expected / 18, atol=0.03)


def test_targets_are_uniform_over_the_other_states():
  tables = Regbench(max_nodes=4).automata(np.random.default_rng(2), 4000)
  for state in range(4):
    targets = np.bincount(tables[:, state][tables[:, state] >= 0], minlength=4)
    np.testing.assert_allclose(targets / targets.sum(), (np.arange(4) != state) / 3, atol=0.02)


def test_strings_are_as_described(batch):
  number, lengths = [], []
  for found in strings(batch):
    number.append(len(found))
    lengths += [len(string) for string in found]
  shares = np.bincount(number)
  assert shares[:10].sum() == 0 and len(shares) == 20
  np.testing.assert_allclose(shares[10:] / 400, 1 / 10, atol=0.05)
  assert min(lengths) == 1 and max(lengths) == 49
  assert np.mean(lengths) == pytest.approx(25, abs=0.8) and np.std(lengths) == pytest.approx(14.1, abs=0.5)


def test_strings_belong_to_the_language(automata, batch):
  taken = np.zeros((400, 12, 18), int)
  for i, found in enumerate(strings(batch)):
    for string in found:
      state = 0
      for letter in string:
        taken[i, state, letter] += 1
        state = automata[i, state, letter]
        assert state >= 0
  # Of two edges each takes half of the visits, with a binomial's spread.
  two = (automata >= 0).sum(axis=-1) == 2
  first = np.take_along_axis(taken, (automata >= 0).argmax(axis=-1)[..., None], axis=-1)[..., 0]
  visits = taken.sum(axis=-1)
  often = two & (visits >= 20)
  scores = (first - visits / 2)[often] / np.sqrt(visits[often] / 4)
  assert len(scores) > 200
  assert np.mean(scores) == pytest.approx(0, abs=0.15) and np.std(scores) == pytest.approx(1, abs=0.1)


def test_sequences_choose_by_themselves():
  task = Regbench(min_letters=3, max_letters=3)
  batch, automata = (draw(np.random.default_rng(5), 900) for draw in (task.draw, task.automata))
  first = batch.tokens[(automata[:, 0] >= 0).all(axis=1), 0]
  np.testing.assert_allclose(np.bincount(first) / len(first), 1 / 3, atol=0.08)


def test_right_answers_are_the_letters_of_the_state(automata, batch):
  assert batch.allowed.shape == (400, 960, 20) and batch.allowed.dtype == bool
  for i in range(30):
    state = 0
    for t, token in enumerate(batch.tokens[i]):
      if token == PADDING:
        assert not batch.mask[i, t:].any()
        break
      state = 0 if token == BAR else automata[i, state, token]
      right = {letter for letter in range(18) if automata[i, state, letter] >= 0}
      assert set(np.nonzero(batch.allowed[i, t])[0]) == right
      assert batch.mask[i, t] == (batch.targets[i, t] < BAR)
      assert batch.mask[i, t] == 0 or batch.targets[i, t] in right
  assert np.array_equal(batch.targets[:, :-1], batch.tokens[:, 1:])


def test_every_sequence_has_a_language_of_its_own(batch):
  first, second = batch.tokens[::2], batch.tokens[1::2]
  pairs = [[set(zip(a, a[1:])) for a in half.tolist()] for half in (first, second)]
  assert np.mean([a == b for a, b in zip(*pairs)]) < 0.05


def test_batches_and_training():
  task, again = Regbench(training=True), Regbench(training=True)
  batch, same, test = (t.draw(np.random.default_rng(3), 5) for t in (task, again, TASK))
  for name, dtype in (("tokens", np.int32), ("targets", np.int32), ("mask", np.float32)):
    array = getattr(batch, name)
    assert array.dtype == dtype and array.shape == (5, 960)
    assert np.array_equal(array, getattr(same, name)) and np.array_equal(array, getattr(test, name))
  assert batch.allowed is None and test.allowed is not None
  assert not np.array_equal(batch.tokens, task.draw(np.random.default_rng(4), 5).tokens)


def test_short_sequences_are_cut():
  cut, whole = (Regbench(sequence_length=length).draw(np.random.default_rng(0), 5) for length in (64, 960))
  assert cut.tokens.shape == (5, 64) and cut.allowed.shape == (5, 64, 20)
  assert (cut.tokens < PADDING).all()
  assert np.array_equal(cut.tokens == BAR, whole.tokens[:, :64] == BAR)


def test_reduced_setting():
  task = Regbench(sequence_length=512, max_nodes=8, max_letters=10)
  batch = task.draw(np.random.default_rng(0), 50)
  assert task.vocab_size == 12 and batch.tokens.max() == 11 and batch.allowed.shape[-1] == 12


@pytest.mark.parametrize("setting, message", [
    ({"sequence_length": 0}, "sequence_length=0: must be at least 1"),
    ({"max_edges": 0}, "max_edges=0: must be at least 1"),
    ({"max_string_length": 0}, "max_string_length=0: must be at least 1"),
    ({"min_strings": 0}, "min_strings=0: must be at least 1"),
    ({"min_nodes": 13}, "min_nodes=13: must not exceed max_nodes=12"),
    ({"max_letters": 3}, "min_letters=4: must not exceed max_letters=3"),
    ({"min_strings": 20}, "min_strings=20: must not exceed max_strings=19"),
    ({"min_letters": 2}, "min_letters=2: 3 edges of a state have different letters"),
    ({"min_nodes": 3}, "min_nodes=3: 3 edges of a state lead to different other states"),
])
def test_wrong_settings_are_refused(setting, message):
  with pytest.raises(ValueError, match=message):
    Regbench(**setting)
