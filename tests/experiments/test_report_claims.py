"""The page of claims of known records, and the committed page, which must follow from the committed records."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest

from claims import CLAIMS, Claim, Finding, Results, language, lengths, linearized, speed
from claims.page import by_class, render
from claims.plots import PLOTS
from claims.points import classified, decided_by
from claims.synthetic_scores import FILE as SYNTHETIC
from language import sweeps as language_sweeps
from language.facts import CONTEXTS
from lin_jax.mixers.delta_net import ACTIVATIONS
from tests.experiments.language_records import modelled
from tests.experiments.synthetic_records import records_of
from tests.forked import ROOT, Command

RESULTS = ROOT / "experiments/results"


def write(folder, name, rows):
  (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def measured(name, at, **fields):
  return {"device": "NVIDIA X", "reason": "", "setting": {"tiny": False, "name": name, "batch_size": 1, **at}, **fields}


def finding(results, text, sweep=""):
  claim, = (claim for claim in CLAIMS
            if claim.text == text and (not sweep or f"--sweep={sweep} " in claim.command))
  return claim.judge(results)


@pytest.mark.parametrize("points, verdict", [
    ((), "not run"), ((None, None), "not run"), ((True, True), "holds"), ((True, None), "holds in part"),
    ((True, False), "holds in part"), ((False, None), "does not hold")])
def test_verdict(points, verdict):
  assert Finding("", points).verdict == verdict


@pytest.mark.parametrize("points, close, verdict", [
    ((True, True), (), "holds"), ((True, True), (False, True), "undecided"),
    ((False, False), (False, True), "undecided"), ((False,), (True,), "undecided"),
    ((True, False), (False, True), "undecided"), ((True, False, True), (False, False, True), "holds in part"),
    ((True, None), (True, False), "undecided"), ((True, True, None), (False, True, False), "holds in part"),
    ((None,), (), "not run")])
def test_a_claim_is_undecided_when_close_points_would_change_its_verdict(points, close, verdict):
  assert Finding("", points, close).verdict == verdict


def test_a_row_names_the_points_that_decided():
  mixed = Finding("", (True, False, True, None), (False, False, True, False), ("A", "B", "C", "D"))
  assert decided_by(mixed) == "1 of 3, 1 undecided, 1 not counted; yes: A; no: B; too close: C"
  assert decided_by(Finding("", (True, True), (), ("A", "B"))) == "2 of 2"


def claim(text):
  return Claim("2312.06635", "table", text, "", "", "python", None)


def test_the_answer_counts_claims_and_names_each_sentence_once():
  clear, close, run = Finding("", (True,)), Finding("", (True,), (True,)), Finding("", (False, True, None))
  not_run, against = Finding("", (None,)), Finding("", (False,))
  assert [classified([finding]) for finding in (clear, close, run, not_run)] == [
      "reproduced", "undecided", "in part", "not run"]
  assert classified([clear, against]) == "undecided"  # two settings contradict each other
  assert classified([clear, close]) == "reproduced" and classified([close, against]) == "contradicted"
  assert classified([clear, close, close, not_run]) == "undecided"  # most settings decide nothing
  assert classified([clear, run]) == "in part" and classified([against] * 2) == "contradicted"
  claims = [claim("A."), dataclasses.replace(claim("A."), setting="larger"), claim("B.")]
  reproduced, _, in_part, *_ = by_class(claims, dict(zip(claims, (clear, close, run), strict=True)))
  assert reproduced == "• A (1 of 2, 1 undecided)" and in_part == "• B (1 of 2, 1 not counted)"


def test_the_answer_comes_first_and_has_every_claim():
  answer, _ = render(Results(RESULTS)).split("## What was measured")
  assert f"Of {len(CLAIMS)} claims" in answer
  assert len(answer.split(f"Of {len(CLAIMS)} claims")[0].splitlines()) < 45  # one screen, and then the table by kind
  assert [claim.text for claim in CLAIMS if f"• {claim.text.rstrip('.')} (" not in answer] == []


def test_language_models_are_compared_at_their_best_rates(tmp_path):
  runs = {(run.model, run.learning_rate): run for run in language_sweeps.main().runs}
  bits = {("gla", 2e-3): 1.35, ("gla", 1e-3): 1.30, ("retnet", 2e-3): 1.32, ("retnet", 4e-3): None,
          ("transformer", 2e-3): 1.2875}
  rows = [modelled(runs[key], value) for key, value in bits.items()]
  rows += [modelled(dataclasses.replace(runs["gla", 1e-3], seed=1), 1.31),
           modelled(dataclasses.replace(runs["mamba", 1e-3], steps=7), 1.0)]  # no run of the sweep
  write(tmp_path, language.FILE, rows)
  better = finding(Results(tmp_path), "GLA models text better than RetNet.", "main")
  assert better.points == (True,) and better.text == "GLA 1.3050 ± 0.0071; RetNet 1.3200"
  level = finding(Results(tmp_path), "GLA is level with Transformer++ and Mamba (here: at most 1% more bits).",
                  "main")
  assert level.points == (False, None)
  assert finding(Results(tmp_path), "GLA models text better than RetNet.", "long").verdict == "not run"
  page = render(Results(tmp_path))
  assert "| GLA | 42.0M | 0.001 | 0.001, 0.002 | 2 | 1.3050 ± 0.0071 |" in page
  assert "these losses are on val too" in page


def test_rates_are_chosen_on_val_and_results_are_on_test_where_all_runs_have_it(tmp_path):
  runs = {(run.model, run.learning_rate): run for run in language_sweeps.main().runs}
  bits = {("gla", 2e-3): (1.35, 1.2), ("gla", 1e-3): (1.30, 1.25), ("retnet", 2e-3): (1.32, 1.4)}
  rows = [modelled(runs[key], val) | {"losses": {"test": {"bits_per_byte": test, "loss": test}}}
          for key, (val, test) in bits.items()]
  write(tmp_path, language.FILE, rows)
  found = finding(Results(tmp_path), "GLA models text better than RetNet.", "main")
  assert found.text == "GLA 1.2500; RetNet 1.4000"
  assert "these losses are on the split test" in render(Results(tmp_path))
  write(tmp_path, language.FILE, [*rows, modelled(runs["tnl", 2e-3], 1.5)])  # a record that is older than the loss
  assert finding(Results(tmp_path), "GLA models text better than RetNet.", "main").text == "GLA 1.3000; RetNet 1.3200"


def test_differences_are_compared_with_the_noise_of_all_seeds(tmp_path):
  (gla, *_), (retnet, *_) = ([run for run in language_sweeps.main().runs if run.model == model]
                             for model in ("gla", "retnet"))
  rows = [modelled(dataclasses.replace(gla, seed=seed), bits) for seed, bits in enumerate((1.3, 1.34))]
  rows += [modelled(dataclasses.replace(run, steps=3600), bits) for run, bits in ((gla, 1.2), (retnet, 1.22))]
  write(tmp_path, language.FILE, rows)
  found = finding(Results(tmp_path), "GLA models text better than RetNet.", "long")
  assert language.noise(Results(tmp_path)) == (pytest.approx(0.04 / 2**0.5), 1)
  assert found.points == (True,) and found.close == (True,) and found.verdict == "undecided"
  assert "A run's deviation over its seeds is 0.0283 bits per byte" in " ".join(render(Results(tmp_path)).split())


def test_linearized_models_are_read_from_their_own_records(tmp_path):
  runs = {run.model: run for run in language_sweeps.linearized().runs}
  bits = {"transformer": 1.49, "gla": 1.55, "linearized_5": 1.56, "linearized_20": 1.58}
  losses = {"transformer": (1.0, 4.0), "linearized_5": (1.3, 4.1), "linearized_20": (1.05, 4.2)}
  rows = [modelled(runs[model], value) for model, value in bits.items()]
  for row in rows:
    if row["model"] in losses:
      row["pair_losses"] = dict(zip(("repeated", "other"), losses[row["model"]], strict=True))
  write(tmp_path, language.FILE, rows)
  texts = [claim.text for claim in linearized.claims()]
  assert {finding(Results(tmp_path), text).verdict for text in texts} == {"not run"}
  write(tmp_path, language.FILES["linearized"], rows)
  level, scratch, behind, recall = (finding(Results(tmp_path), text) for text in texts)
  assert (level.points, scratch.points, behind.points) == ((True, False), (None, None), (None, True, True))
  assert recall.points == (True, False) and recall.text == (
      "Transformer++ linearized, 5% more tokens: +0.300 nats on repeated pairs, +0.100 on others; "
      "Transformer++ linearized, 20% more tokens: +0.050 nats on repeated pairs, +0.200 on others")


def test_claims_name_runs_of_the_sweeps():
  known = {run.model for sweep in language_sweeps.SWEEPS.values() for run in sweep().runs}
  named = {language.name(model) for model in known
           if not model.startswith(("deltanet_l", "wide_")) and not model.endswith("_normal")}
  named |= {language.name(model.removesuffix("_normal")) for model in known if model.endswith("_normal")}
  assert named == set(language.NAMES.values())
  assert language.name("gla_conv_normal") == "GLA with convolutions, N(0, 0.02)"
  assert language.name("wide_gla") == "GLA, width 1024"
  assert language.name("deltanet_l1_relu_eps") == "L1 and relu, small eps"
  assert language.name("deltanet_l1_elu1") == "L1 and elu1"
  planned = {run.model for run in language_sweeps.norms().runs}
  assert planned == {language._normed(norm, f) for norm in ("l1", "l2") for f in ACTIVATIONS}


def test_long_texts_are_compared_with_the_trained_length(tmp_path):
  (tmp_path / lengths.FOLDER).mkdir()
  far = {("gla", 0): 4.03, ("gla", 1): 4.05, ("retnet", 0): 4.2, ("transformer", 0): 6.0, ("gla_carried", 0): 4.01}
  for (model, seed), loss in far.items():
    buckets = [{"start": 256, "stop": 512, "loss": 4.0}, {"start": 8192, "stop": 16384, "loss": loss}]
    record = {"model": model, "seed": seed, "trained_length": 512, "sequence_length": 16384, "buckets": buckets}
    (tmp_path / lengths.FOLDER / f"{model}{seed}.json").write_text(json.dumps(record))
  results = Results(tmp_path)
  flat = finding(results, "GLA, RetNet and TransNormerLLM stay as good far beyond the length of training.")
  assert flat.points == (True, False, None) and flat.text == "GLA x1.010; RetNet x1.050"
  assert finding(results, "Softmax attention gets worse far beyond the length of training (here: by 10% or more)."
                 ).points == (True,)
  carried, = (claim.text for claim in CLAIMS if "state carried" in claim.text)
  assert finding(results, carried).points == (True, None)
  assert finding(results, carried).close == (True, False)  # 0.03 apart, where seeds are 0.02 apart


def test_plots_are_drawn_of_what_was_run(tmp_path):
  assert not [plot.file for plot in PLOTS if plot.drawn(Results(tmp_path))]
  write(tmp_path, SYNTHETIC, [row for width in (64, 128) for row in records_of("mqar", 0.5, mixer="gla", width=width)])
  plot, = (plot for plot in PLOTS if plot.drawn(Results(tmp_path)))
  assert plot.draw(Results(tmp_path), tmp_path).stat().st_size > 10_000
  write(tmp_path, speed.TRAINING, [
      measured(model, {"set": "gla_fig6", "sequence_length": at}, tokens_per_s=value, memory_gib=1.0)
      for model in ("gla_1b3", "mamba_1b3") for at, value in ((2048, 5.0), (4096, 4.0))])
  training, = (plot for plot in PLOTS if plot.drawn(Results(tmp_path)) and plot.file == "training.png")
  lines, = (lines for lines in training.panels(Results(tmp_path)).values() if lines)
  assert lines == dict.fromkeys(("gla_1b3", "mamba_1b3"), [(2048, 5.0), (4096, 4.0)])


def recalled(right):
  scores = {"questions": 20, "value_tokens": 140} | {
      kind: {"right": right / factor, "loss": factor * right} for factor, kind in enumerate(CONTEXTS, 1)}
  near = scores | {"page": {"right": 1.0, "loss": 0.1}}
  return scores | {"facts": 10, "distances": [near | {"start": 0, "stop": 128}, scores | {"start": 128, "stop": 256}]}


def test_the_recall_of_facts_has_a_table(tmp_path):
  not_run = "sweep `papers_layer`\n\nNot run yet: `python experiments/run_language.py --sweep=papers_layer --out="
  assert not_run in render(Results(tmp_path))
  runs = {run.model: run for run in language_sweeps.papers_layer().runs}
  rows = [modelled(dataclasses.replace(runs[model], seed=seed), 1.0) | {"facts": recalled(right)}
          for model, seed, right in (("wide_gla", 0, 0.5), ("wide_gla", 1, 0.7), ("wide_transformer", 0, 0.9))]
  write(tmp_path, language.FILES["papers_layer"], [*rows, modelled(runs["wide_retnet"], 1.0)])  # the last without facts
  page = render(Results(tmp_path))
  table = page.split("### Recall of facts from held-out pages, sweep `papers_layer`")[1].split("###")[0].strip()
  assert table.splitlines()[:4] == [
      "|  | 0 to 128 | 128 to 256 | with the page | line removed | other page | nats, with the page | "
      "nats, line removed | nats, other page |", "| " + " | ".join(["---"] * 9) + " |",
      "| Transformer++, width 1024 | 100.0 | 90.0 | 90.0 | 45.0 | 30.0 | 0.900 | 1.800 | 2.700 |",
      "| GLA, width 1024 | 100.0 | 60.0 | 60.0 | 30.0 | 20.0 | 0.600 | 1.200 | 1.800 |"]
  assert "RetNet" not in table and "in percent of 20 questions on 10 facts" in table


def test_every_command_is_one_that_exists():
  for claim in CLAIMS:
    script = next(word for word in claim.command.split() if word.startswith("experiments/"))
    assert (ROOT / script).exists(), claim.command


def test_committed_page_is_that_of_the_committed_records():
  assert (RESULTS / "README.md").read_text() == render(Results(RESULTS))


def test_command_writes_and_refuses(tmp_path):
  write(tmp_path, "kernels.jsonl", [])
  written = subprocess.run([sys.executable, "experiments/report_claims.py", f"--results={tmp_path}"], cwd=ROOT,
                           capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
  assert written.returncode == 0 and "not run" in (tmp_path / "README.md").read_text(), written.stderr
  missing = Command("report_claims.py", f"--results={tmp_path / 'none'}")
  _, err = missing.communicate()
  assert missing.returncode == 2 and "no such folder" in err
