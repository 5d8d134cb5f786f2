"""The kernel benchmark: its shapes and byte model, its check against the scan, its records, and peers that fail."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels
from kernel_bench import cases, timing
from kernel_bench.cases import Case
from tests.environment import ENVIRONMENT
from tests.forked import ROOT, Command

# Stands for an installed library: its forward pass computes something else, its backward pass does not run.
FAKE_JLA = """
import jax

@jax.custom_vjp
def double(v):
  return 2 * v

def forward(v):
  raise RuntimeError("no kernel for this device\\nand more")

double.defvjp(forward, lambda residuals, gradient: (gradient,))

def linear_attention(kind, q, k, v, *, g, impl):
  return double(v), None
"""


def bench(*arguments, fake=None):
  environment = ENVIRONMENT | ({"PYTHONPATH": str(fake)} if fake else {})
  command = [sys.executable, "experiments/bench_kernels.py", *arguments]
  return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def fork(*arguments):
  """(process, stdout, stderr)"""
  process = Command("bench_kernels.py", *arguments)
  return process, *process.communicate()


@pytest.fixture(scope="module")
def fake_jla(tmp_path_factory):
  folder = tmp_path_factory.mktemp("peer")
  (folder / "jla").mkdir()
  (folder / "jla/__init__.py").touch()
  (folder / "jla/ops.py").write_text(FAKE_JLA)
  return folder


def test_records_are_appended_and_resumed_and_a_failing_peer_is_reported(fake_jla, tmp_path):
  arguments = ["--ops=gla", "--length=20", "--key=8", "--value=16", "--repeats=2", f"--out={tmp_path}/k.jsonl"]
  first = bench(*arguments, "--implementations=reference", "--peers=none")
  assert first.returncode == 0, first.stderr
  second = bench(*arguments, "--resume", fake=fake_jla)
  assert second.returncode == 0, second.stderr
  rows = [json.loads(line) for line in (tmp_path / "k.jsonl").read_text().splitlines()]
  names = ("device", "op", "implementation", "pass", "gate", "B", "T", "H", "K", "V", "dtype", "ms", "gb_per_s",
           "peak_mib", "versions")
  assert all(set(names) <= set(row) for row in rows)
  assert sorted((row["implementation"], row["pass"]) for row in rows) == sorted(
      (name, label) for name in ("xla_chunked", "reference", "jla") for label in cases.PASSES)
  ours = [row for row in rows if row["implementation"] != "jla"]
  assert all(row["ms"] > 0 and row["within_bounds"] and row["versions"]["kernels"] for row in ours)
  assert all(np.isclose(row["gb_per_s"], row["bytes"] / row["ms"] / 1e6) for row in ours)
  wrong, refused = ([row for row in rows if row["implementation"] == "jla" and row["pass"] == label]
                    for label in cases.PASSES)
  assert wrong[0]["ms"] > 0 and not wrong[0]["within_bounds"] and wrong[0]["errors"]["output"] > 0.1
  assert refused[0]["ms"] is None and refused[0]["reason"] == "RuntimeError: no kernel for this device"
  assert "cannot run: RuntimeError: no kernel" in second.stdout and "TOO MUCH" in second.stdout


def test_a_limit_leaves_the_rest_for_later(tmp_path):
  process, out, err = fork("--length=8", "--ops=gla", "--peers=none", "--limit_seconds=1e-9",
                           f"--out={tmp_path}/k.jsonl")
  assert process.returncode == 0, err
  assert "with 4 measurements left" in out and not (tmp_path / "k.jsonl").exists()


@pytest.mark.parametrize("arguments, message", [
    (["--shapes=paper,nope"], "--shapes=nope: unknown; known: paper, grid, length, figures, widths, grouped, hopper, "
                              "kda, cpu, all"),
    (["--ops=nope"], "--ops=nope: unknown; known: gla, linear_attention, delta_rule, attention"),
    (["--implementations=nope"], "--implementations=nope: unknown"),
    (["--peers=nope"], "--peers=nope: unknown"),
    (["--resume"], "--resume needs --out"),
    (["--key_heads=3"], "--key_heads=3: must divide --heads=4"),
    (["--length=8", "--ops=gla", "--peers=none", "--out=no/such/folder/k.jsonl"], "cannot be written"),
])
def test_mistakes_exit_with_2_and_one_message(arguments, message):
  process, _, err = fork(*arguments)
  assert process.returncode == 2 and message in err and "Traceback" not in err, err


@pytest.mark.parametrize("op, gate, forward, both", [
    ("linear_attention", "none", 1024, 2816), ("linear_attention", "token", 1028, 2828),
    ("gla", "channel", 1536, 4352), ("delta_rule", "token", 1032, 2840), ("delta_rule", "channel", 1540, 4364)])
def test_floor_bytes_per_token_and_head(op, gate, forward, both):
  case = Case(op, gate, 2, 3, 5, 128, 128, "bfloat16")
  assert cases.floor_bytes(case, "forward") == 30 * forward
  assert cases.floor_bytes(case, "forward_backward") == 30 * both


def test_key_heads_are_counted_once():
  case = Case("delta_rule", "token", 2, 3, 8, 128, 128, "bfloat16", 4)
  assert str(case) == "delta_rule token B2 T3 H4/8 K128 V128 bfloat16"
  assert cases.floor_bytes(case, "forward") == 6 * (4 * 512 + 8 * 520)
  assert cases.floor_bytes(case, "forward_backward") == 6 * (4 * 512 * 3 + 8 * (5 * 256 + 8 * 3))


@pytest.mark.parametrize("name", ["xla_chunked", timing.REPEATED])
def test_grouped_heads_are_compared_with_the_scan_at_whole_groups(name):
  case = Case("linear_attention", "token", 2, 40, 6, 4, 2, "float32", 3)
  arguments, doutput = cases.inputs(case, 0)
  wanted = cases.expected(case, arguments, doutput)
  assert wanted["dq"].shape == (2, 40, 2, 4) and wanted["dv"].shape == (2, 40, 4, 2)
  run = timing.compile_pass(case, "forward_backward", timing.ours(case, name))
  found = {tensor: np.asarray(cases.corners(case, x)) for tensor, x in run(arguments, doutput).items()}
  assert cases.within_bounds(case, cases.errors(found, wanted))


def test_a_constant_decay_is_read_and_not_differentiated():
  none, constant = (Case("linear_attention", gate, 2, 3, 5, 16, 32, "float32") for gate in ("none", "constant"))
  assert sorted(cases.differentiated(constant)) == ["k", "q", "v"]
  for label, reads in (("forward", 1), ("forward_backward", 2)):
    assert cases.floor_bytes(constant, label) == cases.floor_bytes(none, label) + reads * 4 * 5


def test_sets_hold_their_tokens_constant():
  for name, tokens in (("paper", 2**15), ("grid", 2**15), ("length", 2**17), ("cpu", 2**11)):
    found = cases.named(name, list(cases.TIMED))
    assert {case.B * case.T for case in found} == {tokens}
    assert len(set(found)) == len(found)
  with pytest.raises(ValueError, match="--ops=nope: unknown"):
    cases.of_shape((1, 1, 1, 1, 1), ["nope"], "float32")


@pytest.mark.parametrize("op, gate", [("gla", "channel"), ("linear_attention", "constant"), ("delta_rule", "token")])
def test_what_is_expected_is_the_scan_at_the_corners(op, gate, monkeypatch):
  monkeypatch.setattr(cases, "_PIECE", 64)
  case = Case(op, gate, 3, 128, 3, 4, 2, "float32")  # two pieces
  arguments, doutput = cases.inputs(case, 0)
  found = cases.expected(case, arguments, doutput)
  rest = {name: x for name, x in arguments.items() if name not in "qkv"}
  run = lambda q, k, v: getattr(kernels, op)(q, k, v, **rest, implementation="reference")[0]
  output, pullback = jax.vjp(run, *(arguments[name] for name in "qkv"))
  wanted = dict(zip(("output", "dq", "dk", "dv"), (output, *pullback(doutput))))
  for name, x in wanted.items():
    assert found[name].shape == (2, 128, 2, x.shape[-1])
    np.testing.assert_allclose(found[name], x[::2, :, ::2], rtol=1e-5, atol=1e-5, err_msg=name)


def test_measure_checks_before_it_times_and_takes_the_faster_launch():
  case = Case("gla", "channel", 1, 4, 1, 2, 2, "float32")
  value = jnp.arange(8, dtype=jnp.float32).reshape(1, 4, 1, 2) + 1
  slow = lambda i: jax.block_until_ready([value * 1 for _ in range(200)]) and {"output": value}
  calls = {"slow": slow, "fast": lambda i: {"output": value}}
  program = timing.Program(calls, jax.block_until_ready, np.asarray, 2**20)
  right = timing.measure(case, "forward", program, {"output": np.asarray(value)}, 3)
  assert right["launch"] == "fast" and right["within_bounds"] and right["peak_mib"] == 1
  assert right["errors"] == {"output": 0}
  wrong = timing.measure(case, "forward", program, {"output": np.asarray(value) * 1.01}, 3)
  assert not wrong["within_bounds"] and np.isclose(wrong["errors"]["output"], 0.01 / 1.01)
