"""A time limit for commands that save unfinished work."""

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def deadline(seconds: float) -> Iterator[Callable[[], bool]]:
  """Yields a function that says whether `seconds` (0: no limit) are over or SIGTERM or Ctrl-C has come.

  From then on each training run in the context receives SIGTERM, which ends it with a checkpoint. After Ctrl-C the
  context ends in KeyboardInterrupt. A second Ctrl-C raises it at once. Only the main thread may use this.
  """
  end, came, done = time.monotonic() + (seconds or math.inf), [], threading.Event()

  def over():
    return bool(came) or time.monotonic() >= end

  def watch():
    # While `train` runs, it listens with its own handler; a signal before that would be lost.
    sent = None
    while not done.wait(0.1):
      handler = signal.getsignal(signal.SIGTERM)
      if over() and handler not in (remember, sent):
        sent = handler
        os.kill(os.getpid(), signal.SIGTERM)

  def remember(number, _):
    came.append(number)
    if number == signal.SIGINT:
      signal.signal(number, signal.default_int_handler)
      with contextlib.suppress(OSError):
        os.write(2, b"interrupted: saving; again to stop at once\n")  # the signal may interrupt a print

  previous = {number: signal.signal(number, remember) for number in (signal.SIGTERM, signal.SIGINT)
              if signal.getsignal(number) is not signal.SIG_IGN}
  thread = threading.Thread(target=watch, daemon=True)
  thread.start()
  try:
    yield over
  finally:
    done.set()
    thread.join()
    for number, handler in previous.items():
      signal.signal(number, handler)
  if signal.SIGINT in came:
    raise KeyboardInterrupt
