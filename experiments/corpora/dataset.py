"""Writes a dataset directory in the format that `lin_jax.data` reads.

Everything is written into `<out>.partial`, which becomes `<out>` by one rename after its manifest is complete. The
writer's progress is recorded there too, so that an interrupted run continues from its last checkpoint.
"""

import json
import os
import pathlib
import shutil

import numpy as np

from corpora.unpack import SUFFIX
from lin_jax.files import sha256, write_json
from lin_jax.manifests import FORMAT, MASKED_VERSION, VERSION, split_files
from lin_jax.tokenizer import MANIFEST_FILE, Tokenizer, carried_files, describe_tokenizer

SHARD_TOKENS = 2**25
_RECIPE = "recipe.json"
_PROGRESS = "progress.json"


def begin(out: pathlib.Path, recipe: dict) -> pathlib.Path | None:
  """Returns the work directory `<out>.partial` of the dataset that `recipe` determines, None if `out` is complete.

  Raises ValueError when `out` or the work directory holds anything else, because nothing may be overwritten.
  """
  recipe = json.loads(json.dumps(recipe))
  if out.exists():
    if _read_json(out / MANIFEST_FILE).get("recipe") != recipe:
      raise ValueError(f"{out}: exists and was made from other inputs or options; choose another --out or delete it")
    return None
  work = out.with_name(out.name + ".partial")
  work.mkdir(parents=True, exist_ok=True)
  if _read_json(work / MANIFEST_FILE).get("recipe") == recipe:
    publish(work, out)
    return None
  if any(work.iterdir()) and _read_json(work / _RECIPE) != recipe:
    raise ValueError(f"{work}: was begun from other inputs or options; choose another --out or delete it")
  write_json(work / _RECIPE, recipe, indent=1)
  return work


def publish(work: pathlib.Path, out: pathlib.Path) -> None:
  """Renames `work` to `out`, without the files that its manifest does not name."""
  manifest = _read_json(work / MANIFEST_FILE)
  keep = {MANIFEST_FILE, *carried_files(manifest["tokenizer"])}
  keep |= {part["file"] for entry in manifest["splits"].values() for part in split_files(entry)}
  for path in work.iterdir():
    if path.name.removesuffix(SUFFIX) not in keep:
      shutil.rmtree(path) if path.is_dir() else path.unlink()
  os.rename(work, out)


def token_sizes(tokenizer: Tokenizer) -> np.ndarray:
  """Returns the number of bytes that each id of a tokenizer spells."""
  return np.array([len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)])


def _read_json(path):
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError):
    return {}
  return value if isinstance(value, dict) else {}


