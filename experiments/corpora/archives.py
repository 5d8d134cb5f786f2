"""Reads the files inside downloaded packages, without unpacking them to disk."""

import gzip
import hashlib
import io
import pathlib
import re
import subprocess
import tarfile
import zipfile
from collections.abc import Iterator

from corpora.dataset import sha256

_PACKAGES = (".deb", ".whl", ".zip", ".tgz", ".tar.gz")
_APT_HELPER = "/usr/lib/apt/apt-helper"


def members(path: pathlib.Path, include: str = "", exclude: str = "") -> Iterator[tuple[str, bytes]]:
  """Yields (name, content) of the files whose name matches `include` and not `exclude`, in the archive's order.

  It reads .deb, .whl, .zip and compressed tar files, and unpacks members that are gzip files themselves. Any other file
  counts as an index of apt, and is its own single member. Raises ValueError for an archive that cannot be read.
  """
  try:
    for name, read in _archive(path):
      if re.search(include, name) and not (exclude and re.search(exclude, name)):
        content = read()
        yield name, gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
  except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError) as e:
    raise ValueError(f"{path}: not a readable package ({e})") from e


def checksum(path: pathlib.Path) -> str:
  """Returns the SHA-256 of a package file, or of an apt index's content, whose compression differs by machine."""
  if path.name.endswith(_PACKAGES):
    return sha256(path)
  (_, content), = members(path)
  return hashlib.sha256(content).hexdigest()


def _archive(path):
  if path.suffix == ".deb":
    yield from _tar(io.BytesIO(_deb_data(path)))
  elif path.suffix in (".whl", ".zip"):
    with zipfile.ZipFile(path) as archive:
      for name in archive.namelist():
        yield name, lambda name=name: archive.read(name)
  elif path.name.endswith(_PACKAGES):
    with open(path, "rb") as f:
      yield from _tar(f)
  else:
    # Apt chooses the compression of an index, and its own command unpacks it.
    done = subprocess.run([_APT_HELPER, "cat-file", str(path)], capture_output=True, check=False)
    if done.returncode:
      raise ValueError(f"{path}: {_APT_HELPER} could not read it")
    yield path.name, lambda: done.stdout


def _tar(file):
  with tarfile.open(fileobj=file) as tar:
    for member in tar:
      if member.isfile():
        yield member.name.removeprefix("./"), lambda member=member: tar.extractfile(member).read()


def _deb_data(path):
  # A Debian package is an ar archive with 60-byte headers and contents of even length. The files are in data.tar.*.
  with open(path, "rb") as f:
    if f.read(8) != b"!<arch>\n":
      raise ValueError(f"{path}: not a Debian package")
    while header := f.read(60):
      size = int(header[48:58])
      content = f.read(size + size % 2)[:size]
      if header.startswith(b"data.tar"):
        return content
  raise ValueError(f"{path}: a Debian package without data")
