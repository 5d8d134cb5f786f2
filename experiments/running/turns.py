"""Several commands share one GPU: they compile side by side, and measure one at a time."""

import contextlib
import fcntl
import os
import pathlib
from collections.abc import Iterator


@contextlib.contextmanager
def turn(path: pathlib.Path | str | None) -> Iterator[None]:
  """Waits until no other process is inside `turn(path)`. `path` is an existing file or folder; None waits for nobody.
  """
  if not path:
    yield
    return
  held = os.open(path, os.O_RDONLY)
  try:
    fcntl.flock(held, fcntl.LOCK_EX)
    yield
  finally:
    os.close(held)
