"""Work in a process that has the compiler's default flags and one device, as users have and this suite has not."""

import atexit
import concurrent.futures
import functools
import os
import warnings

from tests.forked import SERVER


def run(function, *args):
  """`function(*args)` of an importable module, in a process that all calls of this one share."""
  return _pool().submit(function, *args).result()


@functools.cache
def _pool():
  pool = concurrent.futures.ProcessPoolExecutor(1, mp_context=SERVER, initializer=_start)
  atexit.register(pool.shutdown)
  return pool


def _start():
  os.environ.pop("XLA_FLAGS", None)
  # That this machine's compiler is at fault is what these tests are about.
  warnings.filterwarnings("ignore", "jaxlib .* compiles some fusions wrongly", RuntimeWarning)
