"""Runs commands under faults: their inputs, and processes with a limited disk, a closed output or another encoding."""

import atexit
import dataclasses
import functools
import multiprocessing
import os
import pathlib
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import sentencepiece
from absl import flags

EXPERIMENTS = pathlib.Path(__file__).resolve().parents[1]
SIZE = ("--config=gla_tiny", "--config.model.width=32", "--config.model.depth=1", "--config.model.mlp_width=32",
        "--config.model.vocab_size=300", "--config.model.mixer.implementation=reference",
        "--config.data.sequence_length=32", "--config.data.batch_size=4", "--config.optim.warmup_steps=1",
        "--config.log.every=1", "--config.log.tensorboard=false", "--config.checkpoint.every=4",
        "--config.eval.every=0", "--config.eval.batches=2", "--config.optim.steps=8")
TEXT = "caf\u00e9: the cat sat on the mat and the dog on the log; it was the best of times, it was the worst. "
SECONDS = 120  # a command that takes longer hangs
# Commands compile the same programs again and again.
_CACHE = tempfile.mkdtemp(prefix="lin_jax_xla")
atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)
SETTINGS = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0",
            "JAX_COMPILATION_CACHE_DIR": _CACHE,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "PYTHONDONTWRITEBYTECODE": "1"}
# The server only imports. It has no device and no thread, so that a fork finds the same as a new process.
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["lin_jax.evaluate", "lin_jax.generate", "lin_jax.training", "faults.runner"])


@dataclasses.dataclass
class Ended:
  """A command that has ended: its exit code (or minus the signal that ended it) and the text that it wrote."""

  code: int
  out: str
  err: str


class Process:
  """A running `python experiments/script options`.

  It is forked from a process that has imported JAX. With `fresh` it is a new Python instead, because Python fixes the
  encoding of its output when it starts.

  Args:
    stdout: a device that receives the output, "closed" for a pipe that nobody reads, or "" for a file.
    largest: bytes beyond which no file may grow, as on a full disk; 0 for no limit.
  """

  def __init__(self, words, *, env=None, stdout="", largest=0, fresh=False):
    self._folder = tempfile.TemporaryDirectory()
    self._fresh = fresh
    env = os.environ | SETTINGS | (env or {})
    words = [str(EXPERIMENTS / words[0]), *map(str, words[1:])]
    if fresh:
      files = [open(pathlib.Path(self._folder.name) / name, "wb") for name in ("stdout", "stderr")]
      self._process = subprocess.Popen([sys.executable, *words], env=env, stdout=files[0], stderr=files[1])
    else:
      self._process = _SERVER.Process(target=_run, args=(words, env, self._folder.name, stdout, largest))
      self._process.start()
    self.pid = self._process.pid

  def running(self) -> bool:
    return self._process.poll() is None if self._fresh else self._process.exitcode is None

  def wait_for(self, text: str) -> None:
    """Waits until the output contains `text` or the process has ended."""
    path, end = pathlib.Path(self._folder.name) / "stdout", time.monotonic() + SECONDS
    while self.running() and time.monotonic() < end and not (path.exists() and text in path.read_text()):
      time.sleep(0.01)

  def end(self) -> Ended:
    """Waits for the end of the process and returns it; kills a process that hangs."""
    if self._fresh:
      code = self._process.wait(SECONDS)
    else:
      self._process.join(SECONDS)
      if self._process.exitcode is None:
        self._process.kill()
        self._process.join()
      code = self._process.exitcode
    with self._folder as folder:
      texts = [pathlib.Path(folder) / name for name in ("stdout", "stderr")]
      return Ended(code, *(path.read_text(errors="replace") if path.exists() else "" for path in texts))


def finish(words, **options) -> Ended:
  """Runs the command to its end."""
  return Process(words, **options).end()


def _run(words, env, folder, stdout, largest):
  folder = pathlib.Path(folder)
  if stdout == "closed":
    end, begin = os.pipe()
    os.close(end)
  else:
    begin = os.open(stdout or folder / "stdout", os.O_WRONLY | os.O_CREAT)
  os.dup2(begin, 1)
  os.dup2(os.open(folder / "stderr", os.O_WRONLY | os.O_CREAT), 2)
  # These objects were made for other files, and would ask the new ones for their position.
  sys.stdout, sys.stderr = (open(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))
  sys.dont_write_bytecode = True  # a full disk would leave halves of bytecode files, which nothing mends
  signal.signal(signal.SIGINT, signal.default_int_handler)  # background commands of a shell ignore it
  if largest:
    env |= {"JAX_COMPILATION_CACHE_DIR": ""}  # a full disk would leave halves of programs in it
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, resource.RLIM_INFINITY))
  os.environ.clear()
  os.environ.update(env)
  import jax

  # JAX reads its settings when it is imported, and that happened in the server.
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_compilation_cache_dir", env["JAX_COMPILATION_CACHE_DIR"] or None)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  # Multiprocessing imports the command that injects the faults, and with it its flags.
  for flag in list(flags.FLAGS.flags_by_module_dict().get("__mp_main__", [])):
    delattr(flags.FLAGS, flag.name)
  sys.argv = words
  sys.path.insert(0, str(EXPERIMENTS))
  runpy.run_path(words[0], run_name="__main__")


class Inputs:
  """The inputs of the commands. The commands themselves make each one when it is first asked for."""

  def __init__(self, folder: pathlib.Path):
    self.folder = folder
    folder.mkdir()

  @functools.cached_property
  def text(self) -> pathlib.Path:
    path = self.folder / "text.txt"
    path.write_text("\n".join(f"{i}: {TEXT * (i % 7 + 2)}" for i in range(60)), encoding="utf-8")
    return path

  @functools.cached_property
  def tokenizer(self) -> pathlib.Path:
    sentencepiece.SentencePieceTrainer.train(
        input=str(self.text), model_prefix=str(self.folder / "spm"), vocab_size=300, model_type="bpe",
        byte_fallback=True, hard_vocab_limit=False, minloglevel=2, normalization_rule_name="identity",
        remove_extra_whitespaces=False)
    return self.folder / "spm.model"

  @functools.cached_property
  def data(self) -> pathlib.Path:
    return self._made("data", *self.prepare(self.folder / "data"))

  def prepare(self, out) -> list:
    return ["prepare_data.py", f"--input={self.text}", "--separator=\n", f"--tokenizer={self.tokenizer}",
            "--val_fraction=0.2", "--test_fraction=0", f"--out={out}"]

  @functools.cached_property
  def run(self) -> pathlib.Path:
    return self._made("run", *self.train(self.folder / "run"))

  def train(self, workdir, data=None) -> list:
    return ["train.py", *SIZE, f"--config.data.path={data or self.data}", f"--workdir={workdir}"]

  @functools.cached_property
  def requests(self) -> pathlib.Path:
    """The first request ends soon, and the others with the command's --tokens."""
    lines = '{"prompt": "the cat", "max_tokens": 4}\n', *2 * ['{"prompt": "the dog sat"}\n']
    (path := self.folder / "requests.jsonl").write_text("".join(lines))
    return path

  @functools.cached_property
  def packed(self) -> pathlib.Path:
    return self._made("packed", "prepare_data.py", f"--pack={self.data}", f"--out={self.folder}/packed")

  @functools.cached_property
  def hub(self) -> pathlib.Path:
    return self._made("hub", "convert.py", f"--workdir={self.run}", f"--to={self.folder}/hub")

  def _made(self, name, *words):
    ended = finish(words)
    if ended.code:
      raise ValueError(f"{' '.join(map(str, words))}: exit code {ended.code}: {ended.err}")
    return self.folder / name
