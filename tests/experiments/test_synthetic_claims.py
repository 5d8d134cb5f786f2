"""The claims on synthetic tasks, and their tables, from known records under the authors' and the reduced protocols."""

import dataclasses
import json

import pytest

from claims import Results
from claims.page import render
from claims.synthetic_scores import AUTHORS, FILE, REDUCED, mad, mqar, regbench, regbench_distance
from claims.synthetic_tables import tables
from synthetic.grids import CLAIMED
from synthetic.reduced import HARDEST
from tests.experiments.synthetic_records import record_of, records_of, runs_of
from tests.experiments.test_report_claims import finding

SHORT, LONG = {"sequence_length": 256}, {"sequence_length": 512}


@pytest.fixture
def results(tmp_path):
  """Writes records, and reads them anew."""
  def write(*parts):
    (tmp_path / FILE).write_text("".join(json.dumps(row) + "\n" for rows in parts for row in rows))
    return Results(tmp_path)

  return write


def test_the_best_rate_counts_as_the_mean_of_its_seeds(results):
  low, high, *others = runs_of("mqar", mixer="gla", width=64, task_fields=SHORT)
  other = dataclasses.replace(high, steps=7)  # not the sweep's setting
  rows = [record_of(low, 0.5), record_of(high, 0.7), record_of(dataclasses.replace(high, seed=1), 0.8),
          record_of(other, 1.0)]
  score = lambda found, width=64: mqar(found, AUTHORS, "gla", (256, 16), width)
  assert score(results(rows)) is None  # a rate was not tried
  assert score(results(rows, [record_of(others[0], 0.99)])) == pytest.approx(0.99)  # nor need they be
  everything = results(rows, [record_of(run, 0.1) for run in others])
  assert score(everything) == pytest.approx(0.75) and score(everything, 128) is None
  assert mqar(everything, REDUCED, "gla", (256, 16), 64) is None  # which is another protocol


def test_mqar_claims_are_judged_point_by_point(results):
  found = results(records_of("mqar", 0.98, mixer="delta_net", width=64),
                  records_of("mqar", 0.995, mixer="delta_net", width=128),
                  records_of("mqar", 0.9, mixer="mamba", width=64))
  solved = finding(found, "DeltaNet without convolutions solves 64 pairs in 512 tokens at every width.")
  assert solved.points == (False, True, None) and solved.verdict == "holds in part"
  assert solved.text == "512/64 d64: 98.0; 512/64 d128: 99.5"
  beats = finding(found, "DeltaNet recalls more than Mamba at small widths.")
  assert beats.points == (True, None) and beats.text == "512/64 d64: 98.0 and 90.0"


def test_the_authors_protocol_decides_a_point_once_both_sides_have_it(results):
  of = lambda sweep, mixer, score, width, length: records_of(sweep, score, mixer=mixer, width=width, task_fields=length)
  old = [*of("mqar_reduced", "gla", 0.4, 64, SHORT), *of("mqar_reduced", "retention", 0.7, 64, SHORT),
         *of("mqar_reduced", "gla", 0.6, 128, SHORT), *of("mqar_reduced", "retention", 0.5, 128, SHORT)]
  new = [*of("mqar", "gla", 0.9, 64, SHORT), *of("mqar", "retention", 0.8, 64, SHORT),
         *of("mqar", "gla", 0.3, 128, SHORT)]
  found = finding(results(old, new), "GLA recalls at least as much as RetNet at every width.")
  assert found.points == (True, True, None, None, None, None)
  assert found.text == "256/16 d64: 90.0 and 80.0; reduced: 256/16 d128: 60.0 and 50.0"


@pytest.mark.parametrize("left, right, point", [(0.019, 0.011, None), (0.02, 0.011, True), (0.011, 0.5, False)])
def test_models_that_have_not_begun_are_not_compared(results, left, right, point):
  pair = lambda mixer, score: records_of("mqar", score, mixer=mixer, width=256, task_fields=LONG)
  found = finding(results(pair("gla", left), pair("retention", right)),
                  "GLA recalls at least as much as RetNet at every width.")
  assert found.points == (None,) * 5 + (point,)
  assert found.text.startswith("512/64 d256: neither has begun" if point is None else "512/64 d256: ")


