"""Synthetic tasks by name: `TASKS["mqar"](sequence_length=512, pairs=64).draw(rng, count)` is a `Batch`.

A task is a frozen dataclass in a module of this folder. Its fields are its setting, whose rules its constructor checks
(ValueError); fields or properties say `vocab_size` and `sequence_length`. It may have besides:
  training          a field: True draws examples to train on, where they differ from those that the test scores
  train_examples    a field: how many different examples the protocol trains on
  decodes_last      a class attribute: the model answers every position from its last output, through a decoder
"""

import dataclasses
import importlib
import pkgutil
import re

from .batch import Batch

__all__ = ["Batch", "TASKS"]

_OTHERS = "batch", "runs", "sweeps", "training"  # modules without tasks


def _discover():
  tasks = {}
  for module in pkgutil.iter_modules(__path__):
    if module.name not in _OTHERS:
      full = f"{__name__}.{module.name}"
      for value in vars(importlib.import_module(full)).values():
        if dataclasses.is_dataclass(value) and hasattr(value, "draw") and value.__module__ == full:
          tasks[re.sub(r"(?<=[a-z])(?=[A-Z])", "_", value.__name__).lower()] = value
  return tasks


TASKS = _discover()
