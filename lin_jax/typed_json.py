"""JSON files of one object, and dataclasses built from them. Every fault is one ValueError that names file and key."""

import dataclasses
import json
import math
import pathlib
import sys
from collections.abc import Callable
from typing import Any

LARGEST = 2**32 - 1  # of whole numbers, of which seeds are the largest
_ARTICLES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text",
             tuple[int, ...]: "a list of whole numbers"}


def read_object(path: pathlib.Path, kind: str, convert: Callable[[dict], Any] = lambda value: value) -> dict:
  """The object that a UTF-8 JSON file holds, with `convert` applied to each object in it, inner objects first.

  Raises ValueError, "not <kind>", if the file is not readable, is not JSON, has a key twice or holds no object.
  """

  def unique(pairs):
    value = dict(pairs)
    if len(value) != len(pairs):
      keys = [key for key, _ in pairs]
      raise ValueError(f"key {shown(next(key for key in keys if keys.count(key) > 1))} is there twice")
    return convert(value)

  try:
    value = json.loads(path.read_bytes().decode("utf-8-sig"), object_pairs_hook=unique)
    if not isinstance(value, dict):
      raise ValueError(f"it holds {shown(value)}, not an object")
  except (OSError, ValueError, RecursionError) as e:
    raise ValueError(f"{path}: not {kind} ({e})") from e
  return value


def build(cls: type, values: Any, where: str) -> Any:
  """The dataclass `cls` with the fields `values`, of the types that it declares. Missing fields have their defaults.

  Raises ValueError, naming the field after `where`, for an unknown field or a value of another type.
  """
  if not isinstance(values, dict):
    raise ValueError(f"{where}={shown(values)}: must be an object")
  types = {field.name: field.type for field in dataclasses.fields(cls)}
  for name in values:
    if name not in types:
      raise ValueError(f"{where}: this version of lin_jax has no field {shown(name)} there, but {', '.join(types)}")
  made = {}
  for name, value in values.items():
    if dataclasses.is_dataclass(types[name]):
      value = build(types[name], value, f"{where}.{name}")
    elif types[name] == tuple[int, ...] and isinstance(value, list):
      value = tuple(value)
    made[name] = value
  config = cls(**made)
  require_types(config, where)
  return config


def require_types(config: Any, where: str) -> None:
  """Raises ValueError unless every field of the dataclass `config` has the type that it declares.

  Fields may hold anything if their type is not a number, a boolean, a text, a tuple of numbers or a dataclass. Numbers
  must be finite, except in fields with "infinite" among their metadata.
  """
  for field in dataclasses.fields(config):
    value, name = getattr(config, field.name), f"{where}.{field.name}"
    if dataclasses.is_dataclass(value):
      require_types(value, name)
    elif dataclasses.is_dataclass(field.type) or field.type in _ARTICLES:
      require_type(value, field.type, name, infinite=field.metadata.get("infinite", False))


def require_type(value: Any, kind: Any, name: str, optional: bool = False, infinite: bool = False) -> None:
  """Raises ValueError beginning with `name` unless `value` is of the type `kind`, and finite if not `infinite`."""
  fits = {
      int: lambda: type(value) is int,
      float: lambda: isinstance(value, int | float) and not isinstance(value, bool),
      bool: lambda: isinstance(value, bool),
      str: lambda: isinstance(value, str),
      tuple[int, ...]: lambda: isinstance(value, tuple | list) and all(type(part) is int for part in value),
  }.get(kind, lambda: False)()
  if value is None and optional:
    return
  if not fits:
    raise ValueError(f"{name}={shown(value)}: must be {_ARTICLES.get(kind, 'an object')}")
  if kind is float and not abs(value) <= (math.inf if infinite else sys.float_info.max):
    raise ValueError(f"{name}={shown(value)}: must be finite")
  if kind is int and abs(value) > LARGEST:
    raise ValueError(f"{name}={shown(value)}: must lie within {LARGEST:,}")


def shown(value: Any) -> str:
  """`value` as a text for a message, cut short if it is long."""
  text = repr(value)
  return text if len(text) <= 80 else text[:77] + "..."
