"""Files are read by their format, or refused."""

import bz2
import gzip
import json
import lzma

import pyarrow
import pyarrow.parquet
import pytest

from corpora import documents

TEXTS = ["first page", "second caf\u00e9\npage"]
ROWS = [{"text": text, "id": i} for i, text in enumerate(TEXTS)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
BOM = b"\xef\xbb\xbf"


def zstandard(content):
  sink = pyarrow.BufferOutputStream()
  with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
    stream.write(content)
  return sink.getvalue().to_pybytes()


COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard}


def texts(path, kind="", separator=""):
  found = documents.find([str(path)], kind)
  return [document.text for document in documents.read(found, field="text", separator=separator, kind=kind)]


def written(folder, name, content):
  (folder / name).write_bytes(content)
  return folder / name


@pytest.mark.parametrize("suffix", [".jsonl", ".JSONL", ".ndjson", ".jsonlines", ".json", ".JSON"])
def test_json_lines_are_read_under_all_their_names_and_compressions(tmp_path, suffix):
  assert texts(written(tmp_path, f"a{suffix}", LINES)) == TEXTS
  for ending, compress in COMPRESS.items():
    # Corpora come as pieces that were compressed one by one.
    pieces = b"".join(compress(line + b"\n") for line in LINES.splitlines())
    for name in (f"a{suffix}{ending}", f"b{suffix}{ending.upper()}"):
      assert texts(written(tmp_path, name, pieces)) == TEXTS


@pytest.mark.parametrize("content", [json.dumps(ROWS), json.dumps(ROWS, indent=2), "\n" + json.dumps(ROWS, indent=2)])
def test_an_array_of_rows_is_read(tmp_path, content):
  assert texts(written(tmp_path, "a.json", content.encode())) == TEXTS
  assert texts(written(tmp_path, "a.json.gz", gzip.compress(BOM + content.encode()))) == TEXTS


def test_one_row_over_several_lines_is_read(tmp_path):
  assert texts(written(tmp_path, "a.json", json.dumps(ROWS[1], indent=2).encode())) == TEXTS[1:]


@pytest.mark.parametrize("name", ["a.txt", "a.TXT", "a.md", "a.py"])
def test_text_is_read_plain_and_compressed(tmp_path, name):
  content = b"first\0second"
  assert texts(written(tmp_path, name, content), separator="\0") == ["first", "second"]
  for ending, compress in COMPRESS.items():
    assert texts(written(tmp_path, name + ending, compress(content))) == ["first\0second"]


def test_byte_order_marks_are_dropped(tmp_path):
  assert texts(written(tmp_path, "a.txt", BOM + b"one" + b"|" + BOM + b"two"), separator="|") == ["one", "two"]
  marked = b"".join(BOM + line + b"\r\n" for line in LINES.splitlines())
  assert texts(written(tmp_path, "a.jsonl", marked)) == TEXTS
  row = json.dumps({"text": "\ufeffmarked inside"}).encode()
  assert texts(written(tmp_path, "b.jsonl", row)) == ["marked inside"]


def test_the_format_flag_reads_what_a_name_does_not_say(tmp_path):
  assert texts(written(tmp_path, "part-00000", LINES), kind="jsonl") == TEXTS
  assert texts(written(tmp_path, "page.html.gz", gzip.compress(b"<p>one")), kind="text") == ["<p>one"]
  assert texts(written(tmp_path, "a.jsonl", LINES), kind="text") == [LINES.decode()]


