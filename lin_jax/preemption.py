"""Signals that end a training run after the step under way, with a checkpoint."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[int], str]]:
  """Yields a function of the step that names the signal after which every process must stop after this step, or "".

  Such signals are SIGTERM and the first Ctrl-C (SIGINT). A second Ctrl-C interrupts at once. Only the main thread may
  handle signals, so in another thread the answer is always "". Several processes agree on the step after SIGTERM only.
  """
  came = []

  def stop(number, _):
    came.append(signal.Signals(number).name)
    if number == signal.SIGINT:
      signal.signal(number, signal.default_int_handler)
      with contextlib.suppress(OSError):
        # Not `print`, which may be under way when the signal arrives.
        os.write(2, b"interrupted: saving after this step; again to stop at once\n")

  if jax.process_count() > 1:
    # JAX's own handler makes the processes agree on the step.
    yield lambda step: "SIGTERM" if multihost_utils.reached_preemption_sync_point(step) else ""
  elif threading.current_thread() is not threading.main_thread():
    yield lambda step: ""
  else:
    # A shell's background commands ignore Ctrl-C, which is meant for others.
    previous = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)
                if signal.getsignal(number) is not signal.SIG_IGN}
    try:
      yield lambda step: came[0] if came else ""
    finally:
      for number, handler in previous.items():
        signal.signal(number, handler)