def test_mad_is_the_mean_of_the_authors_measure_over_the_settings_that_all_have_run(results):
  settings = [{}, HARDEST["compression"]]
  new = [row for mixer in CLAIMED for setting, score in zip(settings, (0.8, 0.4))
         for row in records_of("mad", score, task="compression", mixer=mixer, task_fields=setting)]
  more = [records_of("mad_rest", 0.9, task="compression", mixer=mixer, task_fields={"vocab_size": 32})
          for mixer in CLAIMED]
  score = lambda found, mixer="gla": mad(found, AUTHORS, mixer, "compression", CLAIMED)
  assert score(results(new[:-1])) is None  # a rate of the last mixer is not there
  assert mad(results(new[:-1]), AUTHORS, "gla", "compression") == pytest.approx((0.2 + 0.1) / 2)
  assert score(results(new, *more[:-1])) == pytest.approx((0.2 + 0.1) / 2)
  assert score(results(new, *more)) == pytest.approx((0.2 + 0.1 + 0.225) / 3)
  old = [records_of("mad_reduced", score, task="compression", mixer="gla", task_fields=setting)
         for setting, score in zip(settings, (0.6, 0.2))]
  assert mad(results(*old), REDUCED, "gla", "compression") == pytest.approx((0.3 + 0.1) / 2)
  assert mad(results(old[0]), REDUCED, "gla", "compression") is None
  _, table, *_ = tables(results(new, *more, *old))
  assert ["GLA", "none", "", "", "", "", "20.0 → 17.5", "", ""] in table.rows
  assert "3 of 11 of compression" in table.notes[-1]


def test_regbench_selects_the_test_and_the_rate_on_validation(results):
  low, high, *others = runs_of("regbench", mixer="mamba", task_fields={"train_examples": 1000})
  selected = lambda score, loss: {"accuracy": score, "total_variation": 1 - score, "validation_loss": loss}
  rows = [record_of(low, 0.9, selected=selected(0.7, 0.5)), record_of(high, 0.2, selected=selected(0.8, 0.6)),
          *(record_of(run, 0.9, selected=None) for run in others)]  # which diverged at once
  found = results(rows)
  assert regbench(found, AUTHORS, "mamba", 1000) == 0.7
  assert regbench_distance(found, AUTHORS, "mamba", 1000) == pytest.approx(0.3)


def test_regbench_is_level_within_a_point(results):
  scores = {"delta_net": 0.8, "attention": 0.809, "gla": 0.811, "mamba": 0.1}
  rows = [record_of(run, 0.05, curve=[[1, 1.0, 0.0], [2, 0.5, score], [3, 0.1, 0.05]], total_variation=[0.6, 0.25, 0.3])
          for mixer, score in scores.items()  # the best test counts, not the last
          for run in runs_of("regbench_reduced", mixer=mixer, task_fields={"train_examples": 1000})]
  text = "DeltaNet learns regular languages in context as well as Transformer++, GLA and Mamba."
  found = finding(results(rows), text)
  assert found.points[:4] == (True, False, True, None)
  assert found.text == "reduced: 1,000: DeltaNet 80.0, Transformer++ 80.9, GLA 81.1, Mamba 10.0"
  page = render(results(rows))
  assert "| DeltaNet | 4 taps | 80.0 |  |  |  |" in page and "| DeltaNet | 4 taps | 0.250 |  |  |  |" in page
  assert "| RetNet |" not in page  # of which nothing was run
  new = records_of("regbench", 0.5, task_fields={"train_examples": 1000})
  found = finding(results(rows, new), text)
  assert found.points[:4] == (True, True, True, None) and found.text.startswith("1,000: DeltaNet 50.0")
  assert "| DeltaNet | 4 taps | 80.0 → 50.0 |  |  |  |" in render(results(rows, new))