class SplitWriter:
  """Appends documents to the shards of one split. With its `state` and the files it can continue.

  Ids are stored as `dtype`, one of `lin_jax.manifests.DTYPES`. If `masked`, every shard has a mask beside it.
  """

  def __init__(self, work: pathlib.Path, split: str, shard_tokens: int, state: dict | None = None, *,
               dtype: str = "<u2", masked: bool = False):
    self._work, self._split, self._shard_tokens = work, split, shard_tokens
    self._columns = {"bin": dtype} | ({"mask": "u1"} if masked else {})
    self.state = state or dict(tokens=0, documents=0, bytes=0, max_ids=[]) | (
        dict(answers=dict(tokens=0, bytes=0)) if masked else {})
    self._files = {}
    self._starts = open(self._path("starts"), "r+b" if state else "w+b")
    self._starts.truncate(8 * self.state["documents"])
    self._starts.seek(0, os.SEEK_END)
    if used := self.state["tokens"] % shard_tokens:
      self._open_shard("r+b")
      for name, file in self._files.items():
        file.truncate(used * np.dtype(self._columns[name]).itemsize)
        file.seek(0, os.SEEK_END)

  def _path(self, suffix):
    return self._work / f"{self._split}.{suffix}"

  def _shard(self, number, column):
    return self._work / f"{self._split}-{number:05d}.{column}"

  def _open_shard(self, mode):
    self._close_shard()
    number = self.state["tokens"] // self._shard_tokens
    self._files = {column: open(self._shard(number, column), mode) for column in self._columns}

  def add(self, ids: np.ndarray, size: int, mask: np.ndarray | None = None, answer_size: int = 0) -> None:
    """Appends one document of `ids` (end id included), whose text has `size` bytes.

    In a masked split `mask` says which ids belong to answers, and these ids spell `answer_size` bytes.
    """
    state, columns = self.state, {"bin": ids, "mask": mask}
    self._starts.write(np.uint64(state["tokens"]).tobytes())
    state["documents"] += 1
    state["bytes"] += size
    if "mask" in self._columns:
      state["answers"]["tokens"] += int(np.count_nonzero(mask))
      state["answers"]["bytes"] += answer_size
    start = 0
    while start < len(ids):
      number, used = divmod(state["tokens"], self._shard_tokens)
      if not used:
        self._open_shard("wb")
        state["max_ids"].append(0)
      part = slice(start, min(len(ids), start + self._shard_tokens - used))
      for column, file in self._files.items():
        file.write(columns[column][part].astype(self._columns[column]).tobytes())
      state["max_ids"][number] = max(state["max_ids"][number], int(ids[part].max()))
      state["tokens"] += part.stop - start
      start = part.stop

  def _close_shard(self):
    for file in self._files.values():
      file.close()
    self._files = {}

  def close(self) -> None:
    """Closes the files."""
    self._close_shard()
    self._starts.close()

  def flush(self) -> dict:
    """Brings the files up to `state` on disk, and returns it."""
    for file in (self._starts, *self._files.values()):
      file.flush()
      os.fsync(file.fileno())
    return self.state

  def finish(self) -> dict:
    """Closes the files, writes the index, and returns the split's manifest entry."""
    self.flush()
    self.close()
    index = self._path("idx.npy")
    np.save(index, np.fromfile(self._path("starts"), np.uint64))
    state, shards = self.state, []
    for number, max_id in enumerate(state["max_ids"]):
      tokens = min(self._shard_tokens, state["tokens"] - number * self._shard_tokens)
      entries = {column: _described(self._shard(number, column)) for column in self._columns}
      shards.append(dict(file=entries["bin"]["file"], tokens=tokens, max_id=max_id, sha256=entries["bin"]["sha256"]) |
                    ({"mask": entries["mask"]} if "mask" in entries else {}))
    answers = {"answers": state["answers"]} if "answers" in state else {}
    return dict(documents=state["documents"], tokens=state["tokens"], bytes=state["bytes"], **answers,
                index=_described(index), shards=shards)


def _described(file):
  return dict(file=file.name, sha256=sha256(file))


class DatasetWriter:
  """The writers of all splits of one work directory, with a common checkpoint. As a context it closes the files.

  `done` counts the input documents on disk, which a resumed run has to skip. `notes` is the caller's own JSON state.
  `dtype` and `masked` are as in `SplitWriter`.
  """

  def __init__(self, work: pathlib.Path, splits: list[str], *, shard_tokens: int = SHARD_TOKENS, dtype: str = "<u2",
               masked: bool = False):
    self._work, self._dtype, self._masked = work, dtype, masked
    progress = _read_json(work / _PROGRESS)
    self.done, self.notes = progress.get("done", 0), progress.get("notes", {})
    states = progress.get("splits", {})
    self._writers = {split: SplitWriter(work, split, shard_tokens, states.get(split), dtype=dtype, masked=masked)
                     for split in splits}

  def __enter__(self):
    return self

  def __exit__(self, *_):
    for writer in self._writers.values():
      writer.close()

  def add(self, split: str, *document) -> None:
    """Appends a document to `split`, given as in `SplitWriter.add`."""
    self._writers[split].add(*document)

  def checkpoint(self, done: int, notes: dict) -> None:
    """Records that the first `done` input documents are on disk."""
    states = {split: writer.flush() for split, writer in self._writers.items()}
    self.done, self.notes = done, notes
    write_json(self._work / _PROGRESS, dict(done=done, notes=notes, splits=states), indent=1)

  def totals(self) -> dict[str, int]:
    """Returns the present number of tokens of each split."""
    return {split: writer.state["tokens"] for split, writer in self._writers.items()}

  def finish(self, out: pathlib.Path, *, tokenizer: Tokenizer, recipe: dict, manifest: dict) -> dict:
    """Completes the dataset, moves it to `out`, and returns the manifest. `manifest` adds entries to it."""
    splits = {split: writer.finish() for split, writer in self._writers.items()}
    described = dict(name=tokenizer.name, vocab_size=tokenizer.vocab_size, eos_id=tokenizer.eos_id)
    described |= describe_tokenizer(tokenizer)
    for name, content in tokenizer.files().items():
      (self._work / name).write_bytes(content)
    manifest = dict(format=FORMAT, version=MASKED_VERSION if self._masked else VERSION, dtype=self._dtype,
                    tokenizer=described, **manifest, splits=splits, recipe=recipe)
    write_json(self._work / MANIFEST_FILE, manifest, indent=1)
    publish(self._work, out)
    return manifest
