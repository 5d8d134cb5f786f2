"""The progress line, throughput without pauses, the records of a run, and its picture."""

import json

import jax
import matplotlib.image
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from lin_jax import metrics
from lin_jax.config import LogConfig
from tests.lin_jax import tiny


class Clock:
  """A clock that the test sets."""

  now = 0.0

  def __call__(self):
    return self.now


def test_progress_leaves_out_what_is_unknown():
  assert metrics.progress(120, 1000, 3.2141, 12345.4, 0.3124, 2694) == (
      "step 120/1000  loss 3.214  12,345 tok/s  MFU 31.2%  eta 3m12s")
  assert metrics.progress(120, 1000, 3.2141, 12345.4, None, 2694) == (
      "step 120/1000  loss 3.214  12,345 tok/s  eta 3m12s")
  assert metrics.progress(1, 1000, 3.2141, None, None, 2694) == "step 1/1000  loss 3.214"


@pytest.mark.parametrize("seconds, text", [(0.4, "0s"), (59.6, "1m00s"), (3599, "59m59s"), (18420, "5h07m"),
                                           (86400 * 2 + 3600 * 3 + 1799, "2d03h")])
def test_duration(seconds, text):
  assert metrics.duration(seconds) == text


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_any_quantity_may_be_infinite_or_not_a_number(tmp_path, capsys, value):
  assert metrics.duration(value) == str(value)
  assert metrics.perplexity(value) == pytest.approx(np.exp(value), nan_ok=True)
  assert metrics.progress(2, 9, value, value, value, 512).startswith(f"step 2/9  loss {value}  {value} tok/s  MFU")
  config = tiny.config("", steps=3)
  config.log.tensorboard = True
  reporter = metrics.Reporter(config, tmp_path, 0, 2.0)
  for step in range(1, 4):
    reporter.step(step, {name: np.float32(value) for name in ("loss", "accuracy", "grad_norm", "learning_rate")})
    assert reporter.evaluation(step, value) is value
  reporter.close()
  refuse = lambda word: pytest.fail(f"{word} is not JSON")
  for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
    json.loads(line, parse_constant=refuse)
  assert repr(metrics.summary(tmp_path)["bits_per_byte"]) == repr(value)
  assert {repr(v) for _, name, v in board(tmp_path) if name != "tokens_per_second"} == {repr(value)}
  metrics.Writer(tmp_path, config.log, resume_step=2).close()  # which writes them anew
  losses = [r["eval_loss"] for r in metrics.read(tmp_path / "metrics.jsonl") if "eval_loss" in r]
  assert list(map(repr, losses)) == [repr(value)] * 2
  assert metrics.plot_loss(tmp_path, "tiny", 1.0).is_file()


def test_no_speed_has_no_arrival():
  assert metrics.progress(2, 9, 3.0, 0.0, None, 512) == "step 2/9  loss 3.000  0 tok/s"


