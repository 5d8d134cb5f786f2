"""A trace of a training step is divided into groups of kernels and parts of the model."""

import json
import pathlib
import subprocess
import sys

import pytest

from speed import trace
from speed.profile import OTHER, UNKNOWN, Event, busy, group, part, summary, table
from tests.environment import ENVIRONMENT

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(("kernel", "opcode", "wanted"), [
    ("gla_dqkg", "custom-call", "recurrent: gla_dqkg"), ("gla_scan_3", "", "recurrent: gla_scan"),
    ("delta_rule_backward__1", "", "recurrent: delta_rule_backward"),
    ("rms_norm_forward", "", "fused: rms_norm_forward"),
    ("short_convolution_backward", "", "fused: short_convolution_backward"),
    ("nvjet_hsh_256x128_64x4_1x2_h_bz_coopA_NNT", "custom-call", "matrix products"),
    ("gemm_fusion_dot_26", "fusion", "matrix products"), ("dot.3", "dot", "matrix products"),
    ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", "", "attention"),
    ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL", "", "communication"),
    ("loop_dynamic_update_slice_fusion_4", "fusion", "copies"), ("MemcpyD2D", "", "copies"),
    ("wrapped_transpose", "fusion", "copies"), ("copy_bitcast_fusion.2", "fusion", "copies"),
    ("input_reduce_fusion_2", "fusion", "reductions"), ("loop_reduce_precision_fusion", "fusion", "elementwise"),
    ("loop_add_transpose_fusion", "fusion", "elementwise"), ("loop_fusion_7", "fusion", "elementwise"),
    ("a_new_kernel", "", OTHER)])
def test_the_group_of_a_kernel(kernel, opcode, wanted):
  assert group(Event(kernel, 0, 1, opcode)) == wanted


@pytest.mark.parametrize(("scopes", "wanted"), [
    ("jit(train_step)/jvp()/while/body/eval_jaxpr/mixer/jit(silu)/mul", ("mixer", "forward")),
    ("jit(train_step)/transpose(jvp())/while/body/checkpoint/mlp/dot_general", ("mlp", "backward")),
    ("jit(train_step)/transpose(jvp())/while/body/checkpoint/rematted_computation/mixer/add", ("mixer", "recomputed")),
    ("jit(train_step)/jvp(head)/while/body/exp", ("head", "forward")),
    ("jit(train_step)/transpose(jvp(embed))/add", ("embed", "backward")),
    ("jit(train_step)/transpose(jvp())/while/body/dynamic_update_slice", ("layers", "backward")),
    ("jit(train_step)/jit(clip)/max", ("optimizer", "update")), ("", (UNKNOWN, "unknown"))])
def test_the_part_of_a_path_of_scopes(scopes, wanted):
  assert part(Event("loop_fusion", 0, 1, "fusion", scopes)) == wanted


def test_a_recurrent_kernel_is_of_the_mixer_even_without_scopes():
  assert part(Event("gla_scan", 0, 1)) == ("mixer", "unknown")


EVENTS = [Event("gla_scan", 0, 2e6, "custom-call", "jit(train_step)/jvp()/mixer/gla_scan"),
          Event("nvjet_tn", 1e6, 2e6, "custom-call", "jit(train_step)/jvp()/mlp/dot_general"),
          Event("loop_add_fusion", 5e6, 1e6, "fusion", "jit(train_step)/add"),
          Event("loop_add_fusion", 7e6, 1e6, "fusion", "jit(train_step)/add")]


def test_times_are_per_step_and_overlaps_count_once():
  assert busy(EVENTS) == 5e6
  found = summary(EVENTS, steps=2)
  assert (found["busy_ms"], found["gaps_ms"]) == (2.5, 1.5)
  assert found["groups_ms"] == {"recurrent: gla_scan": 1.0, "matrix products": 1.0, "elementwise": 1.0}
  assert found["parts_ms"] == {"mixer forward": 1.0, "mlp forward": 1.0, "optimizer update": 1.0}
  assert found["launches"]["elementwise"] == 1.0 and found["kernels_ms"]["loop_add_fusion"] == 1.0
  text = table(found, largest=1)
  assert "  recurrent: gla_scan                               1.00   33.3%      0.5" in text
  assert text.count("loop_add_fusion") == 0 and text.count("33.3%") == 7


def test_instructions_have_opcodes_and_scopes():
  text = """ENTRY %main.2 {
  %p = f32[8]{0} parameter(0), metadata={op_name="x"}
  ROOT %loop_add_fusion.1 = (f32[8]{0}, f32[]) fusion(%p), kind=kLoop, metadata={op_name="jit(f)/jvp()/mixer/add"}
}"""
  assert trace.instructions(text) == {
      "p": ("parameter", "x"), "loop_add_fusion.1": ("fusion", "jit(f)/jvp()/mixer/add")}


def test_the_command_runs_on_a_cpu_and_says_what_it_cannot_see(tmp_path):
  path = tmp_path / "profiles.jsonl"
  result = subprocess.run([sys.executable, ROOT / "experiments/profile_step.py", "--config=transformer_1b3", "--tiny",
                           "--steps=2", f"--out={path}"], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
  assert result.returncode == 0, (result.stdout, result.stderr)
  assert "A CPU's trace has no kernels." in result.stdout and "optimizer update" in result.stdout
  record, = map(json.loads, path.read_text().splitlines())
  assert record["setting"]["name"] == "transformer_1b3" and record["device"] == "cpu"
  parts = {name.split()[0] for name, ms in record["parts_ms"].items() if ms > 0}
  assert {"mixer", "mlp", "head", "optimizer"} <= parts
  assert sum(record["groups_ms"].values()) == pytest.approx(sum(record["parts_ms"].values()), rel=0.02)
