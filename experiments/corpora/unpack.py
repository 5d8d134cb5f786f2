"""Turns a directory made by `pack` back into a dataset. It needs no package beside this repository."""

import hashlib
import json
import lzma
import os
import pathlib
import shutil

from lin_jax.manifests import split_files

SUFFIX = ".xz"
_MANIFEST = "manifest.json"


def unpack(packed: pathlib.Path, out: pathlib.Path) -> bool:
  """Writes the dataset `out`, checks it against its manifest, and returns whether there was anything to do.

  Raises ValueError when `packed` is not such a directory or is damaged, or `out` is another dataset.
  """
  try:
    content = (packed / _MANIFEST).read_bytes()
    splits = json.loads(content)["splits"]
  except (OSError, ValueError, KeyError) as e:
    raise ValueError(f"{packed}: not a directory made by --pack ({e})") from e
  if out.exists():
    if not (out / _MANIFEST).exists() or (out / _MANIFEST).read_bytes() != content:
      raise ValueError(f"{out}: exists and is not the dataset of {packed}; choose another --out or delete it")
    return False
  # This is not the name that preparing uses, because an interrupted preparation must not be deleted.
  work = out.with_name(out.name + ".unpacking")
  shutil.rmtree(work, ignore_errors=True)
  work.mkdir(parents=True)
  parts = [part for entry in splits.values() for part in split_files(entry)]
  try:
    for part in parts:
      _decompress(packed / (part["file"] + SUFFIX), work / part["file"], part["sha256"])
  except ValueError:
    shutil.rmtree(work)
    raise
  for file in packed.iterdir():
    if file.suffix != SUFFIX:
      shutil.copyfile(file, work / file.name)
  os.rename(work, out)
  return True


def _decompress(source, target, checksum):
  try:
    with lzma.open(source) as compressed, open(target, "wb") as plain:
      shutil.copyfileobj(compressed, plain, 1 << 20)
  except (OSError, EOFError, lzma.LZMAError) as e:
    raise ValueError(f"{source}: damaged or missing ({e})") from e
  with open(target, "rb") as f:
    found = hashlib.file_digest(f, "sha256").hexdigest()
  if found != checksum:
    raise ValueError(f"{source}: unpacks to SHA-256 {found}: the manifest says {checksum}")
