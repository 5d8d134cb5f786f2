"""Datasets that tests make of files with few documents, and their content."""

import io
import tarfile

from corpora import documents, tokenize
from lin_jax.data import TokenDataset
from lin_jax.tokenizer import ByteTokenizer

TEXTS = [f"Document {i}: caf\u00e9, {'word ' * (i % 17)}end." for i in range(300)]
SPLITS = ["train", "val", "test"]
PROSE = ("In the middle of the road there was a stone, and the people who came by on that day had to go around it. "
         "It was not the first stone in that place; there had been one before it, which the children took away. ")


def prepare(out, patterns, **options):
  """`tokenize.prepare` on files, with shards and checkpoints small enough to matter."""
  files = documents.find([str(pattern) for pattern in patterns])
  stream = options.pop("stream", lambda skip: documents.read(files, skip, field="text", separator="\0"))
  return tokenize.prepare(out, stream, tokenize.hash_split(0, 0.1, 0.1), splits=SPLITS,
                          recipe=dict(sources=documents.describe(files)), tokenizer=ByteTokenizer(),
                          shard_tokens=2000, checkpoint_tokens=1000, **options)


def deb(path, files):
  """A Debian package of the `files`, contents by names."""
  data = io.BytesIO()
  with tarfile.open(fileobj=data, mode="w:xz") as tar:
    for name, text in files.items():
      info = tarfile.TarInfo(f"./{name}")
      info.size = len(text)
      tar.addfile(info, io.BytesIO(text))
  with open(path, "wb") as f:
    f.write(b"!<arch>\n")
    for name, part in (("debian-binary", b"2.0\n"), ("control.tar.xz", b"odd"), ("data.tar.xz", data.getvalue())):
      f.write(f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(part):<10}`\n".encode() + part + b"\n" * (len(part) % 2))
  return path


def content(folder):
  return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def tokens(folder):
  return {name: value for name, value in content(folder).items() if name != "manifest.json"}


def decoded(folder, split):
  data = TokenDataset(folder, split)
  ends = [*data.document_starts[1:].tolist(), data.tokens]
  ids = [data.read(start, end) for start, end in zip(data.document_starts.tolist(), ends, strict=True)]
  assert all(document[-1] == 256 for document in ids)
  return [data.tokenizer().decode(document) for document in ids]


def interrupt(*_):
  raise KeyboardInterrupt
