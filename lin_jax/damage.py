"""Whether a checkpoint is whole: checksums of what it holds, and one error for whatever keeps it from being read."""

import concurrent.futures
import contextlib
import gc
import json
import logging
import pathlib
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


class DamagedCheckpoint(ValueError):
  """A checkpoint that cannot be read, or that does not hold what was saved."""


def checksum(value) -> int:
  """CRC32 of a value that JSON can write."""
  return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def checksums(arrays: dict[str, jax.Array]) -> dict[str, int]:
  """CRC32 of the bytes of each whole array, however it is sharded."""

  def crc(array):
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8))

  def whole(array):
    local = not isinstance(array, jax.Array) or array.is_fully_addressable
    return array if local else multihost_utils.process_allgather(array, tiled=True)

  with concurrent.futures.ThreadPoolExecutor() as pool:  # zlib and copies to the host leave Python's lock to others
    return dict(zip(arrays, pool.map(crc, map(whole, arrays.values())), strict=True))


def require_same(folder: pathlib.Path, item: str, found: dict[str, int], saved: dict[str, int]) -> None:
  """Raises DamagedCheckpoint for the first checksum of `item` that is not the one that was saved."""
  for name, checksum in found.items():
    if checksum != saved[name]:
      raise DamagedCheckpoint(f"checkpoint {folder} is damaged: {item} {name} has the CRC32 {checksum}, but was saved "
                              f"with {saved[name]}")


def read(folder: pathlib.Path, function: Callable[[], Any]) -> Any:
  """`function()`, which reads the checkpoint `folder`: whatever keeps it from that, but a lack of memory, is raised as
  DamagedCheckpoint."""
  with silenced():
    try:
      return function()
    except (DamagedCheckpoint, MemoryError, jax.errors.JaxRuntimeError):
      raise
    except Exception as e:  # Orbax raises a bare Exception where a file of an array is cut short
      reason = f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"
    gc.collect()  # what Orbax had begun to read, which otherwise complains later of a closed event loop
  raise DamagedCheckpoint(f"checkpoint {folder} is damaged: {reason}")


@contextlib.contextmanager
def silenced() -> Iterator[None]:
  """Keeps Orbax from narrating a failure that one message is about to tell."""
  loggers, hook = [logging.getLogger(name) for name in ("absl", "asyncio")], sys.unraisablehook
  before = [logger.disabled for logger in loggers]
  sys.unraisablehook = lambda _: None
  for logger in loggers:
    logger.disabled = True
  try:
    yield
  finally:
    sys.unraisablehook = hook
    for logger, disabled in zip(loggers, before, strict=True):
      logger.disabled = disabled
