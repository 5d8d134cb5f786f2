"""The search for a configuration, on an op whose tiles fail in known ways, and the files and errors of the command."""

import contextlib
import dataclasses
import json
import subprocess
import time
import types

import jax
import pytest

from kernel_tuning import search
from kernel_tuning.assembler import Kernel
from kernel_tuning.search import Problem
from kernels import tuned
from kernels.gla import xla_chunked
from kernels.tuned import Tile
from tests.forked import Command

PROBLEM = Problem("gla", ("channel",), 16, 16, 1, "bfloat16", timed=(1, 16))
NARROW, WRONG_GRADIENT, TOO_LARGE, FAST = Tile(16), Tile(32), Tile(64), Tile(128)


@dataclasses.dataclass(frozen=True)
class Config:
  chunk: int
  forward: Tile
  backward: Tile | None


START = Config(16, NARROW, NARROW)
FIELDS = {"forward": [NARROW, FAST], "backward": [NARROW, WRONG_GRADIENT, TOO_LARGE, None]}


@jax.custom_jvp
def doubled_gradient(x):
  return x


doubled_gradient.defjvp(lambda x, dx: (x[0], 2 * dx[0]))


def configured(q, k, v, log_decay, initial_state, *, scale, config):
  if config.backward == TOO_LARGE:
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Shared memory size limit exceeded\nat somewhere")
  if config.backward == WRONG_GRADIENT:
    v = doubled_gradient(v)
  return xla_chunked.gla(q, k, v, log_decay, initial_state, scale=scale, chunk_size=config.chunk)


@pytest.fixture
def module():
  return types.SimpleNamespace(configured=configured)


@pytest.fixture
def clock(monkeypatch):
  """Compiled programs carry their configuration, and times follow from it: FAST forward and no backward are best."""
  monkeypatch.setattr(search.Measure, "compile", lambda self, config: config)
  monkeypatch.setattr(search.Measure, "__call__", lambda self, config: (
      (1.0 if config.forward == FAST else 2.0) + (3.0 if config.backward is None else 4.0)))
  monkeypatch.setattr(search, "CHECKED", 40)


def tune(module, starts, fields, deadline=None):
  return search.tune(PROBLEM, module, starts, fields, time.monotonic() + 600 if deadline is None else deadline)


def test_takes_the_fastest_of_those_that_are_right(module, clock, capsys):
  assert tune(module, [START], FIELDS) == (Config(16, FAST, None), 4.0, True)
  lines = capsys.readouterr().out.splitlines()
  assert [line.split(": ")[0].removeprefix("gla channel 16x16 bfloat16 ") for line in lines] == [
      "start chunk=16 forward=16/4/2 backward=16/4/2", "forward=128/4/2", "backward=32/4/2", "backward=64/4/2",
      "backward=None"]


def test_a_fast_one_that_is_wrong_or_does_not_run_gives_way_to_the_next(module, clock, capsys):
  right = Config(16, NARROW, NARROW)
  for tile, reason in ((WRONG_GRADIENT, "gate channel: dv has relative error 1.0e+00 over 8e-03"),
                       (TOO_LARGE, "RESOURCE_EXHAUSTED: Shared memory size limit exceeded")):
    assert tune(module, [Config(16, FAST, tile), right], {}) == (right, 6.0, True)
    assert f"backward={search.describe(tile)}: rejected: {reason}\n" in capsys.readouterr().out


def test_begins_with_the_faster_start(module, clock):
  listed = Config(16, FAST, NARROW)
  for starts in ([START, listed], [listed, START]):
    assert tune(module, starts, {}) == (listed, 5.0, True)


def test_nothing_is_found_when_nothing_works(module, clock):
  assert tune(module, [Config(16, NARROW, TOO_LARGE)], {"forward": [NARROW, FAST]}) is None


def test_an_end_in_time_keeps_the_best_so_far(module, clock, monkeypatch):
  now, tried, compiled = iter([0, 0, 2, 2]), [], search.compiled
  monkeypatch.setattr(search, "time", types.SimpleNamespace(monotonic=lambda: next(now)))
  monkeypatch.setattr(search, "compiled", lambda measure, configs, threads: tried.append(configs) or compiled(
      measure, configs, threads))
  assert tune(module, [START], FIELDS | {"chunk": [32]}, 1) == (Config(16, FAST, NARROW), 5.0, False)
  assert len(tried) == 3  # the start, forward and backward: nothing is compiled behind the limit


