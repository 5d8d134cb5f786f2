"""The time limit, and the runs that are told of it."""

import os
import signal
import time

import pytest

from lin_jax.preemption import stop_signals
from running.deadline import deadline


def test_deadline_reaches_whoever_listens_and_no_one_else():
  with deadline(0.2) as over:
    assert not over()
    while not over():  # nobody trains yet: no signal may come, or the process would end
      time.sleep(0.05)
    for _ in range(2):
      with stop_signals() as terminated:
        end = time.monotonic() + 5
        while not terminated(1) and time.monotonic() < end:
          time.sleep(0.01)
        assert terminated(1)
  with deadline(0) as over:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.01)
    assert over()


def test_interrupts_let_the_run_save_and_then_end_the_command():
  before, reached = signal.getsignal(signal.SIGINT), []
  with pytest.raises(KeyboardInterrupt), deadline(0) as over:
    os.kill(os.getpid(), signal.SIGINT)
    assert over()
    reached.append("saved")
  assert reached == ["saved"] and signal.getsignal(signal.SIGINT) is before
  with pytest.raises(KeyboardInterrupt), deadline(0):
    for _ in range(2):
      os.kill(os.getpid(), signal.SIGINT)
    pytest.fail("went on after the second")
