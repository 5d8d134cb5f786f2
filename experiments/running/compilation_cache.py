"""Compiled programs, kept between runs of a command, so that a second start compiles nothing. Runs with other seeds,
learning rates or numbers of steps find the same programs.

JAX keeps programs that took a second or longer to compile, under a key that holds the program, its options, the device
and the versions. An entry that cannot be read is a warning of JAX, and its program is compiled again. Nothing is ever
deleted, and the folder can be deleted at any time.
"""

import os
import pathlib
import sys
import tempfile

import jax
from absl import flags

OFF = "off"


def define() -> flags.FlagHolder[str | None]:
  """Defines the flag --compilation_cache, whose value `start` takes."""
  return flags.DEFINE_string(
      "compilation_cache", None, f"Folder in which compiled programs are kept, or '{OFF}'. By default "
      "$JAX_COMPILATION_CACHE_DIR, and without that lin_jax/compiled in $XDG_CACHE_HOME or ~/.cache.")


def start(folder: str | None) -> None:
  """Lets JAX keep compiled programs in `folder`, or where the help of the flag says.

  A folder that cannot be made or written costs one line on stderr, and programs are then compiled at each start.
  """
  if folder is None and "JAX_COMPILATION_CACHE_DIR" in os.environ:
    folder = os.environ["JAX_COMPILATION_CACHE_DIR"] or OFF
  if folder == OFF:
    jax.config.update("jax_compilation_cache_dir", None)
    return
  try:
    path = pathlib.Path(folder) if folder else _default()
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path):
      jax.config.update("jax_compilation_cache_dir", str(path.absolute()))
  except (OSError, RuntimeError) as e:  # pathlib raises the second if there is no home
    jax.config.update("jax_compilation_cache_dir", None)
    reason = e.strerror if isinstance(e, OSError) else e
    print(f"{pathlib.Path(sys.argv[0]).name}: compiled programs are not kept: {folder or 'cache folder'}: {reason}",
          file=sys.stderr, flush=True)


def _default():
  # The specification of XDG has applications ignore a relative path.
  base = pathlib.Path(os.environ.get("XDG_CACHE_HOME", ""))
  return (base if base.is_absolute() else pathlib.Path.home() / ".cache") / "lin_jax" / "compiled"
