"""The distance to Transformer++ against tokens: its picture, its table, and the claims that it decides."""

import json

import pytest

from claims import CLAIMS, Results, gap
from claims.page import render
from claims.plots import PLOTS
from language.sweeps import FILES, SWEEPS
from tests.experiments.language_records import branched

SWEEP = SWEEPS["gap"]()
RUNS = {(run.model, run.learning_rate): run for run in SWEEP.runs}
FIRST, SECOND, *_ = LENGTHS = [SWEEP.runs[0].steps, *(steps for steps, _ in SWEEP.longer)]


def record(model, rate, steps, bits, seed=0):
  return branched(RUNS[model, rate], steps, bits, seed)


@pytest.fixture
def results(tmp_path):
  rows = [record("transformer_normal", 2e-3, steps, bits) for steps, bits in zip(LENGTHS, (1.5, 1.2, 1.1, 1.0, 0.9))]
  rows += [record("transformer_normal", 4e-3, FIRST, 1.6),
           record("gla_normal", 1e-3, FIRST, 1.615), record("gla_normal", 1e-3, FIRST, 1.625, seed=1),
           record("gla_normal", 2e-3, FIRST, 1.7), record("gla_normal", 4e-3, FIRST, 1.61),
           record("gla_normal", 4e-3, SECOND, 1.25), record("gla_normal", 2e-3, SECOND, 1.24),
           record("gla_conv_normal", 2e-3, FIRST, 1.4), record("gla_conv_normal", 2e-3, LENGTHS[2], 1.3),
           record("tnl_normal", 2e-3, SECOND, None)]
  (tmp_path / FILES["gap"]).write_text("".join(json.dumps(row) + "\n" for row in rows))
  return Results(tmp_path)


def test_the_picture_has_the_best_rate_of_each_length(results, tmp_path):
  panels = gap.panels(results)
  assert list(panels) == ["English", "source code"]
  # GLA's mean over two seeds at 1e-3 is 1.62, so that 4e-3 is the best.
  assert panels["English"]["gla_normal"] == [(30, pytest.approx(0.11)), (60, pytest.approx(0.04))]
  assert panels["source code"]["gla_normal"][1] == (60, pytest.approx(0.02))
  assert [tokens for tokens, _ in panels["English"]["transformer_normal"]] == [30, 60, 120, 250, 500]
  plot, = (plot for plot in PLOTS if plot.drawn(results))
  assert plot.file == "gap.png" and plot.draw(results, tmp_path).stat().st_size > 10_000


def test_the_page_has_the_distances_and_a_table(results):
  page = render(results)
  assert ("GLA +0.110 after 30M, +0.040 after 60M. GLA with convolutions -0.100 after 30M, +0.200 after 120M."
          in " ".join(page.split()))
  assert "|  | 30M tokens | 60M tokens | 120M tokens | 250M tokens | 500M tokens |" in page
  assert "| GLA | 1.6100 at 0.004; tried 0.001, 0.002 | 1.2400 at 0.002; tried 0.004 |  |  |  |" in page


def test_claims_are_judged_after_the_most_tokens_that_both_models_have(results):
  level, unaided = (claim.judge(results) for claim in CLAIMS if "--sweep=gap " in claim.command)
  assert level.text == "after 60M tokens: GLA 1.2400; Transformer++ 1.2000" and level.verdict == "does not hold"
  assert unaided.text == "after 30M tokens: GLA 1.6100; GLA with convolutions 1.4000" and unaided.points == (False,)


def test_without_records_nothing_is_claimed(tmp_path):
  results = Results(tmp_path)
  assert "distance to Transformer++" not in render(results)
  assert {claim.judge(results).verdict for claim in CLAIMS if "--sweep=gap " in claim.command} == {"not run"}
