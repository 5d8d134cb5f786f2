"""JSON files with damage: what was edited by hand, cut off, or written by something else."""

import copy
import json
import random

VALUES = (None, True, False, 0, 1, -1, 3, 10**9, 10**30, 0.5, -0.5, 1e9, 1e-300, float("nan"), float("inf"), "", "12",
          "flash", [], [1], [[1]], {}, {"type": "gla"}, {"__float__": []})


def objects(value):
  """Every object inside a JSON value, itself included."""
  parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
  return [value] * isinstance(value, dict) + [inner for part in parts for inner in objects(part)]


def damaged(value: dict, source: random.Random) -> bytes:
  """The text of the object `value` with one damage, drawn from `source`."""
  value = copy.deepcopy(value)
  where = source.choice(objects(value))
  key = source.choice([*where, "new\nkey"])
  kind = source.randrange(6)
  if kind == 0:
    where.pop(key, None)
  elif kind < 4:
    where[key] = source.choice(VALUES)
  text = json.dumps(value, indent=source.choice([None, 2])).encode()
  at = source.randrange(len(text))
  if kind == 4:
    return text[:at]
  if kind == 5:
    added = source.choice([b"\x00", b"\xff", b"{", b"[" * 100_000, b'"', b",", b"1", b"NaN", b"}"])
    return text[:at] + added + text[at:]
  return text


def outcomes(path, texts, load, named=None) -> int:
  """Writes each text to `path` and loads it: how many were refused.

  The message must be one line that begins with the path `named`, by default `path`; no other error may come.
  """
  refused = 0
  for text in texts:
    path.write_bytes(text)
    try:
      load()
    except ValueError as e:
      assert str(e).startswith(str(named or path)) and "\n" not in str(e) and len(str(e)) < 1000, e
      refused += 1
  return refused
