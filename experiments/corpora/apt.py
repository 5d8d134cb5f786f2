"""Downloads Debian packages as files by apt. It has its own package lists, and leaves the machine's apt state alone."""

import pathlib
import urllib.parse

from corpora import fetch


def packages(names: list[str], cache: pathlib.Path) -> dict[str, pathlib.Path]:
  """Returns the .deb files of the `names` that this machine's apt sources have. A cached file is used again."""
  folder = cache / "apt" / "packages"
  folder.mkdir(parents=True, exist_ok=True)
  missing = [name for name in names if not _find(folder, name)]
  if missing:
    update(cache)
    try:
      _apt(cache, "download", *missing, folder=folder)
    except ValueError:
      # One unknown name makes the whole call fail.
      for name in missing:
        try:
          _apt(cache, "download", name, folder=folder)
        except ValueError:
          continue
  return {name: file for name in names if (file := _find(folder, name))}


def version(file: pathlib.Path) -> str:
  """Returns the version that a .deb file's name states."""
  return urllib.parse.unquote(file.name.split("_")[1])


def index(name: str, cache: pathlib.Path) -> pathlib.Path:
  """Returns the largest package list called `name`, which is the main archive's. Raises ValueError if there is none."""
  lists = cache / "apt" / "lists"
  if not list(lists.glob(f"*_{name}*")):
    update(cache)
  found = sorted(lists.glob(f"*_{name}*"), key=lambda path: path.stat().st_size)
  if not found:
    raise ValueError(f"{name}: apt has no such list")
  return found[-1]


def update(cache: pathlib.Path) -> None:
  """Brings the cache's package lists up to date."""
  for name in ("lists/partial", "state/archives/partial"):
    (cache / "apt" / name).mkdir(parents=True, exist_ok=True)
  _apt(cache, "update")


def _apt(cache, *arguments, folder=None):
  root = (cache / "apt").resolve()
  fetch.run(["apt-get", "-q", "-o", f"Dir::State::Lists={root / 'lists'}", "-o", f"Dir::Cache={root / 'state'}",
             "-o", "Acquire::Languages=en", *arguments], folder)


def _find(folder, name):
  return next(iter(sorted(folder.glob(f"{name}_*.deb"))), None)
