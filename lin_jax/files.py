"""The only module that writes results: files and folders that appear whole or not at all, lines, locks and checksums.

It needs the standard library alone, because unpacking a dataset must run where nothing else is installed.
"""

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import os
import pathlib
import shutil
import socket
import sys
from collections.abc import Iterator
from typing import Any, BinaryIO

PARTIAL = ".making"
OUTPUT = "standard output"  # its name in errors
_REFUSALS = errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS


class Unwritable(ValueError):
  """The operating system refuses to write. The message names the file and the reason."""


def write(path: pathlib.Path | str, text: str) -> None:
  """Writes a text file, in UTF-8 on every system, so that `path` always holds either its old or its new content."""
  with replacing(path) as file:
    # Characters that cannot be encoded, such as an undecodable byte of a command line, must not cost the rest.
    file.write(text.encode(errors="backslashreplace"))


def write_json(path: pathlib.Path | str, value: Any, indent: int = 2) -> None:
  """Writes `value` as JSON, in the way that `write` does."""
  write(path, json.dumps(value, indent=indent) + "\n")


@contextlib.contextmanager
def replacing(path: pathlib.Path | str) -> Iterator[BinaryIO]:
  """Yields a file that becomes `path` when the block ends. After an error or a kill, `path` is unchanged.

  A device or a pipe, such as /dev/stdout, is written directly. Raises Unwritable.
  """
  with _refusing(path):
    target = pathlib.Path(os.path.realpath(path))  # a link stays, and its file is replaced
    if target.exists() and not target.is_file() and not target.is_dir():
      with open(target, "wb") as file:
        yield file
      return
    # One name for all would let two processes that write the same file write into each other's.
    temporary = target.with_name(f".{target.name}.{os.getpid()}.new")
    try:
      with open(temporary, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
      os.replace(temporary, target)
    except BaseException:
      with contextlib.suppress(OSError):
        temporary.unlink()
      raise


def append(path: pathlib.Path | str, text: str) -> None:
  """Adds all of `text` to the end of `path`, or nothing if it does not fit on the disk. Raises Unwritable."""
  with _refusing(path), open(path, "ab", buffering=0) as file:
    size, rest = file.seek(0, os.SEEK_END), text.encode()
    try:
      while rest:
        rest = rest[file.write(rest):]
    except OSError:
      file.truncate(size)
      raise


@contextlib.contextmanager
def whole_folder(path: pathlib.Path | str) -> Iterator[pathlib.Path]:
  """Yields an empty folder that becomes `path` when the block ends. Until then there is no folder of that name.

  Remains of an earlier attempt by a killed process are thrown away. Raises ValueError if `path` exists and is not
  empty or if another process is making it, and Unwritable.
  """
  path = pathlib.Path(os.path.abspath(path))
  _require_nothing(path)
  work = path.with_name(path.name + PARTIAL)
  with lock(path.with_name(path.name + ".lock"), f"{path} is being made"):
    _require_nothing(path)
    with _refusing(path):
      if work.exists():
        shutil.rmtree(work)
      work.mkdir(parents=True)
    try:
      with naming(path):
        yield work
      with _refusing(path):
        os.replace(work, path)
    except BaseException:
      shutil.rmtree(work, ignore_errors=True)
      raise


def _require_nothing(path):
  if path.exists() and (not path.is_dir() or any(path.iterdir())):
    raise ValueError(f"{path} exists and is not an empty folder: choose another")


@contextlib.contextmanager
def lock(path: pathlib.Path | str, held: str) -> Iterator[None]:
  """Holds the lock file `path`, which names this process and host, and removes it at the end.

  The lock is the operating system's, so it ends with the process however the process ends, and a file that a killed
  process has left is taken over. Where the file system has no locks, a warning on stderr says so, and nothing is held.
  Raises ValueError, which begins with `held` and names the process, if another process holds the lock.
  """
  path = pathlib.Path(path)
  with _refusing(path):
    missing = [folder for folder in path.parents if not folder.exists()]
  file = _locked(path, held)
  try:
    yield
  finally:
    path.unlink(missing_ok=True)
    file.close()
    for folder in missing:  # only the folders in which nothing was made are removed
      with contextlib.suppress(OSError):
        folder.rmdir()


def _locked(path, held):
  while True:
    with _refusing(path):
      path.parent.mkdir(parents=True, exist_ok=True)
      file = open(path, "a+b", buffering=0)
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      with file:
        raise ValueError(f"{held} by {_holder(file)}: stop that one, or wait until it has ended") from None
    except OSError as e:
      print(f"{path}: this file system has no locks ({e.strerror}): nothing keeps a second process out",
            file=sys.stderr, flush=True)
    # The previous holder may have removed the file between its opening and its locking here.
    if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
      file.close()
      continue
    try:
      with _refusing(path):
        file.truncate(0)
        file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
    except Unwritable:
      path.unlink()
      file.close()
      raise
    return file


def _holder(file):
  try:
    file.seek(0)
    holder = json.loads(file.read())
    return f"process {holder['pid']} on host {holder['host']}"
  except (ValueError, KeyError, TypeError):
    return "another process"


def sha256(path: pathlib.Path | str) -> str:
  """The hexadecimal SHA-256 of a file."""
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def require_sha256(path: pathlib.Path, expected: str) -> None:
  """Raises ValueError if the file cannot be read or its SHA-256 is not `expected`.

  A process reads a file for this only once, unless the file's size or time changes.
  """
  try:
    status = path.stat()
    found = _sha256(path.absolute(), status.st_size, status.st_mtime_ns)
  except OSError as e:
    raise ValueError(f"{path}: named in the manifest, but not readable ({e.strerror})") from e
  if found != expected:
    raise ValueError(f"{path}: has SHA-256 {found}: the manifest says {expected}, so it was changed or is damaged")


@functools.cache
def _sha256(path, size, changed):
  return sha256(path)


@contextlib.contextmanager
def naming(path: pathlib.Path | str) -> Iterator[None]:
  """Turns an error in the block that says that nothing can be written, but not where, into an Unwritable about `path`.

  The libraries that write checkpoints put the system's message into errors of their own.
  """
  try:
    yield
  except Unwritable:
    raise
  except Exception as e:
    if isinstance(e, OSError) and e.filename == OUTPUT:
      raise
    words = next((os.strerror(number) for number in _REFUSALS if os.strerror(number) in str(e)), None)
    if words is None:
      raise
    raise Unwritable(f"{path}: cannot be written: {words}") from e


@contextlib.contextmanager
def _refusing(path):
  try:
    yield
  except OSError as e:
    if e.errno == errno.EPIPE:
      raise
    raise Unwritable(f"{path}: cannot be written: {e.strerror or e}") from e