def test_the_gpu_is_held_for_each_measurement_and_for_the_check(module, clock):
  held = []

  @contextlib.contextmanager
  def turn():
    held.append(True)
    yield

  assert search.tune(PROBLEM, module, [START], FIELDS, time.monotonic() + 600, turn)[2]
  assert len(held) == 5 + 1


def test_spilling_kernels_are_rejected(monkeypatch):
  """As on a GPU: the watch stands for the assembler, and must reach the compiler."""
  class Watch:
    options = {"xla_embed_ir_in_executable": True}

    def used(self):
      return True

    def kernels(self, prefix):
      return {f"{prefix}_scan": Kernel(255, spilled, 0, 128)}

  monkeypatch.setattr(search.assembler, "watch", lambda: contextlib.nullcontext(Watch()))
  monkeypatch.setattr(search.jax, "default_backend", lambda: "gpu")
  spilled = 20
  with pytest.raises(search.Rejected, match=r"spills bytes of registers: {'gla_scan': 20}"):
    search.compile_for(PROBLEM, lambda x: x + 1, 1.0)
  allowed = dataclasses.replace(PROBLEM, may_spill=True)
  assert search.compile_for(allowed, lambda x: x + 1, 1.0)(1.0) == 2
  spilled = 16
  assert search.compile_for(PROBLEM, lambda x: x + 1, 1.0)(1.0) == 2


@pytest.mark.parametrize("op", search.GATE_GROUPS)
def test_every_gate_is_checked_and_drawn(op):
  problem = dataclasses.replace(PROBLEM, op=op, timed=(2, 40))
  shapes = {gate: [x.shape for name, x in search.draw(problem, gate, B=2, T=40, H=3)[0].items() if name == "log_decay"]
            for gates in search.GATE_GROUPS[op] for gate in gates}
  assert shapes == {"gla": {"channel": [(2, 40, 3, 16)]},
                    "linear_attention": {"token": [(2, 40, 3)], "constant": [(3,)], "none": []},
                    "delta_rule": {"none": [], "token": [(2, 40, 3)], "channel": [(2, 40, 3, 16)]}}[op]


def test_milliseconds_times_calls_until_they_are_long_enough(monkeypatch):
  calls = []  # of 4 ms each, on a clock that they alone move
  monkeypatch.setattr(search.time, "perf_counter", lambda: 0.004 * len(calls))
  assert search.milliseconds(lambda x: calls.append(x), [1]) == 4
  assert len(calls) == 1 + (1 + 2 + 4) + search.BATCHES * 4  # four calls are the first to take 10 ms


# The command, with an op that has one tile in the place of the kernels.
COMMAND = """
import dataclasses, sys, types
from kernels import tuned
from kernels.gla import xla_chunked
from kernels.tuned import Tile

@dataclasses.dataclass(frozen=True)
class Config:
  chunk: int
  scan: Tile

sys.modules["kernels.gla.pallas_triton_config"] = types.SimpleNamespace(
    Config=Config, heuristic=lambda K, V, dtype, chunk_size: Config(16, Tile(16)),
    candidates=lambda K, V, dtype: {"scan": [Tile(16), Tile(32, 8, 3)]})
sys.modules["kernels.gla.pallas_triton"] = types.SimpleNamespace(
    configured=lambda *, config, **x: xla_chunked.gla(**x, chunk_size=16))
import retune
from kernel_tuning import search
search.CHECKED = 40
retune.commands.run(retune.main)
"""


@pytest.fixture
def run(tmp_path_factory):
  (script := tmp_path_factory.mktemp("command") / "script.py").write_text(COMMAND)

  def run(out, *flags):
    process = Command(script, "--ops=gla", "--tokens=16", f"--out={out}", *flags)
    stdout, stderr = process.communicate()
    assert "Traceback" not in stderr, stderr
    return subprocess.CompletedProcess(flags, process.returncode, stdout, stderr)

  return run


