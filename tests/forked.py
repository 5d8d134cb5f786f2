"""Commands in processes that are forked from one which has imported JAX and the library: a start takes no seconds."""

import multiprocessing
import os
import pathlib
import runpy
import sys
import tempfile

import jax

from tests.environment import ENVIRONMENT

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Imports alone, no device and no thread, so that a fork finds what a new process would.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["lin_jax.evaluate", "lin_jax.generate", "lin_jax.training", "tests.forked"])


class Command:
  """`python experiments/script arguments`, begun; it has the part of `subprocess.Popen` that tests need.

  A command's first success is tested as users start it, by itself; this is for its other runs, and for those of
  scripts that put something else in the place of its parts.
  """

  def __init__(self, script, *arguments, cwd=ROOT, env=ENVIRONMENT):
    self._folder = tempfile.TemporaryDirectory()
    words = [str(ROOT / "experiments" / script), *map(str, arguments)]
    self._process = SERVER.Process(target=_run, args=(words, str(cwd), dict(env), self._folder.name))
    self._process.start()

  @property
  def returncode(self):
    return self._process.exitcode

  def send_signal(self, number):
    os.kill(self._process.pid, number)

  def communicate(self):
    """(stdout, stderr) of the process, which has ended."""
    self._process.join()
    with self._folder as folder:
      return tuple((pathlib.Path(folder) / name).read_text() for name in ("stdout", "stderr"))


def _run(words, cwd, env, folder):
  for name, descriptor in (("stdout", 1), ("stderr", 2)):
    with open(pathlib.Path(folder) / name, "wb") as file:
      os.dup2(file.fileno(), descriptor)
  os.environ.clear()
  os.environ.update(env)
  # JAX reads its settings when it is imported, which was in the server.
  jax.config.update("jax_compilation_cache_dir", env.get("JAX_COMPILATION_CACHE_DIR"))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  os.chdir(cwd)
  sys.argv = words
  sys.path.insert(0, str(pathlib.Path(words[0]).parent))
  runpy.run_path(words[0], run_name="__main__")
