"""Synthetic tasks by name: `TASKS["mqar"](sequence_length=256, pairs=16).draw(rng, count)`.

A task is a frozen dataclass that derives from `batch.Task` in any module of this folder; its name is the class's in
snake case.
"""

import dataclasses
import importlib
import pkgutil
import re

from .batch import Batch, Task

__all__ = ["Batch", "TASKS", "Task"]


def _discover():
  tasks = {}
  for module in pkgutil.iter_modules(__path__):
    if module.name == "batch":
      continue
    for value in vars(importlib.import_module(f"{__name__}.{module.name}")).values():
      if isinstance(value, type) and issubclass(value, Task) and dataclasses.is_dataclass(value):
        tasks[re.sub(r"(?<=[a-z])(?=[A-Z])", "_", value.__name__).lower()] = value
  return tasks


TASKS = _discover()
