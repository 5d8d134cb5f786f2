"""Compresses a dataset, or the beginning of its training split, to carry it to a machine without network."""

import concurrent.futures
import lzma
import os
import pathlib
import shutil

import numpy as np

from corpora import dataset
from corpora.progress import Progress
from corpora.unpack import SUFFIX
from lin_jax import files
from lin_jax.data import TokenDataset
from lin_jax.manifests import read_manifest, split_files
from lin_jax.tokenizer import MANIFEST_FILE, carried_files, load_tokenizer

# One bit of position and of literal position tell the compressor which of an id's two bytes it sees, and two bits which
# of four. Its number of literal bits, `lc`, must not exceed 4 - lp.
_POSITION_BITS = {"<u2": 1, "<u4": 2}


def pack(source: pathlib.Path, out: pathlib.Path, train_tokens: int = 0) -> bool:
  """Writes `out`, which `unpack` turns into a dataset, and returns whether there was anything to do.

  A positive `train_tokens` keeps the whole documents within that many first tokens of the training split. The other
  splits stay whole. Raises ValueError when `source` is not a dataset, or `out` holds something else.
  """
  manifest = read_manifest(source)
  recipe = manifest["recipe"] | dict(train_tokens=train_tokens)
  work = dataset.begin(out, recipe)
  if work is None:
    return False
  entries = {split: entry for split, entry in manifest["splits"].items() if entry["tokens"]}
  if train_tokens:
    entries["train"] = _cut(source, work, train_tokens, manifest["dtype"])
  jobs = []
  for split, entry in entries.items():
    folder = work if split == "train" and train_tokens else source
    for part in split_files(entry):
      files.require_sha256(folder / part["file"], part["sha256"])
      jobs.append((folder / part["file"], work / (part["file"] + SUFFIX)))
  bits = _POSITION_BITS[manifest["dtype"]]
  jobs.sort(key=lambda job: -job[0].stat().st_size)
  progress = Progress("compress: files", len(jobs))
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    try:
      for done, _ in enumerate(pool.map(lambda job: _compress(*job, bits), jobs), 1):
        progress.update(done)
    except BaseException:
      pool.shutdown(wait=False, cancel_futures=True)  # cancels waiting work; work that was begun ends
      raise
  progress.close(len(jobs))
  for name, sha256 in carried_files(manifest["tokenizer"]).items():
    files.require_sha256(source / name, sha256)
    shutil.copyfile(source / name, work / name)
  for path, _ in jobs:
    if path.parent == work:
      path.unlink()
  files.write_json(work / MANIFEST_FILE, manifest | dict(splits=entries, recipe=recipe), indent=1)
  dataset.publish(work, out)
  return True


def _cut(source, work, limit, dtype):
  data = TokenDataset(source, "train")
  ends = np.append(data.document_starts[1:], data.tokens).astype(np.int64)
  count = int(np.searchsorted(ends, limit, "right"))
  if not count:
    raise ValueError(f"--tokens={limit}: the first document of {source} has {ends[0]}: give at least as many")
  tokenizer = load_tokenizer(source)
  sizes = dataset.token_sizes(tokenizer)
  writer = dataset.SplitWriter(work, "train", dataset.SHARD_TOKENS, dtype=dtype, masked=data.masked)
  for start, end in zip(data.document_starts[:count].tolist(), ends[:count].tolist(), strict=True):
    ids = data.read(start, end)
    mask = data.read_mask(start, end) if data.masked else np.zeros(len(ids), bool)
    writer.add(ids, int(sizes[ids].sum()) - len(tokenizer.prefix), mask, int(sizes[ids[mask]].sum()))
  return writer.finish()


def _compress(source, target, bits):
  if not target.exists():
    filters = [dict(id=lzma.FILTER_LZMA2, preset=9, dict_size=2**26, lc=min(3, 4 - bits), lp=bits, pb=bits)]
    with open(source, "rb") as plain, files.replacing(target) as file:
      with lzma.open(file, "wb", filters=filters) as compressed:
        shutil.copyfileobj(plain, compressed, 1 << 20)
