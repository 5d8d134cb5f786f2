"""A corpus of about 130 million tokens of source code from Debian packages: C, Go, Rust and Python.

A document is a file. The texts stay with their publishers. Licences are the packages' own, and the most common ones are
the GPL for Linux, BSD for Go and most of Python, MIT and Apache for Rust.
"""

import functools
import hashlib
import io
import itertools
import pathlib
import re
import tarfile
from collections.abc import Iterator

from corpora import apt, archives
from corpora.dataset import sha256
from corpora.documents import Document

# For each package, the files to read by their names. Linux's drivers are far too many, so only two families are read.
PACKAGES = {
    "linux-source-6.1": r"^[^/]+/(block|crypto|drivers/(scsi|usb)|fs|ipc|kernel|lib|mm|net|security|virt)/.*\.[ch]$",
    "golang-1.19-src": r"\.go$", "rust-src": r"\.rs$",
    **dict.fromkeys((f"python3-{name}" for name in ("django", "matplotlib", "networkx", "pandas", "scipy", "sklearn",
                                                    "sqlalchemy", "sympy", "twisted")), r"\.py$")}
_SIZES = 200, 200_000  # bytes of a file: shorter ones say little, and longer ones are mostly tables
RULES = dict(files=PACKAGES, sizes=_SIZES)
HELD_OUT = 0.004  # share of the documents that is val, and as large a share that is test


def sources(cache: pathlib.Path) -> list[dict]:
  """Fetches the packages by apt into `cache`, and returns what determines the corpus: versions and checksums.

  Raises ValueError when a package cannot be had.
  """
  found = apt.packages(list(PACKAGES), cache)
  if missing := [name for name in PACKAGES if name not in found]:
    raise ValueError(f"deb:{missing[0]}: not in this machine's apt sources")
  return [dict(client="deb", package=name, version=apt.version(file), sha256=sha256(file))
          for name, file in found.items()]


def documents(cache: pathlib.Path, skip: int = 0) -> Iterator[Document]:
  """Yields the files that `PACKAGES` names, package by package and without repetitions, after the first `skip`."""
  return itertools.islice(_documents(cache), skip, None)


def _documents(cache):
  seen = set()
  for package, path in apt.packages(list(PACKAGES), cache).items():
    members = _inner if package.startswith("linux") else functools.partial(archives.members, include=PACKAGES[package])
    for name, content in members(path):
      digest = hashlib.blake2b(content, digest_size=16).digest()
      if digest in seen or not _SIZES[0] <= len(content) <= _SIZES[1]:
        continue
      seen.add(digest)
      try:
        yield Document(package, name, content.decode())
      except UnicodeDecodeError:  # a few files are in older encodings
        continue


def _inner(path):
  """The files of the archive that is the only large file in Linux's package."""
  (_, content), = archives.members(path, r"\.tar\.xz$")
  with tarfile.open(fileobj=io.BytesIO(content)) as tar:
    for member in tar:
      if member.isfile() and re.search(PACKAGES["linux-source-6.1"], member.name):
        yield member.name, tar.extractfile(member).read()
