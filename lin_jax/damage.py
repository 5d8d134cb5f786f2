"""Reads the arrays of a checkpoint and verifies their checksums. One error covers every reason not to read it."""

import concurrent.futures
import contextlib
import json
import logging
import pathlib
import zlib
from collections.abc import Iterable, Iterator

import jax
import numpy as np
import tensorstore
from jax.experimental import multihost_utils

_CHECKSUMS, CHECKSUMS_FILE = "checksums", "crc32.json"


class DamagedCheckpoint(ValueError):
  """A checkpoint that cannot be read, or that does not hold what was saved."""


def checksum(value) -> int:
  """CRC32 of a value that JSON can write."""
  return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def checksums(arrays: dict[str, jax.Array]) -> dict[str, int]:
  """CRC32 of the bytes of each whole array, however it is sharded."""

  def whole(array):
    local = not isinstance(array, jax.Array) or array.is_fully_addressable
    return array if local else multihost_utils.process_allgather(array, tiled=True)

  with concurrent.futures.ThreadPoolExecutor() as pool:  # zlib and copies to the host release Python's lock
    return dict(zip(arrays, pool.map(_crc, map(whole, arrays.values())), strict=True))


def read_checksums(folder: pathlib.Path) -> dict | None:
  """The item `checksums`, or None for a checkpoint that was saved without it."""
  listed = json.loads((folder / "_CHECKPOINT_METADATA").read_text())["item_handlers"]
  if _CHECKSUMS not in listed and not (folder / _CHECKSUMS).exists():
    return None
  checksums = json.loads((folder / _CHECKSUMS / CHECKSUMS_FILE).read_text())
  if not isinstance(checksums, dict):
    raise ValueError(f"{CHECKSUMS_FILE} holds no checksums")
  return checksums


def stored(item: pathlib.Path, names: Iterable[str]) -> dict[str, tensorstore.TensorStore]:
  """The arrays with these names in the folder of a checkpoint's item. They are opened and not read yet."""
  spec = {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": {"driver": "file", "path": f"{item}/"}}}
  opening = {name: tensorstore.open(spec | {"path": name}) for name in names}
  return {name: future.result() for name, future in opening.items()}


def arrays(item: pathlib.Path, stored: dict[str, tensorstore.TensorStore], targets: dict[str, jax.ShapeDtypeStruct],
           saved: dict[str, int] | None) -> dict[str, jax.Array]:
  """The arrays of an item, placed like `targets`. Raises DamagedCheckpoint if a checksum is not the one in `saved`.

  Orbax would read all arrays at once. If one failed, the reads under way could end the process without a message.
  """

  def array(name):
    whole, target = stored[name].read().result(), targets[name]
    if saved and (found := _crc(whole)) != saved[name]:
      raise DamagedCheckpoint(f"checkpoint {item.parent} is damaged: {item.name} {name} has the CRC32 {found}, but was "
                              f"saved with {saved[name]}")
    whole = whole.astype(target.dtype, copy=False)
    if target.sharding is None:
      return name, jax.device_put(whole)
    return name, jax.make_array_from_callback(target.shape, target.sharding, lambda index: whole[index])

  with concurrent.futures.ThreadPoolExecutor(4) as pool:  # each thread holds a whole array
    return dict(pool.map(array, targets))


@contextlib.contextmanager
def reading(folder: pathlib.Path) -> Iterator[None]:
  """Turns every error that keeps the block from reading the checkpoint `folder` into DamagedCheckpoint.

  A lack of memory is the exception.
  """
  with silenced():
    try:
      yield
    except (DamagedCheckpoint, MemoryError, jax.errors.JaxRuntimeError):
      raise
    except Exception as e:  # Orbax and its store raise errors of many kinds
      raise DamagedCheckpoint(f"checkpoint {folder} is damaged: {type(e).__name__}: "
                              f"{' '.join(str(e).split())[:200]}") from e


def _crc(array) -> int:
  return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8))


@contextlib.contextmanager
def silenced() -> Iterator[None]:
  """Keeps Orbax from logging a failure that a message of our own is about to report."""
  logger = logging.getLogger("absl")
  before, logger.disabled = logger.disabled, True
  try:
    yield
  finally:
    logger.disabled = before
