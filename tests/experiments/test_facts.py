"""Questions on fields of pages, whose places are known, and models that copy as far back as they are told."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from corpora import dataset
from language import facts
from lin_jax.config import DataConfig
from lin_jax.generate import generate
from lin_jax.model import LanguageModel
from lin_jax.tokenizer import ByteTokenizer
from tests.experiments.datasets import PROSE
from tests.forked import Command
from tests.lin_jax import tiny

LENGTH, FIELDS = 256, 60
NEAR, FAR = (0, 128), (128, 256)
HEIGHT = 5.0  # the copying model's logit of the token that it expects; the 256 others have 0
RIGHT_LOSS = math.log1p(256 * math.exp(-HEIGHT))


def page(number, lines=(), at=30):
  """A page of lines `Field: value`, each with a name and a value of its own, and further `lines` in their midst."""
  own = [f"{chr(97 + i // 26)}{chr(97 + i % 26)}: {number}{i:02d}-{i * 37 % 91:02d}" for i in range(FIELDS)]
  return "\n".join([*own[:at], *lines, *own[at:], "the end"])


def write(path, pages, **others):
  """A dataset of bytes whose split recall has the pages. `others` are the documents of further splits."""
  work = dataset.begin(path, {})
  with dataset.DatasetWriter(work, ["recall", *others]) as writer:
    for split, texts in {"recall": pages, **others}.items():
      for text in texts:
        writer.add(split, np.array([*text.encode(), ByteTokenizer.eos_id]), len(text))
    writer.finish(path, tokenizer=ByteTokenizer(), recipe={}, manifest={"sources": []})
  return path


def config(path, **fields):
  return DataConfig(path=str(path), **{"sequence_length": LENGTH, "batch_size": 5} | fields)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  return config(write(tmp_path_factory.mktemp("facts") / "data", [page(number) for number in (1, 2, 3)]))


@pytest.fixture(scope="module")
def asked(data):
  return facts.questions(data)


def text(ids):
  return bytes(ids.astype(np.uint8)).decode()


def test_ranges_double():
  assert facts.ranges(64) == [(0, 64)] and facts.ranges(128) == [(0, 128)]
  assert facts.ranges(2048) == [(0, 128), (128, 256), (256, 512), (512, 1024), (1024, 2048)]
  assert facts.ranges(300) == [(0, 128), (128, 256), (256, 300)]


def test_the_value_stands_in_the_context_and_in_no_control(asked):
  pages = [page(number).encode() for number in (1, 2, 3)]
  for question in asked:
    fact, read = f"{question.name}: {question.value}\n", {kind: text(ids) for kind, ids in question.contexts.items()}
    assert fact.encode() in pages[question.page] and text(question.answer) == f" {question.value}"
    assert read["page"].count(fact) == 1 and read["page"].count(question.value) == 1
    begin = read["page"].index(fact) + len(question.name) + 1
    assert len(read["page"]) - begin == question.distance
    assert read["page"][begin:begin + len(question.answer)] == text(question.answer)
    # The context is a stretch of the page that fills the model's, then comes the name alone.
    stretch, question_text = read["page"].rsplit("\n", 1)
    assert question_text == f"{question.name}:" and stretch.encode() in pages[question.page]
    assert len(read["page"]) + len(question.answer) == LENGTH
    assert read["line_removed"] == read["page"].replace(fact, "", 1)
    other, question_text = read["other_page"].rsplit("\n", 1)
    assert question_text == f"{question.name}:" and question.value not in other
    assert f"\n{question.name}: " not in other
    assert LENGTH - 20 < len(read["other_page"]) + len(question.answer) <= LENGTH
    following = pages[(question.page + 1) % 3].decode()
    assert all(line in following for line in other.split("\n")[1:])


def test_each_fact_is_asked_once_in_each_range(asked):
  known = {(question.page, question.name) for question in asked}
  assert len(known) == 3 * facts.PER_PAGE and len(asked) == 2 * len(known)
  for low, high in (NEAR, FAR):
    distances = [question.distance for question in asked if low <= question.distance < high]
    assert len(distances) == len(known) and max(distances) - min(distances) > 50


def test_the_same_questions_every_time(data, asked):
  for one, other in zip(asked, facts.questions(data), strict=True):
    assert (one.page, one.name, one.distance) == (other.page, other.name, other.distance)
    assert all((one.contexts[kind] == other.contexts[kind]).all() for kind in facts.CONTEXTS)


@pytest.mark.parametrize("lines, value", [
    (["Probe: 77-88"], "77-88"), (["Probe: 77-88 (2015 est.)"], "77-88"), (["Probe: 77-88; more"], "77-88"),
    (["Probe: 77-88 ++ 66-55"], "77-88"), (["Probe: " + "long " * 4], None), (["Probe: 7"], None),
    (["Probe: 77-88", "probe: 99"], None), (["Probe: 77-88", "Other: 177-88"], None), (["Probe: same"], None),
    (["Probe 77-88"], None)])
def test_fields_that_are_asked(tmp_path, monkeypatch, lines, value):
  monkeypatch.setattr(facts, "PER_PAGE", 1000)
  pages = [page(1, lines), page(2, ["Probe: same"]), page(3)]
  found = [question for question in facts.questions(config(write(tmp_path / "data", pages)))
           if question.page == 0 and question.name == "Probe"]
  assert [question.value for question in found] == [value] * (2 if value else 0)


def test_the_other_page_is_the_next_without_the_value(tmp_path, monkeypatch):
  monkeypatch.setattr(facts, "PER_PAGE", 1000)
  pages = [page(1, ["Probe: 77-88"]), page(2, ["Other: 77-88"]), page(3)]
  found = {question.name: text(question.contexts["other_page"]) for question in facts.questions(
      config(write(tmp_path / "data", pages))) if question.page == 0}
  last_lines = {name: read.splitlines()[-2] for name, read in found.items()}
  assert last_lines.pop("Probe") in pages[2] and all(line in pages[1] for line in last_lines.values())


@pytest.mark.parametrize("pages", [["no field"] * 3, [page(1)], [page(1)[:200], page(2)[:200]]])
def test_pages_that_cannot_be_asked_are_refused(tmp_path, pages):
  with pytest.raises(ValueError, match="no page of split 'recall' has a field to ask at .*sequence_length=256"):
    facts.questions(config(write(tmp_path / "data", pages)))


def test_only_the_values_tokens_are_read(data, asked):
  for kind in facts.CONTEXTS:
    tokens, places, targets = facts.batch(asked[:3], kind, data)
    assert tokens.shape == (5, LENGTH) and not tokens[3:].any()
    for question, row, at, target in zip(asked[:3], tokens, places, targets, strict=False):
      size, begin = len(question.answer), len(question.contexts[kind])
      assert at[:size].tolist() == list(range(begin - 1, begin - 1 + size))
      assert (row[at[:size] + 1] == target[:size]).all() and (target[:size] == question.answer).all()
      assert text(row[:begin + size]).endswith(f"\n{question.name}: {question.value}") and not row[begin + size:].any()


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Copier:
  """A model that goes on as after the longest equal text at most `reach` tokens back, but never with `unknown`."""

  reach: int
  unknown: int = -1

  def hidden(self, tokens):
    time = jnp.arange(tokens.shape[1])
    back = time[:, None] - time[None]

    def longer(run, now):
      equal, reached = now
      run = jnp.where(equal, 1 + jnp.pad(run[:, :-1], ((0, 0), (1, 0))), 0)
      return run, jnp.where(reached[None], run * len(time) + time[None], -1).argmax(-1)

    equal = jnp.moveaxis(tokens[:, :, None] == tokens[:, None], 1, 0)
    _, source = jax.lax.scan(longer, jnp.zeros(tokens.shape, jnp.int32), (equal, (back > 0) & (back <= self.reach)))
    source = source.T
    following = jnp.take_along_axis(tokens, jnp.minimum(source + 1, len(time) - 1), axis=1)
    return HEIGHT * jax.nn.one_hot(jnp.where(following == self.unknown, 0, following), 257), None

  def logits(self, x):
    return x


@pytest.mark.parametrize("reach, far", [(LENGTH, 1.0), (127, 0.0)])
def test_a_model_that_copies_recalls_as_far_as_it_reaches(data, asked, reach, far):
  found = facts.recall(Copier(reach), asked, data)
  near_part, far_part = found["distances"]
  assert [(part["start"], part["stop"], part["questions"]) for part in (near_part, far_part)] == [
      (*NEAR, 27), (*FAR, 27)]
  assert near_part["page"]["right"] == 1.0 and far_part["page"]["right"] == far
  assert found["page"]["right"] == (1 + far) / 2 and found["facts"] == 27 and found["questions"] == 54
  assert near_part["page"]["loss"] == pytest.approx(RIGHT_LOSS)
  for kind in ("line_removed", "other_page"):
    assert found[kind]["right"] == 0.0 and found[kind]["loss"] > RIGHT_LOSS + 1
  assert found["value_tokens"] == sum(len(question.answer) for question in asked)


def test_a_value_is_right_when_all_its_tokens_are(data, asked):
  found = facts.recall(Copier(LENGTH, unknown=ord("5")), asked, data)
  wrong = [question.value.count("5") for question in asked]
  assert found["page"]["right"] == sum(not count for count in wrong) / len(asked) and 0 < found["page"]["right"] < 1
  assert found["page"]["loss"] == pytest.approx(RIGHT_LOSS + HEIGHT * sum(wrong) / found["value_tokens"])


def test_right_is_what_greedy_decoding_writes(data):
  model = LanguageModel(dataclasses.replace(tiny.config(data.path).model, vocab_size=257, depth=1), rngs=nnx.Rngs(0))
  context = np.random.default_rng(0).integers(0, 256, (3, 40)).astype(np.int32)
  written = np.asarray(generate(model, context, 6, temperature=0.0))
  asked = [facts.Question(i, "", "", 50, dict.fromkeys(facts.CONTEXTS, context[i]), written[i]) for i in range(3)]
  changed = written[0].copy()
  changed[-1] = (changed[-1] + 1) % 256
  asked += [dataclasses.replace(asked[0], answer=changed)]
  config = dataclasses.replace(data, sequence_length=64, batch_size=4)
  assert facts.recall(model, asked, config)["page"]["right"] == 0.75


def test_the_command_records_the_recall_of_a_run(tmp_path):
  words = [f"{PROSE} {i}" for i in range(20)]
  path = write(tmp_path / "data", [page(number) for number in (1, 2, 3)], train=words, val=words[:4], test=words[:5])
  out = tmp_path / "out.jsonl"
  command = Command("run_language.py", "--sweep=papers_layer", "--tiny", "--models=wide_gla", "--steps=2",
                    f"--data={path}", f"--workdir={tmp_path}/runs", f"--out={out}")
  printed = command.communicate()
  assert command.returncode == 0, printed
  record = json.loads(out.read_text())
  found, asked = record["facts"], facts.questions(config(path, sequence_length=64))
  assert (found["questions"], found["facts"]) == (len(asked), 27) and len(found["distances"]) == 1
  assert all(0 <= found[kind]["right"] <= 1 and 0 < found[kind]["loss"] < 10 for kind in facts.CONTEXTS)
  assert record["places"] == [] and record["losses"]["test"]["tokens"] > 0


def test_the_command_refuses_a_dataset_without_facts_before_it_trains(tmp_path):
  for name, splits, message in (("none", {}, "no split 'recall'"), ("numbers", {"recall": 700}, "has a field to ask")):
    path = tiny.write_dataset(tmp_path / name, **splits)
    command = Command("run_language.py", "--sweep=papers_layer", "--tiny", f"--data={path}",
                      f"--workdir={tmp_path}/runs", f"--out={tmp_path}/out.jsonl")
    _, err = command.communicate()
    assert command.returncode == 2 and message in err and "Traceback" not in err, err
    assert not (tmp_path / "runs").exists() and not (tmp_path / "out.jsonl").exists()
