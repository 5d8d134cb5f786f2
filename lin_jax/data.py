"""Reading prepared token shards as fixed windows, for training (Grain, shuffled, resumable) and for evaluation.

A dataset directory (written by `experiments/prepare_data.py`) holds for each split the documents' ids end to end as
little-endian shards `<split>-00000.bin`, where the tokenizer's end id closes each document, and the uint64 document
starts `<split>.idx.npy`. Ids are uint16, or uint32 for a vocabulary of more than 65,536. Where a model shall learn
answers only, `<split>-00000.mask` has one byte for each id of the shard: 1 if the id belongs to an answer, otherwise 0.
The directory also holds `manifest.json` with counts and checksums, and the tokenizer's file if there is one.

Window i of a split covers ids [i T, i T + T]. These are T + 1 ids, the last one shared with window i + 1, so every id
except the split's first is the target of exactly one window. A batch is a dict of arrays [B, T]:
  tokens, targets   int32; targets are the tokens one position later
  segment_ids       int32 >= 1, one value per document inside the window
  mask              float32; 0 where the target lies in another document than its token or outside of an answer, and
                    on padding
"""

import functools
import pathlib
import sys
import threading
from collections.abc import Sequence

import grain
import numpy as np

from lin_jax import files, manifests
from lin_jax.config import DataConfig
from lin_jax.tokenizer import MANIFEST_FILE, Tokenizer, load_tokenizer

Batch = dict[str, np.ndarray]


