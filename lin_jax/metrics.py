"""The reports of a run: a progress line, `metrics.jsonl`, TensorBoard scalars, and the loss curve as a picture."""

import collections
import concurrent.futures
import contextlib
import math
import pathlib
import time

import jax

from lin_jax import files, flops, strict_json
from lin_jax.config import LogConfig, TrainConfig
from lin_jax.trainable import trains_all


class Reporter:
  """Reports the steps and evaluations of one run. Only the first process prints and writes."""

  def __init__(self, config: TrainConfig, workdir: pathlib.Path, start: int, bytes_per_token: float):
    self.throughput, self._save_seconds = Throughput(), None
    self._config, self._start, self._bytes_per_token = config, start, bytes_per_token
    self._tokens = config.data.batch_size * config.data.sequence_length
    peak = flops.peak_flops(jax.devices()[0].device_kind)
    per_token = flops.training_flops_per_token(config.model, config.data.sequence_length)
    # The arithmetic of a backward pass that leaves out frozen parameters depends on which they are.
    self._peak_rate = peak * jax.device_count() / per_token if peak and trains_all(config) else None
    self._writer = Writer(workdir, config.log, start) if jax.process_index() == 0 else None

  def start(self, trainable: int, frozen: int, note: str = "") -> None:
    """Prints the run that is about to start, with its numbers of parameters, and a `note` on it."""
    if self._writer:
      device, parts = jax.devices()[0], f", of which {trainable:,} train," if frozen else ""
      print(f"{self._config.name}: {trainable + frozen:,} parameters{parts} on {jax.device_count()} x "
            f"{device.device_kind}, from step {self._start} to {self._config.optim.steps}"
            f"{note and '; '}{note}", flush=True)

  def step(self, step: int, metrics: dict) -> None:
    """Counts a finished step, and reports it when it is due: the first, every `config.log.every`-th and the last.

    `save_seconds` in the record is the time for which saving has kept training waiting since the previous record.
    `tokens_per_second` leaves that time out. The first step after a resumption is printed but not recorded, so that
    the records are the same as an unbroken run's.
    """
    self.throughput.count(self._tokens)
    steps, every = self._config.optim.steps, self._config.log.every
    due = step % every == 0 or step in (1, steps)
    if not due and step != self._start + 1:
      return
    rate = self.throughput.read()
    mfu = rate / self._peak_rate if rate and self._peak_rate else None
    scalars = {name: value.item() for name, value in metrics.items()}
    record = scalars | {"tokens_per_second": rate, "mfu": mfu, "peak_memory_gib": peak_memory_gib(),
                        "save_seconds": self._save_seconds}
    if due:
      self._save_seconds = None
    self._report(step, record if due else {}, progress(step, steps, scalars["loss"], rate, mfu, self._tokens))

  def evaluation(self, step: int, loss: float, seconds: float | None = None, targets: int | None = None) -> float:
    """Reports the held-out loss in nats per token, with the seconds that it took and the number of `targets` that
    counted, and returns the loss."""
    bits = bits_per_byte(loss, self._bytes_per_token)
    self._report(step, {"eval_loss": loss, "bits_per_byte": bits, "evaluation_seconds": seconds,
                        "eval_targets": targets},
                 f"step {step}/{self._config.optim.steps}  held-out loss {loss:.3f}  {bits:.3f} bits per byte")
    return loss

  @contextlib.contextmanager
  def saving(self):
    """Time inside the block goes into `save_seconds` of the next record of a step."""
    begin = time.perf_counter()
    yield
    self._save_seconds = (self._save_seconds or 0.0) + time.perf_counter() - begin

  def close(self) -> None:
    if self._writer:
      self._writer.close()

  def _report(self, step, scalars, line):
    if self._writer:
      if scalars:
        self._writer.write(step, scalars)
      print(line, flush=True)


class Throughput:
  """Tokens per second between the last steps of two successive calls of `read`, without the time inside `paused`."""

  def __init__(self, clock=time.perf_counter):
    self._clock = clock
    self._since = self._until = None
    self._tokens = 0
    self._watch, self._ends = concurrent.futures.ThreadPoolExecutor(1), collections.deque()

  def begin(self, arrays) -> None:
    """Starts a step. It ends when the device has computed these `arrays` of it, however much later it is counted.

    The loop reads a step's metrics once the next step is under way, but at once before it saves or evaluates. Measured
    by the time of reading, the step of a save would seem short and the one after it long.
    """
    self._ends.append(self._watch.submit(lambda: (jax.block_until_ready(arrays), self._clock())[1]))

  def count(self, tokens: int) -> None:
    """Adds the tokens of the oldest step that was begun and not counted, or of one that ends now. The first call only
    starts the clock, because that step includes compilation."""
    self._until = self._ends.popleft().result() if self._ends else self._clock()
    if self._since is None:
      self._since = self._until
    else:
      self._tokens += tokens

  def read(self) -> float | None:
    """Tokens per second since the last `read`, or None before a second step has finished or if no time has passed."""
    if not self._tokens or self._until <= self._since:
      return None
    rate = self._tokens / (self._until - self._since)
    self._since, self._tokens = self._until, 0
    return rate

  @contextlib.contextmanager
  def paused(self):
    """Time inside the block does not count. Every step begun before it must have been counted."""
    begin = self._clock()
    yield
    if self._since is not None:
      self._since += self._clock() - begin


