"""Joins datasets of one tokenizer, such as English and source code, and keeps the held-out texts apart as well."""

import pathlib
import shutil

import numpy as np

from corpora import dataset
from lin_jax import files
from lin_jax.data import TokenDataset
from lin_jax.manifests import read_manifest
from lin_jax.tokenizer import MANIFEST_FILE, carried_files

SPLITS = "train", "val", "test"


def join(sources: list[pathlib.Path], out: pathlib.Path) -> bool:
  """Writes `out`, whose train, val and test are the sources' one after the other, and returns whether there was
  anything to do.

  Training shuffles windows over the whole split, so the order does not matter to it. `val_NAME` and `test_NAME` are a
  source's own, by the name of its folder. Further splits, such as recall and long, are those of the sources that have
  them. Only the parts of a source's val and test, such as val_prose, are left out. Raises ValueError for fewer than two
  sources, equal names, and sources of different tokenizers or with masks of answers.
  """
  manifests = {source.name: read_manifest(source) for source in sources}
  if len(manifests) < 2 or len(manifests) < len(sources):
    raise ValueError(f"--join={','.join(map(str, sources))}: must name two or more datasets with different names")
  first = manifests[sources[0].name]
  for name, manifest in manifests.items():
    if any(manifest[key] != first[key] for key in ("tokenizer", "dtype")):
      raise ValueError(f"--join={name}: must have the tokenizer of {sources[0].name}")
  further = _further(manifests.values())
  recipe = dict(joined={name: manifest["recipe"] for name, manifest in manifests.items()}, further=further)
  work = dataset.begin(out, recipe)
  if work is None:
    return False
  splits = {split: [(source, split) for source in sources] for split in SPLITS}
  splits |= {f"{split}_{source.name}": [(source, split)] for split in SPLITS[1:] for source in sources}
  splits |= {split: [(source, split) for source in sources if split in manifests[source.name]["splits"]]
             for split in further}
  entries = {split: _joined(split, parts, work) for split, parts in splits.items()}
  for name, sha256 in carried_files(first["tokenizer"]).items():
    files.require_sha256(sources[0] / name, sha256)
    shutil.copyfile(sources[0] / name, work / name)
  described = [part for manifest in manifests.values() for part in manifest.get("sources", [])]
  files.write_json(work / MANIFEST_FILE, first | dict(splits=entries, recipe=recipe, sources=described), indent=1)
  dataset.publish(work, out)
  return True


def _further(manifests):
  names = {split for manifest in manifests for split in manifest["splits"]}
  return sorted(split for split in names - {*SPLITS} if not split.startswith(("val_", "test_")))


def _joined(split, parts, work):
  """The manifest's entry of a split that is made of whole splits (folder, name)."""
  shards, starts, total = [], [], dict(tokens=0, documents=0, bytes=0)
  for source, name in parts:
    data = TokenDataset(source, name)
    if data.masked:
      raise ValueError(f"--join={source}: has a mask of answers, which a joined dataset cannot keep")
    starts.append(data.document_starts + np.uint64(total["tokens"]))
    for shard in read_manifest(source)["splits"][name]["shards"]:
      file = f"{split}-{len(shards):05d}.bin"
      files.require_sha256(source / shard["file"], shard["sha256"])
      shutil.copyfile(source / shard["file"], work / file)
      shards.append(shard | dict(file=file))
    for key in total:
      total[key] += getattr(data, key)
  index = work / f"{split}.idx.npy"
  np.save(index, np.concatenate(starts))
  return total | dict(shards=shards, index=dict(file=index.name, sha256=files.sha256(index)))