class TokenDataset:
  """One split of a dataset directory, read in parts as they are asked for.

  Sizes are compared with the manifest at once, the index's checksum when `document_starts` is first asked for, and a
  shard's checksum before its first id is read. That takes about 0.6 s per GB with a processor's SHA instructions, and
  each process does it for the shards that it reads.

  Attributes:
    tokens, documents, bytes: counts of the split; `bytes` is the UTF-8 size of its text.
    masked: whether the split has a mask of answers.
    bytes_per_token: turns a loss in nats per token into bits per byte: loss / (ln 2 * bytes_per_token). In a masked
      split the loss is one per token of an answer, and the bytes are the answers' too.
    vocab_size: the number of ids of the dataset's tokenizer.
    document_starts: uint64 [documents], the position of each document's first id.

  Raises ValueError for a missing directory, file or split, an empty split, a file whose size is not the manifest's, a
  foreign format, and ids that a model of `vocab_size` does not have. Reading raises it for a file that is not the one
  that the manifest describes.
  """

  def __init__(self, path: str | pathlib.Path, split: str, *, vocab_size: int | None = None):
    self.path, self.split = pathlib.Path(path), split
    manifest = manifests.read_manifest(path)
    try:
      self._load(manifest)
    except (KeyError, TypeError, AttributeError) as e:
      raise ValueError(f"{self.path / MANIFEST_FILE}: incomplete or malformed: {e!r}") from e
    if vocab_size is not None and self._max_id >= vocab_size:
      raise ValueError(f"{self.path}: split {split!r} holds token id {self._max_id}: ids must be less than the model's "
                       f"vocab_size={vocab_size}")

  def _load(self, manifest):
    splits = manifest["splits"]
    if self.split not in splits:
      raise ValueError(f"{self.path}: no split {self.split!r}: it has {', '.join(sorted(splits))}")
    entry = splits[self.split]
    self.tokens, self.documents, self.bytes = entry["tokens"], entry["documents"], entry["bytes"]
    self.vocab_size = manifest["tokenizer"]["vocab_size"]
    if not self.tokens or not self.documents:
      raise ValueError(f"{self.path}: split {self.split!r} is empty")
    self._max_id = max(shard["max_id"] for shard in entry["shards"])
    if self._max_id >= self.vocab_size:
      raise ValueError(f"{self.path}: split {self.split!r} holds token id {self._max_id}: ids must be less than its "
                       f"tokenizer's vocab_size={self.vocab_size}")
    dtype, answers = manifest["dtype"], entry.get("answers")
    self.masked = answers is not None
    self._learned = (answers["bytes"], answers["tokens"]) if self.masked else (self.bytes, self.tokens)
    if not self._learned[1]:
      raise ValueError(f"{self.path}: split {self.split!r} has no token of an answer")
    self._shards = [_Shard(self.path / shard["file"], shard["sha256"], dtype) for shard in entry["shards"]]
    masks = [shard["mask"] for shard in entry["shards"]] if self.masked else []
    self._masks = [_Shard(self.path / mask["file"], mask["sha256"], "u1") for mask in masks]
    sizes = [shard["tokens"] for shard in entry["shards"]]
    self._ends = np.cumsum(sizes)
    if self._ends[-1] != self.tokens:
      raise ValueError(f"{self.path}: the shards of split {self.split!r} hold {self._ends[-1]} tokens: the manifest "
                       f"says {self.tokens}")
    for shard, size in (*zip(self._shards, sizes), *zip(self._masks, sizes)):
      manifests.require_size(shard.file, size * shard.dtype.itemsize)
    self._index = self.path / entry["index"]["file"], entry["index"]["sha256"]

  @functools.cached_property
  def document_starts(self) -> np.ndarray:
    file, sha256 = self._index
    files.require_sha256(file, sha256)
    try:
      starts = np.load(file)
    except (OSError, ValueError, EOFError) as e:
      raise ValueError(f"{file}: not readable as a document index ({e})") from e
    if starts.dtype != np.uint64 or starts.shape != (self.documents,) or starts[0] or starts[-1] >= self.tokens:
      raise ValueError(f"{file}: {starts.dtype}{list(starts.shape)}: must hold the uint64 starts of {self.documents} "
                       f"documents, from 0 and below {self.tokens}")
    return starts

  @property
  def bytes_per_token(self) -> float:
    count, tokens = self._learned
    return count / tokens

  def tokenizer(self) -> Tokenizer:
    """The tokenizer that wrote the dataset."""
    return load_tokenizer(self.path)

  def read(self, start: int, stop: int) -> np.ndarray:
    """Ids [start, stop) as int32. Raises ValueError if they are not the ids that the manifest describes."""
    ids = self._read(self._shards, start, stop)
    if ids.max() > self._max_id:
      raise ValueError(f"{self.path}: split {self.split!r} holds token id {ids.max()} after position {start}: the "
                       f"manifest says that none exceeds {self._max_id}, so a shard was changed")
    return ids.astype(np.int32)

  def read_mask(self, start: int, stop: int) -> np.ndarray:
    """Whether each id of [start, stop) of a masked split belongs to an answer. Raises ValueError as `read` does."""
    return self._read(self._masks, start, stop) != 0

  def _read(self, shards, start, stop):
    pieces = []
    for i in range(np.searchsorted(self._ends, start, "right"), np.searchsorted(self._ends, stop, "left") + 1):
      first, end = int(self._ends[i - 1]) if i else 0, int(self._ends[i])
      pieces.append(shards[i].read(max(start, first) - first, min(stop, end) - first))
    return np.concatenate(pieces)

  def segments(self, start: int, stop: int) -> np.ndarray:
    """int32 [stop - start]: 1 in the document of position `start`, and one more in each document after it."""
    inner = slice(*np.searchsorted(self.document_starts, np.array([start + 1, stop], np.uint64)))
    steps = np.zeros(stop - start, np.int32)
    steps[self.document_starts[inner].astype(np.int64) - start] = 1
    return 1 + np.cumsum(steps, dtype=np.int32)