class Writer:
  """Appends scalars to `workdir/metrics.jsonl`, one object per line, and to `workdir/tensorboard` when configured.

  Records of steps after `resume_step` are dropped from both first, because a killed run may have logged steps beyond
  its last checkpoint.
  """

  def __init__(self, workdir: pathlib.Path, config: LogConfig, resume_step: int = 0):
    path = workdir / "metrics.jsonl"
    kept = [record for record in read(path) if record.get("step", 0) <= resume_step] if resume_step else []
    files.write(path, "".join(strict_json.dumps(record) + "\n" for record in kept))
    self._path = path
    self._board = None
    if config.tensorboard:
      from lin_jax.tensorboard import Board  # here, because its import takes a second

      self._board = Board(workdir / "tensorboard", resume_step)

  def write(self, step: int, scalars: dict[str, float]) -> None:
    """Writes one record. Values of None are left out, and a non-finite number is written as a string."""
    scalars = {name: value for name, value in scalars.items() if value is not None}
    files.append(self._path, strict_json.dumps({"step": step, **scalars}) + "\n")
    if self._board:
      self._board.write(step, scalars)

  def close(self) -> None:
    if self._board:
      self._board.close()


class Profile:
  """A trace of the steps from `start` to `stop` in `workdir/profile`, for TensorBoard or xprof.

  The steps are given as "start,stop", and "" switches the trace off.
  """

  def __init__(self, workdir: pathlib.Path, steps: str):
    self._folder, self._tracing = workdir / "profile", False
    self._start, self.stop = map(int, steps.split(",")) if steps else (None, None)

  def before(self, step: int) -> None:
    """Starts the trace if `step`, which is about to be dispatched, is the first one to trace."""
    if step == self._start:
      jax.profiler.start_trace(str(self._folder))
      self._tracing = True

  def after(self, step: int) -> None:
    """Ends the trace if `step`, whose result has been read, is the last one to trace."""
    if step == self.stop:
      self.close()

  def close(self) -> None:
    if self._tracing:
      jax.profiler.stop_trace()
      self._tracing = False


def peak_memory_gib() -> float | None:
  """The most memory that the first device has held so far, in GiB, or None where the backend does not count (a CPU)."""
  stats = jax.local_devices()[0].memory_stats() or {}
  return stats["peak_bytes_in_use"] / 2**30 if "peak_bytes_in_use" in stats else None


def read(path: pathlib.Path) -> list[dict]:
  """The records of a `metrics.jsonl`. A last line cut short by a kill is left out, and a missing file has no records.

  Raises ValueError that names the first other line that is not a record.
  """
  if not path.exists():
    return []
  records = []
  for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
    try:
      records.append(dict(strict_json.loads(line)))
    except (ValueError, TypeError) as e:
      raise ValueError(f"{path}: line {number} is not a record: {line[:80]!r}") from e
  return records


def summary(workdir: pathlib.Path) -> dict:
  """The last value of every metric in `workdir/metrics.jsonl`."""
  merged = {}
  for record in read(workdir / "metrics.jsonl"):
    merged |= record
  return merged


def progress(step: int, steps: int, loss: float, tokens_per_second: float | None, mfu: float | None,
             tokens_per_step: int) -> str:
  """`step 120/1000  loss 3.214  12,345 tok/s  MFU 31.2%  eta 3m12s`, without the values that are unknown."""
  parts = [f"step {step}/{steps}", f"loss {loss:.3f}"]
  if tokens_per_second is not None:
    parts.append(f"{tokens_per_second:,.0f} tok/s")
    if mfu is not None:
      parts.append(f"MFU {mfu:.1%}")
    if tokens_per_second > 0:
      parts.append(f"eta {duration((steps - step) * tokens_per_step / tokens_per_second)}")
  return "  ".join(parts)


def duration(seconds: float) -> str:
  """`42s`, `3m12s`, `5h07m` or `2d03h`. A number that is not finite is written as it is."""
  if not math.isfinite(seconds):
    return str(seconds)
  seconds = round(seconds)
  for size, unit, part, small in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
    if seconds >= size:
      return f"{seconds // size}{unit}{seconds % size // part:02d}{small}"
  return f"{seconds}s"


def bits_per_byte(loss: float, bytes_per_token: float) -> float:
  """Converts nats per token into bits per byte of the text that the tokens encode."""
  return loss / math.log(2) / bytes_per_token


def perplexity(loss: float) -> float:
  """e to the power of a loss in nats. Beyond a loss of 700 it is infinite, which says more than an overflow would."""
  return math.inf if loss >= 700 else math.exp(loss)


def plot_loss(workdir: pathlib.Path, title: str, train_bytes_per_token: float) -> pathlib.Path:
  """Draws training and held-out loss of `workdir/metrics.jsonl`, in bits per byte, as `workdir/loss.png`."""
  from matplotlib.figure import Figure  # here, because its import takes a second

  records = read(workdir / "metrics.jsonl")
  train = [(r["step"], _drawn(bits_per_byte(r["loss"], train_bytes_per_token))) for r in records if "loss" in r]
  held_out = [(r["step"], _drawn(r["bits_per_byte"])) for r in records if "bits_per_byte" in r]
  figure = Figure(figsize=(7, 4.5), layout="constrained")
  axes = figure.subplots()
  axes.plot(*zip(*train), color="tab:blue", linewidth=1, label="training batch")
  if held_out:
    axes.plot(*zip(*held_out), color="tab:orange", marker="o", markersize=4, label=f"held out ({held_out[-1][1]:.3f})")
  axes.set(xlabel="optimizer step", ylabel="loss (bits per byte)", title=title)
  axes.grid(alpha=0.3)
  axes.legend()
  path = workdir / "loss.png"
  with files.replacing(path) as file:
    figure.savefig(file, format="png", dpi=150)
  return path


def _drawn(value):
  """Replaces values that are not finite by a gap in the curve, because infinity has no place on an axis."""
  return value if math.isfinite(value) else math.nan
