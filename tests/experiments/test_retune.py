"""The search for a configuration, on an op whose tiles fail in known ways; what the command writes and refuses."""

import dataclasses
import time
import types

import jax
import pytest

import tuning
from kernels.gla import xla_chunked
from kernels.tuned import Tile
from tuning import Problem

PROBLEM = Problem("gla", 16, 16, 1, "bfloat16", timed=(1, 16))
NARROW, WRONG_GRADIENT, TOO_LARGE, FAST = Tile(16), Tile(32), Tile(64), Tile(128)


@dataclasses.dataclass(frozen=True)
class Config:
  chunk: int
  forward: Tile
  backward: Tile | None


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
  fields = {"forward": [NARROW, FAST], "backward": [NARROW, WRONG_GRADIENT, TOO_LARGE, None]}
  return types.SimpleNamespace(Config=Config, configured=configured, candidates=lambda K, V, dtype: fields,
                               heuristic=lambda K, V, dtype, chunk_size: Config(16, NARROW, NARROW))


@pytest.fixture
def clock(monkeypatch):
  """Compiled programs carry their configuration, and times follow from it: FAST forward and no backward are best."""
  monkeypatch.setattr(tuning.Measure, "compile", lambda self, config: config)
  monkeypatch.setattr(tuning.Measure, "__call__", lambda self, config: {
      "forward": 1.0 if config.forward == FAST else 2.0, "forward_backward": 3.0 if config.backward is None else 4.0})


def test_takes_the_fastest_of_those_that_are_right(module, clock, capsys):
  kept = []
  best = tuning.tune(PROBLEM, module, time.monotonic() + 600, lambda *found: kept.append(found))
  assert best == Config(16, FAST, None)
  assert [sum(ms.values()) for _, ms in kept] == [6.0, 5.0, 4.0]
  lines = capsys.readouterr().out.splitlines()
  assert [line.split(": ")[0].removeprefix("gla 16x16 bfloat16 ") for line in lines] == [
      "heuristic", "forward=128/4/2", "backward=32/4/2", "backward=64/4/2", "backward=None"]
  assert "rejected: gate channel: dv has relative error 1.0e+00 over 8e-03" in lines[2]
  assert lines[3].endswith("rejected: RESOURCE_EXHAUSTED: Shared memory size limit exceeded")


def test_nothing_is_kept_when_nothing_works(module, clock):
  module.heuristic = lambda K, V, dtype, chunk_size: Config(16, NARROW, TOO_LARGE)
  module.candidates = lambda K, V, dtype: {"forward": [NARROW, FAST]}
  assert tuning.tune(PROBLEM, module, time.monotonic() + 600, lambda *_: pytest.fail("kept")) is None


def test_an_end_in_time_keeps_the_best_so_far(module, clock, monkeypatch):
  now = iter([0, 0, 2])
  monkeypatch.setattr(tuning, "time", types.SimpleNamespace(monotonic=lambda: next(now)))
  kept = []
  assert tuning.tune(PROBLEM, module, 1, lambda config, ms: kept.append(config)) == Config(16, FAST, NARROW)
  assert kept == [Config(16, NARROW, NARROW), Config(16, FAST, NARROW)]


@pytest.mark.parametrize("op", tuning.GATES)
def test_every_gate_is_checked_and_drawn(op):
  problem = dataclasses.replace(PROBLEM, op=op, timed=(2, 40))
  shapes = {gate: [x.shape for name, x in tuning.draw(problem, gate, B=2, T=40, H=3)[0].items() if name == "log_decay"]
            for gate in tuning.GATES[op]}
  assert shapes == {"gla": {"channel": [(2, 40, 3, 16)]},
                    "linear_attention": {"token": [(2, 40, 3)], "head": [(3,)], "none": []}}[op]


def test_milliseconds_times_calls_until_they_are_long_enough():
  calls = []
  ms = tuning.milliseconds(lambda x: calls.append(x) or time.sleep(0.004), [1])
  assert 4 <= ms < 40 and len(calls) > 8