PARQUET = b"PAR1" + bytes(8) + b"PAR1"
REFUSED = {
    "table": ("a.csv", b"text\nfirst", "the ending '.csv' does not say how to read it: --format must name one of"),
    "compressed table": ("a.tsv.gz", gzip.compress(b"text\tx"), "the ending '.tsv' does not say"),
    "archive": ("a.tar.gz", gzip.compress(b"x"), "the ending '.tar' does not say"),
    "no ending": ("part-00000", LINES, "a name without an ending does not say"),
    "hidden": (".DS_Store", b"x", "a name without an ending does not say"),
    "compressed Parquet": ("a.parquet.gz", gzip.compress(PARQUET), "Parquet files are compressed inside: unpack"),
    "gzip as text": ("a.txt", gzip.compress(b"x"), r"holds .gz data, .* name it so \(a.txt.gz\)"),
    "zstd as JSON": ("a.jsonl", zstandard(LINES), "holds .zst data"),
    "bzip2 as text": ("a.txt", bz2.compress(b"x"), "holds .bz2 data"),
    "xz as text": ("a.md", lzma.compress(b"x"), "holds .xz data"),
    "gzip twice": ("a.json.gz", gzip.compress(gzip.compress(LINES)), "holds .gz data"),
    "Parquet as text": ("a.txt", PARQUET, "holds Parquet data"),
    "zip as text": ("a.txt", b"PK\x03\x04", "holds zip data"),
    "text as zstd": ("a.jsonl.zst", LINES, "not readable .the content is not .zst."),
    "gzip as zstd": ("a.jsonl.zst", gzip.compress(LINES), "not readable .the content is not .zst."),
    "UTF-16": ("a.txt", "first page".encode("utf-16"), "holds UTF-16 data, .*: convert it to UTF-8 text"),
    "UTF-16 lines": ("a.jsonl", LINES.decode().encode("utf-16"), "holds UTF-16 data"),
    "UTF-16 without mark": ("a.txt", "first page".encode("utf-16-be"), "holds UTF-16 data"),
    "UTF-32": ("a.txt.gz", gzip.compress("first page".encode("utf-32")), "holds UTF-32 data"),
    "cut gzip": ("a.jsonl.gz", gzip.compress(LINES * 500)[:-20], "a.jsonl.gz: not readable"),
    "cut zstd": ("a.jsonl.zst", zstandard(LINES * 500)[:-20], "a.jsonl.zst: not readable"),
    "cut xz": ("a.jsonl.xz", lzma.compress(LINES * 500)[:-20], "a.jsonl.xz: not readable"),
    "cut JSON": ("a.json", b'[{"text": "a"}, {"te', "neither JSON Lines nor one JSON value"),
    "JSON of strings": ("a.json", b'["one", "two"]', "row 0 has no string under 'text'"),
    "deep JSON": ("a.jsonl", b"[" * 200_000, "line 1 is not JSON"),
    "second line": ("a.json", LINES + b"{", "line 3 is not JSON"),
}


@pytest.mark.parametrize("name, content, message", REFUSED.values(), ids=REFUSED)
def test_other_content_is_refused(tmp_path, name, content, message):
  with pytest.raises(ValueError, match=message) as error:
    texts(written(tmp_path, name, content))
  assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


def test_a_folder_is_refused_before_anything_is_read(tmp_path):
  written(tmp_path, "a.jsonl", LINES)
  written(tmp_path, "b.csv", b"text\n")
  with pytest.raises(ValueError, match="b.csv: the ending"):
    documents.find([str(tmp_path / "*")])
  with pytest.raises(ValueError, match=r"a folder, whose files are .*/\*$"):
    documents.find([str(tmp_path)])


def test_a_name_with_the_characters_of_patterns_is_a_file(tmp_path):
  assert texts(written(tmp_path, "page[1].txt", b"one")) == ["one"]


def test_a_damaged_parquet_file_is_named(tmp_path):
  pyarrow.parquet.write_table(pyarrow.table({"text": ["x" * 100] * 4000}), tmp_path / "a.parquet", compression="none")
  content = bytearray((tmp_path / "a.parquet").read_bytes())
  content[4:400] = bytes(396)
  with pytest.raises(ValueError, match="a.parquet: not a Parquet file that can be read"):
    texts(written(tmp_path, "a.parquet", bytes(content)))
