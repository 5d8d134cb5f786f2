"""Runs a command's `main`. Errors of the user or of the machine end with exit code 2 and one message, Ctrl-C ends with
exit code 130, and a defect ends with its traceback."""

import io
import logging
import os
import pathlib
import sys
import threading
import traceback
from collections.abc import Callable, Sequence

import jax
from absl import app, flags
from absl import logging as absl_logging

from kernels import cpu_compiler
from lin_jax import files

from . import compilation_cache

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_SOURCES = tuple(_ROOT / name for name in ("experiments", "lin_jax", "kernels"))


def run(main: Callable[[Sequence[str]], object], *, cached: bool = False) -> None:
  """Parses the flags and calls `main(argv)`, as `absl.app.run` does.

  With `cached`, the command keeps its compiled programs as `compilation_cache` says, and has the flag for that.

  Unknown or malformed flags, and a ValueError or NotImplementedError that this repository raises, are errors of the
  user. Their message goes to stderr, and the exit code is 2. The same holds for whatever the operating system refuses,
  even inside a dependency: a full disk, a folder that cannot be written, an output that nobody reads any more. Any
  other error from inside a dependency is a defect and keeps its traceback.
  """
  cpu_compiler.switch_off()
  cache = compilation_cache.define() if cached else None
  if sys.stdout is not None:  # it may have been closed before the command began
    sys.stdout = _Output(sys.stdout)
  # Otherwise JAX cuts out its own frames, and with them the difference between its errors and ours.
  jax.config.update("jax_traceback_filtering", "off")

  def guarded(argv):
    # Below this level Orbax narrates every save and load. The choice of an op's implementation deserves a line.
    absl_logging.set_verbosity(absl_logging.WARNING)
    logging.getLogger("kernels").setLevel(logging.INFO)
    # Errors while a checkpoint is written are logged with their traceback before they are raised, so once too often.
    for handler in {absl_logging.get_absl_handler(), *logging.getLogger().handlers}:
      handler.addFilter(lambda record: not record.exc_info)
    threading.excepthook, sys.unraisablehook = _thread_error, _unraisable
    if len(argv) > 1:
      _exit(f"unexpected argument {argv[1]!r}: write options as --name=value")
    if cache is not None:
      compilation_cache.start(cache.value)
    try:
      main(argv)
      if sys.stdout is not None:
        sys.stdout.flush()  # a later failure could not become a message
    except KeyboardInterrupt:
      _exit("interrupted", code=130)
    except Exception as e:
      if not (_system_error(e) or isinstance(e, (ValueError, NotImplementedError)) and _raised_here(e)):
        raise
      _exit(_system_error(e) or e)

  app.run(guarded, flags_parser=_parse)


def define_checkpoint() -> flags.FlagHolder[str]:
  """Defines the flag --checkpoint, whose value `checkpoint_step` reads."""
  return flags.DEFINE_string("checkpoint", "last", "Checkpoint of the run: last, best, previous (the "
                             "newest one before the last that loads), or a step.")


def checkpoint_step(value: str) -> int | str | None:
  """Returns the `step` argument of `lin_jax.checkpoint.load_model` for a value of --checkpoint. Raises ValueError."""
  if value in ("last", "best", "previous"):
    return None if value == "last" else value
  if not value.isdecimal():
    raise ValueError(f"--checkpoint={value}: must be 'last', 'best', 'previous' or the number of a step")
  return int(value)


def text(flag: flags.FlagHolder[str]) -> str:
  """Reads a flag whose value is text and not a path as UTF-8, whatever the locale. Raises ValueError."""
  try:
    return os.fsencode(flag.value).decode("utf-8")
  except UnicodeDecodeError as e:
    raise ValueError(f"--{flag.name}={flag.value!a}: must be UTF-8") from e


def _parse(argv):
  try:
    return flags.FLAGS(argv)
  except flags.Error as e:
    _exit(f"{e}; pass --help for the flags of this command")
  except OSError as e:  # the exit code after printing the help
    _exit(_system_error(e))
  except KeyError as e:  # ml_collections reports an override of an unknown field so
    _exit(f"unknown config field: {e.args[0]}")


def _raised_here(error):
  file = pathlib.Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
  return any(file.is_relative_to(folder) for folder in _SOURCES)


class _Output(io.TextIOWrapper):
  """Standard output that names itself in its errors. It writes a character that its encoding lacks as a code, as
  standard error does, so that such a character does not end a run."""

  def __init__(self, stream):
    super().__init__(stream.buffer, stream.encoding, "backslashreplace", line_buffering=stream.line_buffering,
                     write_through=stream.write_through)
    self._stream = stream  # which closes the buffer when nothing refers to it

  def write(self, text):
    try:
      return super().write(text)
    except OSError as e:
      raise OSError(e.errno, e.strerror, files.OUTPUT) from e

  def flush(self):
    try:
      super().flush()
    except OSError as e:
      raise OSError(e.errno, e.strerror, files.OUTPUT) from e


def _system_error(error):
  """Returns the message for an error of the operating system, or None for any other error."""
  if isinstance(error, BrokenPipeError):
    return "standard output was closed before the command had ended"
  if isinstance(error, OSError) and error.errno:
    return ": ".join(str(part) for part in (error.filename, error.strerror) if part)
  return None


def _thread_error(args):
  """Prints one line for a system error in a thread, such as the one that writes the events for TensorBoard."""
  message = _system_error(args.exc_value)
  if message is None:
    threading.__excepthook__(args)
  else:
    print(f"{pathlib.Path(sys.argv[0]).name}: {message}, in the background", file=sys.stderr, flush=True)


def _unraisable(args):
  # Once a checkpoint's first write has failed, its other writes say this, from threads that are not Python's.
  if not (isinstance(args.exc_value, RuntimeError) and str(args.exc_value) == "Event loop is closed"):
    sys.__unraisablehook__(args)


def _exit(message, code=2):
  for stream, text in ((sys.stdout, ""), (sys.stderr, f"{pathlib.Path(sys.argv[0]).name}: {message}\n")):
    try:
      if stream is not None:
        stream.write(text)
        stream.flush()
    except OSError:  # the rest goes nowhere; otherwise Python would try again, and fail, after the message
      os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
  sys.exit(code)
