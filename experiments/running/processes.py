"""The flags of a command that runs in several processes, on one host or several, and the start of these processes."""

import contextlib
import faulthandler
import os
import pathlib
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator

import jax
from absl import flags

SILENCE_SECONDS = 30  # JAX ends all processes when one of them has shown no life for so long
LINGER_SECONDS = 5  # for which process 0 outlives its error


def define() -> Callable[[], None]:
  """Defines --coordinator, --num_processes, --process_id and --connect_seconds, and returns what acts on them.

  The returned function does nothing without the flags. With them it joins this process to the others, so that
  `jax.devices()` are the devices of all. It raises ValueError if the flags do not fit each other, and if process 0
  cannot use the port. If a process is still missing after --connect_seconds, it ends this one with exit code 2.
  """
  coordinator = flags.DEFINE_string(
      "coordinator", "", "host:port of process 0, the same in every process of a run on several hosts, or 'auto' where "
      "SLURM or Open MPI knows it.")
  count = flags.DEFINE_integer("num_processes", None, "Number of processes, with a coordinator.")
  index = flags.DEFINE_integer("process_id", None, "Number of this process, from 0, with a coordinator.")
  seconds = flags.DEFINE_integer("connect_seconds", 300, "Seconds for which the processes wait for each other at the "
                                 "start.", lower_bound=1)
  return lambda: _join(coordinator.value, count.value, index.value, seconds.value)


@contextlib.contextmanager
def failing_alone() -> Iterator[None]:
  """An error or exit code from the block ends this process without waiting for the others, which JAX then ends.

  JAX would let it wait for them for minutes, while they wait for its part of a step. All others end with process 0, so
  that one lingers a few seconds, in which they may report the same error.
  """
  try:
    yield
  except BaseException as e:
    code = e.code if isinstance(e, SystemExit) else 1
    if not code or not jax.distributed.is_initialized():
      raise
    if not isinstance(e, SystemExit):
      traceback.print_exc()
      _say("if another process of the run has ended, its last lines say why. The same commands resume the run")
    for stream in (sys.stdout, sys.stderr):
      with contextlib.suppress(OSError):
        stream.flush()
    if jax.process_index() == 0:
      time.sleep(LINGER_SECONDS)
    os._exit(code)


def _join(coordinator, count, index, seconds):
  if not coordinator and count is None and index is None:
    return
  settings = {} if coordinator == "auto" else _settings(coordinator, count, index)
  with _limit(seconds, f"--coordinator={coordinator}: not all processes have joined within {seconds} seconds "
                       "(--connect_seconds): is the address that of process 0, and have all been started?"):
    try:
      # JAX aborts with the stack of its own code where it waits in vain, so its limit is the longer one.
      jax.distributed.initialize(
          num_processes=count, process_id=index, initialization_timeout=seconds + 60,
          heartbeat_timeout_seconds=SILENCE_SECONDS, **settings)
    except (RuntimeError, ValueError) as e:
      raise ValueError(f"--coordinator={coordinator}: {str(e).splitlines()[0]}") from e
  jax.devices()  # the processes find them together, so before one of them can fail
  # The stacks of all threads would hide JAX's message about a process that has died.
  faulthandler.enable(all_threads=False)


def _settings(coordinator, count, index):
  given = {"coordinator": coordinator or None, "num_processes": count, "process_id": index}
  if missing := [f"--{name}" for name, value in given.items() if value is None]:
    raise ValueError(f"{' and '.join(missing)} must be given too: several processes need --coordinator, "
                     "--num_processes and --process_id, or --coordinator=auto alone")
  if not re.fullmatch(r"\S+:\d+", coordinator) or not 0 < (port := int(coordinator.rpartition(":")[2])) < 2**16:
    raise ValueError(f"--coordinator={coordinator}: must be host:port of process 0, or 'auto'")
  if not 0 <= index < count:
    raise ValueError(f"--process_id={index}: must be at least 0 and less than --num_processes={count}")
  if index == 0:
    try:
      socket.create_server(("", port)).close()  # JAX would crash
    except OSError as e:
      raise ValueError(f"--coordinator={coordinator}: port {port} cannot be used: {os.strerror(e.errno)}") from e
  # A scheduler would give each process one device of its host. It is to use all that it sees.
  return {"coordinator_address": coordinator, "cluster_detection_method": "deactivate"}


@contextlib.contextmanager
def _limit(seconds: float, message: str) -> Iterator[None]:
  """Ends the process with the message and exit code 2 if the block, which nothing can interrupt, takes longer."""

  def end():
    _say(message)
    os._exit(2)

  timer = threading.Timer(seconds, end)
  timer.daemon = True
  timer.start()
  try:
    yield
  finally:
    timer.cancel()


def _say(message):
  print(f"{pathlib.Path(sys.argv[0]).name}: {message}", file=sys.stderr, flush=True)