def test_command_adds_to_the_file(run, tmp_path):
  out = tmp_path / "tuned" / "device.json"
  first = run(out, "--shapes=16x16x1")
  assert first.returncode == 0 and "gla channel 16x16 bfloat16 scan=32/8/3: " in first.stdout
  assert run(out, "--shapes=8x16x1", "--dtype=float32").returncode == 0
  record = json.loads(out.read_text())
  assert [(x["K"], x["V"], x["dtype"], x["timed"]) for x in record["configs"]] == [
      (16, 16, "bfloat16", {"B": 1, "T": 16, "H": 1}), (8, 16, "float32", {"B": 1, "T": 16, "H": 1})]
  late = run(out, "--shapes=16x16x1", "--limit_seconds=0.001", "--again")
  assert "gla channel 16x16 bfloat16: not begun, --limit_seconds=0.001 are over" in late.stdout
  assert "start" not in run(out, "--shapes=16x16x1", "--part=1/2", f"--turns={out}").stdout  # it is complete
  assert "start" not in run(out, "--shapes=16x16x1,8x16x1", "--part=2/2", "--again", "--dtype=bfloat16",
                            "--limit_seconds=0.001").stdout
  record["configs"][0]["config"] = {"chunk": 16, "old": None}
  out.write_text(json.dumps(record))
  stale = run(out, "--shapes=16x16x1", "--again")
  assert "entry ignored: gla channel 16x16 bfloat16: config={'chunk': 16, 'old': None} must" in stale.stdout
  record = json.loads(out.read_text())
  for entry in record["configs"]:
    assert entry["config"]["chunk"] == 16 and entry["config"]["scan"]["block"] in (16, 32)
    assert entry["forward_backward_ms"] > 0
  out.write_text(json.dumps(record | {"device": "another"}))
  other = run(out, "--shapes=16x16x1")
  assert other.returncode == 2 and "was measured with {'device': 'another'" in other.stderr


# The command's flags bear names that other commands use, so that it gets a process of its own.
GATES_APART = """
import dataclasses, pathlib, sys, types
import retune
from kernels.tuned import Tile
from kernel_tuning.search import Problem

@dataclasses.dataclass(frozen=True)
class Config:
  chunk: int
  scan: Tile

path, record = pathlib.Path(sys.argv[1]), {"device": "X", "versions": {}, "configs": []}
every = Problem("linear_attention", ("token", "constant", "none"), 16, 16, 1, "bfloat16", timed=(1, 16))
constant = dataclasses.replace(every, gates=("constant",))
wider = dataclasses.replace(every, K=32)
for problem, chunk, complete in ((every, 16, True), (constant, 32, False), (wider, 64, True)):
  retune.save(path, record, problem, Config(chunk, Tile(16)), 1.0, complete)
configs = types.SimpleNamespace(Config=Config, heuristic=lambda K, V, dtype, chunk_size: Config(0, Tile(16)))
assert [config.chunk for config in retune.starts(record, constant, configs)] == [32, 0]
assert [config.chunk for config in retune.starts(record, dataclasses.replace(constant, K=17), configs)] == [64, 0]
assert [config.chunk for config in retune.starts(record, dataclasses.replace(constant, K=33), configs)] == [0]
narrow = dataclasses.replace(wider, V=8)
complete = [retune.is_complete(record, problem) for problem in (every, constant, wider, narrow)]
assert complete == [False, False, True, False]
"""


def test_a_gate_searched_alone_leaves_the_entry_of_the_others(tmp_path):
  path = tmp_path / "x.json"
  (script := tmp_path / "script.py").write_text(GATES_APART)
  process = Command(script, path)
  assert not process.communicate()[1] and process.returncode == 0
  listed = {key[1:3]: config["chunk"] for key, config in tuned.read(path).items()}
  assert listed == {("token", 16): 16, ("none", 16): 16, ("constant", 16): 32,
                    **{(gate, 32): 64 for gate in ("token", "constant", "none")}}


@pytest.mark.parametrize("flag, rule", [
    ("--shapes=16", "--shapes=16: a shape is KxV or KxVxH, for instance 128x128x16"),
    ("--part=3/2", "--part=3/2: must be i/n with i from 1 to n"),
    ("--ops=softmax", "--ops=softmax: known ops are gla, linear_attention, delta_rule"),
    ("--out=", "--out is empty and the default backend is cpu; without a GPU it is required"),
])
def test_wrong_flags(run, tmp_path, flag, rule):
  result = run(tmp_path / "x.json", "--shapes=16x16x1", flag)
  assert result.returncode == 2 and rule in result.stderr
