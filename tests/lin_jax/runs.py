"""Runs of one test that share their compiled programs, and what happens to them at a step."""

import contextlib
import signal
import sys

import jax
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from lin_jax import metrics as reporting
from lin_jax import training


@contextlib.contextmanager
def compilation_cache(folder):
  """Keeps compiled programs in the folder."""
  _keep_programs(str(folder))
  yield
  _keep_programs(None)


def _keep_programs(folder):
  jax.config.update("jax_enable_compilation_cache", folder is not None)
  jax.config.update("jax_compilation_cache_dir", folder)
  reset_cache()  # whether a cache is in use is otherwise settled by the first compilation of the process


@contextlib.contextmanager
def shared_steps():
  """Runs of one process, model and data have the same jitted steps."""
  with pytest.MonkeyPatch.context() as patch:
    for name in ("make_train_step", "make_eval_step"):
      patch.setattr(training, name, _shared(getattr(training, name)))
    yield


def _shared(make):
  made = {}

  def step(config, *arguments):
    parts = config.model, config.data, config.optim, config.remat, config.unroll
    return made.setdefault(repr(parts), make(config, *arguments))

  return step


def on_step(monkeypatch, step, action):
  """Calls `action` once the metrics of `step` have been reported."""
  at(monkeypatch, reporting.Reporter.step, step, action)


def at(monkeypatch, method, step, action):
  """Calls `action` at the end of the method's call for `step`."""
  module = sys.modules[method.__module__]
  owner, name = method.__qualname__.split(".")

  def called(self, n, *args, **kwargs):
    result = method(self, n, *args, **kwargs)
    if n == step:
      action()
    return result

  monkeypatch.setattr(getattr(module, owner), name, called)


def terminate():
  signal.raise_signal(signal.SIGTERM)
