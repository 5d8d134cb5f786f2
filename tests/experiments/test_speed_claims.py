"""Claims of speed, judged by records of kernels, of training and of decoding."""

import dataclasses

from claims import CLAIMS, Results, speed
from kernel_bench.cases import PASSES, named
from tests.experiments.test_report_claims import finding, measured, write


def timed(case, name, label, ms, device="NVIDIA X"):
  return {"device": device, "platform": "gpu", "implementation": name, "pass": label, **dataclasses.asdict(case),
          "ms": ms, "within_bounds": True, "errors": {}, "run": "", "command": "", "versions": {}}


def test_kernels_are_compared_where_the_claim_says(tmp_path):
  rows = []
  for case in named("length", ["gla"]):
    attention = dataclasses.replace(case, op="attention", gate="none")
    for label in PASSES:
      ours = 3.0 if case.T == 8192 and label == "forward" else 1.0
      rows += [timed(case, "pallas_triton", label, ours), timed(attention, "cudnn", label, case.T / 4096 + 0.5)]
  rows.append(timed(case, "pallas_triton", "forward", 9.0, device="NVIDIA Y"))
  write(tmp_path, "kernels.jsonl", rows)
  _, found = (claim.judge(Results(tmp_path)) for claim in CLAIMS if claim.text.startswith("GLA's kernel is faster"))
  # Below 4,096 tokens nothing is claimed; of the devices the one with most of the points counts.
  assert found.points == (True, False, *[True] * 10)
  assert found.text.startswith("NVIDIA X: speed over attention: fwd 1K x0.75, 2K x1.00, 4K x1.50, 8K x0.83")


def test_a_token_costs_the_same_at_every_length(tmp_path):
  cases = [case for case in named("length", ["linear_attention"]) if case.gate == "constant"]
  rows = [timed(case, "pallas_triton", label, {2048: 1.09, 16384: 1.11}.get(case.T, 1.0))
          for case in cases for label in PASSES]
  write(tmp_path, "kernels.jsonl", rows)
  _, found = (claim.judge(Results(tmp_path)) for claim in CLAIMS if "same time per token" in claim.text)
  assert found.points == (True, True, True, False, True, True, True) * 2


def test_the_chunkwise_form_is_compared_with_each_recurrent_form(tmp_path):
  first, second, *_ = named("figures", ["delta_rule"])
  names = "pallas_triton", "reference", "fla_recurrent"
  rows = [timed(case, name, "forward_backward", ms)
          for case, times in ((first, (1.0, 90.0, 6.0)), (second, (2.0, 90.0, 9.0)))
          for name, ms in zip(names, times, strict=True)]
  write(tmp_path, "kernels.jsonl", rows)
  scan, kernel = (claim.judge(Results(tmp_path)) for claim in CLAIMS if claim.text.startswith("The chunkwise form"))
  assert scan.points[:3] == (True, True, None) and kernel.points[:3] == (True, False, None)
  assert kernel.text == "NVIDIA X: 64 channels 2K x6; 64 channels 4K x4"
  assert not Results(tmp_path).kernels.rivals("NVIDIA X", first, "forward_backward")


def test_a_recurrent_form_that_is_wrong_or_cannot_run_does_not_count(tmp_path):
  first, second, third, *_ = named("figures", ["delta_rule"])
  rows = [timed(case, "pallas_triton", "forward_backward", 1.0) for case in (first, second, third)]
  wrong = timed(first, "fla_recurrent", "forward_backward", 9.0) | {"within_bounds": False, "errors": {"dq": 0.02}}
  refused = timed(second, "fla_recurrent", "forward_backward", None) | {"reason": "out of memory"}
  del refused["within_bounds"]
  write(tmp_path, "kernels.jsonl", [*rows, wrong, refused, timed(third, "fla_recurrent", "forward_backward", 6.0)])
  _, kernel = (claim.judge(Results(tmp_path)) for claim in CLAIMS if claim.text.startswith("The chunkwise form"))
  assert kernel.points[:3] == (None, None, True)
  assert kernel.text == ("NVIDIA X: 64 channels 2K not counted, its dq is off by 2e-02; "
                         "64 channels 4K not counted, it cannot run; 64 channels 8K x6")


def test_training_is_compared_length_by_length(tmp_path):
  speeds = {("gla_1b3", 2048): 5.0, ("mamba_1b3", 2048): 4.0, ("gla_1b3", 4096): 3.0, ("mamba_1b3", 4096): 4.0}
  rows = [measured(name, {"set": "gla_fig6", "sequence_length": length}, tokens_per_s=1e3 * value)
          for (name, length), value in speeds.items()]
  refused = measured("mamba_1b3", {"set": "gla_fig6", "sequence_length": 8192}, tokens_per_s=None)
  write(tmp_path, speed.TRAINING, [*rows, refused | {"reason": "out of memory"}])
  found = finding(Results(tmp_path), "GLA trains faster than Mamba at every length.")
  assert found.points == (True, False, None, None)
  assert found.text == "NVIDIA X, tokens/s: gla_1b3 2K 5,000, 4K 3,000; mamba_1b3 2K 4,000, 4K 4,000"


def test_training_speed_is_flat_within_a_twentieth(tmp_path):
  speeds = {1024: 960.0, 2048: 1000.0, 4096: 1040.0, 8192: 1060.0, 16384: 940.0}
  write(tmp_path, speed.TRAINING, [measured("tnl_385m", {"set": "tnl", "sequence_length": at}, tokens_per_s=value)
                                   for at, value in speeds.items()])
  found = finding(Results(tmp_path), "TransNormerLLM trains as fast at every length.")
  assert found.points == (True, True, False, False, None, None)


def test_decoding_is_flat_or_grows(tmp_path):
  values = {("tnl_385m", 1024): (2.0, 50), ("tnl_385m", 2048): (2.1, 50), ("tnl_385m", 4096): (2.3, 50),
            ("transformer_340m", 1024): (2.0, 100), ("transformer_340m", 2048): (2.0, 200)}
  write(tmp_path, speed.DECODING, [measured(name, {"context": at}, ms_per_token=ms, state_mib=mib)
                                   for (name, at), (ms, mib) in values.items()])
  text, = (claim.text for claim in CLAIMS if "decodes in the same time" in claim.text)
  assert finding(Results(tmp_path), text).points[:6] == (True, True, True, False, True, None)
