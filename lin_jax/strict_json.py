"""JSON that every parser reads. Numbers that are not finite have no form in JSON and become "nan", "inf" or "-inf"."""

import json
import math
from typing import Any

_WORDS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def dumps(value: Any, **options) -> str:
  """`json.dumps` of plain values."""
  return json.dumps(_worded(value), allow_nan=False, **options)


def loads(text: str) -> Any:
  """Inverse of `dumps`."""
  return _numbered(json.loads(text))


def _worded(value):
  if isinstance(value, float) and not math.isfinite(value):
    return str(float(value))
  return _each(_worded, value)


def _numbered(value):
  return _WORDS.get(value, value) if isinstance(value, str) else _each(_numbered, value)


def _each(function, value):
  if isinstance(value, dict):
    return {name: function(part) for name, part in value.items()}
  return [function(part) for part in value] if isinstance(value, (list, tuple)) else value
