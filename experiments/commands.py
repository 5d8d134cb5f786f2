"""Runs a command's `main`: user errors end with exit code 2 and one message, everything else with its traceback."""

import logging
import pathlib
import sys
import traceback
from collections.abc import Callable, Sequence

import jax
from absl import app, flags
from absl import logging as absl_logging

from kernels import cpu_compiler

_ROOT = pathlib.Path(__file__).resolve().parent.parent
_SOURCES = tuple(_ROOT / name for name in ("experiments", "lin_jax", "kernels"))


def run(main: Callable[[Sequence[str]], object]) -> None:
  """Parses the flags and calls `main(argv)`, as `absl.app.run` does.

  Unknown or malformed flags, and a ValueError or NotImplementedError that this repository raises, are the user's to
  mend: the message goes to stderr and the exit code is 2. One from inside a dependency is a defect and keeps its
  traceback.
  """
  cpu_compiler.switch_off()
  # JAX otherwise cuts its own frames out, and with them the difference between its errors and ours.
  jax.config.update("jax_traceback_filtering", "off")

  def guarded(argv):
    # Below this level Orbax narrates every save and load; which implementation of an op runs is worth a line.
    absl_logging.set_verbosity(absl_logging.WARNING)
    logging.getLogger("kernels").setLevel(logging.INFO)
    if len(argv) > 1:
      _exit(f"unexpected argument {argv[1]!r}: write options as --name=value")
    try:
      main(argv)
    except (ValueError, NotImplementedError) as e:
      if not _raised_here(e):
        raise
      _exit(e)

  app.run(guarded, flags_parser=_parse)


def define_checkpoint() -> flags.FlagHolder[str]:
  """The flag --checkpoint; `checkpoint_step` reads its value."""
  return flags.DEFINE_string("checkpoint", "last", "Which checkpoint of the run: last, best, or a step.")


def checkpoint_step(value: str) -> int | str | None:
  """The `step` argument of `lin_jax.checkpoint.load_model` for a value of --checkpoint. Raises ValueError."""
  if value in ("last", "best"):
    return None if value == "last" else value
  if not value.isdecimal():
    raise ValueError(f"--checkpoint={value}: must be 'last', 'best' or the number of a step")
  return int(value)


def write(path: str | pathlib.Path, text: str) -> None:
  """Writes a result that has been printed already. Raises ValueError when `path` cannot be written."""
  try:
    pathlib.Path(path).write_text(text)
  except OSError as e:
    raise ValueError(f"{path}: cannot be written: {e.strerror}") from e


def _parse(argv):
  try:
    return flags.FLAGS(argv)
  except flags.Error as e:
    _exit(f"{e}; pass --help for the flags of this command")
  except KeyError as e:  # how ml_collections reports an override of a field that the config does not have
    _exit(f"unknown config field: {e.args[0]}")


def _raised_here(error):
  file = pathlib.Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
  return any(file.is_relative_to(folder) for folder in _SOURCES)


def _exit(message):
  print(f"{pathlib.Path(sys.argv[0]).name}: {message}", file=sys.stderr)
  sys.exit(2)