class _Shard:
  """A shard's ids or mask. The file is read, not mapped into memory, where one cut short would end the process."""

  def __init__(self, file: pathlib.Path, sha256: str, dtype: str):
    self.file, self.dtype, self._sha256 = file, np.dtype(dtype), sha256
    self._lock, self._checked = threading.Lock(), False

  def read(self, start: int, stop: int) -> np.ndarray:
    if not self._checked:
      with self._lock:  # of many threads, one reads the whole file
        files.require_sha256(self.file, self._sha256)
        self._checked = True
    try:
      ids = np.fromfile(self.file, self.dtype, stop - start, offset=start * self.dtype.itemsize)
    except OSError as e:
      raise ValueError(f"{self.file}: no longer readable ({e.strerror})") from e
    if len(ids) < stop - start:
      raise ValueError(f"{self.file}: ends before id {stop}: it was cut short after it was opened")
    return ids


class Windows(Sequence):
  """The split as a sequence of unbatched windows of `length` targets.

  The incomplete window at the end is left out, or with `pad` filled up with tokens that the mask hides.
  """

  def __init__(self, dataset: TokenDataset, length: int, *, reset_at_documents: bool = True, pad: bool = False):
    if dataset.tokens < length + 1:
      raise ValueError(f"config.data.sequence_length={length}: must be less than the {dataset.tokens} tokens of split "
                       f"{dataset.split!r} of {dataset.path}")
    self._dataset, self._length, self._reset = dataset, length, reset_at_documents
    if reset_at_documents:
      dataset.document_starts  # noqa: B018 -- a damaged index is found here, and not in the first batch
    targets = dataset.tokens - 1
    self._windows = -(-targets // length) if pad else targets // length

  def __len__(self) -> int:
    return self._windows

  def __getitem__(self, i: int) -> Batch:
    if not 0 <= i < self._windows:
      raise IndexError(i)
    start = i * self._length
    stop = min(start + self._length + 1, self._dataset.tokens)
    ids = self._dataset.read(start, stop)
    segments = self._dataset.segments(start, stop) if self._reset else np.ones(len(ids), np.int32)
    if missing := self._length + 1 - len(ids):
      # Padding is a segment of its own, and its first position is not a target of the text.
      ids = np.pad(ids, (0, missing))
      segments = np.pad(segments, (0, missing), constant_values=segments[-1] + 1)
    mask = segments[1:] == segments[:-1]
    if self._dataset.masked:
      mask[:stop - start - 1] &= self._dataset.read_mask(start + 1, stop)
    mask[stop - start - 1:] = False
    return dict(tokens=ids[:-1], targets=ids[1:], segment_ids=segments[:-1], mask=mask.astype(np.float32))

  def hidden(self) -> Batch:
    """A window of nothing but padding."""
    zeros = np.zeros(self._length, np.int32)
    return dict(tokens=zeros, targets=zeros, segment_ids=zeros + 1, mask=zeros.astype(np.float32))


def train_iterator(config: DataConfig, seed: int, *, split: str = "train", vocab_size: int | None = None,
                   process_index: int | None = None, process_count: int | None = None) -> grain.DatasetIterator:
  """An endless iterator of batches, reshuffled in every epoch, with Grain's `get_state()` and `set_state()`.

  Each process gets every `process_count`-th window of one global order, `config.batch_size / process_count` at a time.
  Together the processes form the same global batches whatever their number, which defaults to JAX's. With
  `config.carried_windows` = n, the unit of shuffling is a run of n consecutive windows, and each batch row reads one
  run over n successive batches, from its place of `staggered_starts` on. Raises ValueError as `TokenDataset` does, if
  the sequence or the run is longer than the split, if runs of several windows have a mask, and if the processes do not
  divide the batch.
  """
  index, count, rows = _processes(config, process_index, process_count)
  data, run = TokenDataset(config.path, split, vocab_size=vocab_size), config.carried_windows
  windows = Windows(data, config.sequence_length, reset_at_documents=config.reset_at_documents)
  if data.masked and run > 1:  # a row's last target tells by its mask whether the state is carried on
    raise ValueError(f"config.data.carried_windows={run}: must be 1 with {config.path}, which has a mask of answers")
  if len(windows) < run:
    raise ValueError(f"config.data.carried_windows={run}: split {split!r} of {config.path} has {len(windows)} windows "
                     f"of {config.sequence_length} tokens")
  dataset = grain.MapDataset.source(range(len(windows) // run)).seed(seed)
  dataset = (dataset.shuffle() if config.shuffle else dataset).repeat()
  if count > 1:
    dataset = dataset.slice(slice(index, None, count))
  if run > 1:
    dataset = grain.MapDataset.source(Neighbours(dataset, run, staggered_starts(config, rows)))
  dataset = dataset.map(windows.__getitem__)
  options = grain.ReadOptions(num_threads=config.worker_threads, prefetch_buffer_size=2 * config.worker_threads)
  return iter(dataset.batch(rows, drop_remainder=True).to_iter_dataset(options))  # rounding an endless length overflows


def staggered_starts(config: DataConfig, rows: int) -> np.ndarray:
  """The window of its first run with which each of a process's rows begins: 0, or spread if `config.staggered`."""
  return np.arange(rows) * config.carried_windows // rows * config.staggered


class Neighbours(Sequence):
  """Numbers of windows, batch after batch of a row for each of `starts`. At a start of 0, row r of batches 0 to n - 1
  is the r-th run of n neighbouring windows in the order `runs`, row r of the next n is run rows + r, and so on."""

  def __init__(self, runs: Sequence[int], windows: int, starts: np.ndarray):
    self._runs, self._windows, self._starts = runs, windows, starts.tolist()

  def __len__(self) -> int:
    return sys.maxsize

  def __getitem__(self, i: int) -> int:
    batch, row = divmod(i, len(self._starts))
    group, place = divmod(batch + self._starts[row], self._windows)
    return self._runs[group * len(self._starts) + row] * self._windows + place


class EvalBatches(Sequence):
  """Batches of a held-out split in order, each of full shape. The last ones are filled up with masked windows."""

  def __init__(self, windows: Windows, batches: int, rows: int, index: int, count: int):
    self._windows, self._rows, self._index, self._count = windows, rows, index, count
    everything = -(-len(windows) // (rows * count))
    self._batches = min(batches or everything, everything)

  def __len__(self) -> int:
    return self._batches

  def __getitem__(self, batch: int) -> Batch:
    if not 0 <= batch < self._batches:
      raise IndexError(batch)
    rows = self._rows * self._count
    chosen = range(batch * rows + self._index, (batch + 1) * rows, self._count)
    # Fewer batches than the split holds take windows spread evenly over it, because neighbours share a document.
    spread = max(len(self._windows), self._batches * rows)
    picked = [self._windows[w] if (w := row * spread // (self._batches * rows)) < len(self._windows)
              else self._windows.hidden() for row in chosen]
    return {key: np.stack([window[key] for window in picked]) for key in picked[0]}


def eval_batches(config: DataConfig, split: str, batches: int = 0, *, vocab_size: int | None = None,
                 process_index: int | None = None, process_count: int | None = None) -> EvalBatches:
  """A sequence of `batches` batches spread over `split`, or of all batches for 0. Every pass over it is the same.

  Over all batches and processes of a whole pass, every target of the split occurs once. Raises ValueError as
  `train_iterator` does.
  """
  index, count, rows = _processes(config, process_index, process_count)
  windows = Windows(TokenDataset(config.path, split, vocab_size=vocab_size), config.sequence_length,
                    reset_at_documents=config.reset_at_documents, pad=True)
  return EvalBatches(windows, batches, rows, index, count)


def _processes(config, index, count):
  if index is None or count is None:
    import jax

    index, count = jax.process_index(), jax.process_count()
  if config.batch_size % count:
    raise ValueError(f"config.data.batch_size={config.batch_size}: must be divisible by the {count} processes")
  return index, count, config.batch_size // count
