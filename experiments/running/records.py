"""JSON lines of runs, which say which runs are done and in which environment they were made."""

import datetime
import json
import pathlib
import re
import sys

from lin_jax import files, metrics, strict_json
from lin_jax.workdir import environment


def load(path: pathlib.Path, *fields: str) -> list[dict]:
  """Reads the records of --out, which is made if it is missing. A last line that a kill cut short is removed.

  Raises ValueError when the file cannot be written, or holds records without one of `fields`.
  """
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    records = metrics.read(path)
    if path.exists() and not path.read_text(encoding="utf-8").endswith("\n"):
      files.write(path, "".join(strict_json.dumps(record) + "\n" for record in records))
    path.touch()
  except (FileExistsError, NotADirectoryError) as e:
    raise ValueError(f"--out={path}: cannot be written: {path.parent} is not a folder") from e
  except OSError as e:
    raise ValueError(f"--out={path}: cannot be written: {e.strerror}") from e
  except files.Unwritable:
    raise
  except (ValueError, TypeError) as e:
    raise ValueError(f"--out={e}") from e
  for number, record in enumerate(records, start=1):
    if missing := [field for field in fields if field not in record]:
      raise ValueError(f"--out={path}: line {number} is not a record of this command: it has no {missing[0]!r}")
  return records


def append(path: pathlib.Path, record: dict) -> None:
  """Appends one line."""
  files.append(path, strict_json.dumps(record) + "\n")


def key(setting: dict) -> str:
  """Returns a text that is equal for equal settings, whether they were read from a file or not."""
  return json.dumps(setting, sort_keys=True)


def now() -> str:
  """Returns the present time, for a record."""
  return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def provenance() -> dict:
  """Returns device, versions, git commit and command of this process."""
  found = environment()
  versions = {name: found[name] for name in ("python", "jax", "jaxlib", "flax", "optax", "numpy")}
  return {"device": found["device_kind"], "versions": versions, "git_commit": found["git_commit"],
          "command": command()}


def command() -> str:
  """Returns this process's command line. Of absolute paths it keeps the name, because folders of a machine say nothing
  elsewhere."""
  return " ".join(["python", *(re.sub(r"(^|=|,)/(?:[^/,=]*/)+", r"\1", word) for word in sys.argv)])