def test_a_damaged_record_is_named(tmp_path):
  (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n\0\0\n{"step": 3}\n')
  with pytest.raises(ValueError, match=r"metrics.jsonl: line 2 is not a record: b'\\x00\\x00'"):
    metrics.read(tmp_path / "metrics.jsonl")


def test_throughput_leaves_out_the_first_step_and_pauses():
  clock = Clock()
  throughput = metrics.Throughput(clock)
  with throughput.paused():  # the evaluation before the first step
    clock.now = 50.0
  clock.now = 90.0  # compilation
  throughput.count(1000)
  assert throughput.read() is None
  clock.now = 92.0
  throughput.count(1000)
  with throughput.paused():
    clock.now = 192.0
  clock.now = 194.0
  throughput.count(1000)
  assert throughput.read() == 2000 / 4
  clock.now = 195.0
  throughput.count(1000)
  assert throughput.read() == 1000
  throughput.count(1000)
  assert throughput.read() is None  # no time has passed


def test_steps_before_and_after_a_save_are_as_fast_as_the_others(tmp_path):
  config = tiny.config("", steps=9)
  reporter, clock = metrics.Reporter(config, tmp_path, 0, 2.0), Clock()
  reporter.throughput = metrics.Throughput(clock)

  finish = lambda step: reporter.step(step, {"loss": np.float32(3.5)})
  under_way = None
  for step in range(1, 10):  # a step takes a second, in which the device has it and then the host
    clock.now += 0.75
    reporter.throughput.begin(jax.numpy.zeros(1))
    reporter.throughput._ends[-1].result()
    clock.now += 0.25
    if under_way:
      finish(under_way)
    under_way = step
    if step == 5:
      finish(under_way)
      under_way = None
      with reporter.throughput.paused():
        reporter.evaluation(step, 3.0, 60.0)
        with reporter.saving():
          clock.now += 100
  finish(under_way)
  reporter.close()
  steps = [r for r in metrics.read(tmp_path / "metrics.jsonl") if "loss" in r]
  assert [r["tokens_per_second"] for r in steps[1:]] == [pytest.approx(8 * 64)] * 8
  assert [r["step"] for r in steps if "save_seconds" in r] == [6]
  assert [r["evaluation_seconds"] for r in metrics.read(tmp_path / "metrics.jsonl") if "eval_loss" in r] == [60.0]


def test_steps_are_reported_when_due_with_their_model_flops_utilisation(tmp_path, monkeypatch, capsys):
  config = tiny.config("", steps=7)
  config.log.every = 3
  rate = 1000.0  # tokens per second
  flops = metrics.flops.training_flops_per_token(config.model, config.data.sequence_length)
  monkeypatch.setattr(metrics.flops, "peak_flops", lambda kind: rate * flops / 0.25 / jax.device_count())
  reporter, clock = metrics.Reporter(config, tmp_path, 0, 2.0), Clock()
  reporter.throughput = metrics.Throughput(clock)
  for step in range(1, 8):
    clock.now += 8 * 64 / rate
    reporter.step(step, {"loss": np.float32(3.5), "skipped": np.int32(0)})
  reporter.close()
  records = metrics.read(tmp_path / "metrics.jsonl")
  assert [r["step"] for r in records] == [1, 3, 6, 7] and "mfu" not in records[0]
  for record in records[1:]:
    assert record["tokens_per_second"] == pytest.approx(rate) and record["mfu"] == pytest.approx(0.25)
  assert capsys.readouterr().out.splitlines()[2] == "step 6/7  loss 3.500  1,000 tok/s  MFU 25.0%  eta 1s"


def test_the_first_step_after_a_resumption_is_printed_but_no_record(tmp_path, capsys):
  config = tiny.config("", steps=7)
  config.log.every = 3
  reporter = metrics.Reporter(config, tmp_path, 4, 2.0)
  for step in range(5, 8):
    reporter.step(step, {"loss": np.float32(3.5), "skipped": np.int32(0)})
  reporter.close()
  assert [r["step"] for r in metrics.read(tmp_path / "metrics.jsonl")] == [6, 7]
  assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == ["5/7", "6/7", "7/7"]


def test_records_are_json_lines_and_a_resumed_run_drops_those_it_repeats(tmp_path):
  writer = metrics.Writer(tmp_path, LogConfig(tensorboard=False))
  for step in range(1, 6):
    writer.write(step, {"loss": 1.0 / step, "mfu": None})
  writer.write(5, {"eval_loss": float("nan")})
  writer.close()
  lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
  assert json.loads(lines[1]) == {"step": 2, "loss": 0.5} and json.loads(lines[-1]) == {"step": 5, "eval_loss": "nan"}
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"step": 6, "lo')  # as a kill leaves it
  writer = metrics.Writer(tmp_path, LogConfig(tensorboard=False), resume_step=3)
  writer.write(4, {"loss": 0.1})
  writer.close()
  records = metrics.read(tmp_path / "metrics.jsonl")
  assert [(r["step"], r["loss"]) for r in records] == [(1, 1.0), (2, 0.5), (3, 1 / 3), (4, 0.1)]
  assert metrics.summary(tmp_path) == {"step": 4, "loss": 0.1}
  metrics.Writer(tmp_path, LogConfig(tensorboard=False)).close()
  assert metrics.read(tmp_path / "metrics.jsonl") == []


def test_scalars_reach_tensorboard(tmp_path):
  writer = metrics.Writer(tmp_path, LogConfig(tensorboard=True))
  writer.write(7, {"loss": 0.25})
  assert board(tmp_path) == [(7, "loss", 0.25)]  # before the writer is closed: a kill loses nothing
  writer.close()


def board(workdir):
  """(step, name, value) of everything in the one event file."""
  (path,) = (workdir / "tensorboard").iterdir()
  data, scalars = path.read_bytes(), []
  while data:  # records of TensorFlow's format: length, its checksum, event, its checksum
    size = int.from_bytes(data[:8], "little")
    event = event_pb2.Event.FromString(data[12:12 + size])
    scalars += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
    data = data[16 + size:]
  return scalars


def test_a_resumed_run_has_every_step_once_in_tensorboard(tmp_path):
  def write(resume_step, *steps):
    writer = metrics.Writer(tmp_path, LogConfig(tensorboard=True), resume_step)
    for step in steps:
      writer.write(step, {"loss": float(step), "accuracy": 0.5})
      writer.write(step, {"eval_loss": float("nan")})
    writer.close()  # which writes nothing

  write(0, 0, 1, 2)
  write(0, 0, 1, 2, 3)
  write(2, 3, 4)
  (path,) = (tmp_path / "tensorboard").iterdir()
  whole = path.read_bytes()
  path.write_bytes(whole[:-30])  # as a kill leaves it
  (tmp_path / "tensorboard" / "events.out.tfevents.1.host").write_bytes(whole)  # between a rename and a removal
  write(3, 4, 5)
  names = ["loss", "accuracy", "eval_loss"]
  assert [(step, name) for step, name, _ in board(tmp_path)] == [(s, n) for s in range(6) for n in names]
  assert [value for _, name, value in board(tmp_path) if name == "loss"] == [0, 1, 2, 3, 4, 5]


def test_loss_curve_is_drawn_in_bits_per_byte(tmp_path):
  assert metrics.bits_per_byte(0.6931471805599453 * 8, bytes_per_token=4.0) == 2.0
  writer = metrics.Writer(tmp_path, LogConfig(tensorboard=False))
  writer.write(0, {"bits_per_byte": 8.0})
  for step in range(1, 20):
    writer.write(step, {"loss": 6.0 / step})
  writer.close()
  picture = matplotlib.image.imread(metrics.plot_loss(tmp_path, "tiny", 1.0))
  assert picture.shape[0] > 500 and picture.shape[1] > 900
  # Both curves' colours are there, blue for training and orange for held-out text.
  colours = {tuple(c) for c in (picture[..., :3].reshape(-1, 3) * 255).round().astype(int)}
  assert {(31, 119, 180), (255, 127, 14)} <= colours
