"""Formats of the English corpus: each turns the files of a package into (name, text) of documents."""

import html
import json
import re
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator

Members = Iterable[tuple[str, bytes]]
Documents = Iterator[tuple[str, str]]

# Entries of a dictionary are too short to be documents; this many characters of them make one.
GROUP = 32_000


def _decode(content):
  try:
    return content.decode()
  except UnicodeDecodeError:
    return content.decode("latin-1")


def _untag(text):
  return html.unescape(re.sub(r"<[^>]*>", " ", text))


def _grouped(name, entries, limit=GROUP):
  group, size, number = [], 0, 0
  for entry in filter(None, map(str.strip, entries)):
    group.append(entry)
    size += len(entry)
    if size >= limit:
      yield f"{name}/{number}", "\n\n".join(group)
      group, size, number = [], 0, number + 1
  if group:
    yield f"{name}/{number}", "\n\n".join(group)


def text(members: Members) -> Documents:
  """Plain text and reStructuredText, as they are."""
  for name, content in members:
    yield name, _decode(content)


def web(members: Members) -> Documents:
  """HTML: the main content of each page."""
  from resiliparse.extract.html2text import extract_plain_text

  for name, content in members:
    yield name, extract_plain_text(_decode(content), main_content=True, preserve_formatting=True, links=False)


def pod(members: Members) -> Documents:
  """Perl's documentation, without commands and formatting codes."""
  for name, content in members:
    lines = re.sub(r"^=(head\d|item|encoding|over|back|cut|pod|for|begin|end)\b *", "", _decode(content), flags=re.M)
    # Twice, because codes nest.
    for _ in range(2):
      lines = re.sub(r"\b[BCFILSX](?:<<+ (.*?) >>+|<([^<>]*)>)", lambda m: m[1] or m[2] or "", lines, flags=re.S)
    yield name, re.sub(r"E<lt>", "<", re.sub(r"E<gt>", ">", lines))


_ROFF_ESCAPES = (("\\-", "-"), ("\\&", ""), ("\\e", "\\"), ("\\(aq", "'"), ("\\(dq", '"'), ("\\(em", "--"),
                 ("\\(en", "-"), ("\\(bu", "*"), ("\\(co", "(c)"), ("\\(lq", '"'), ("\\(rq", '"'), ("\\(cq", "'"),
                 ("\\ ", " "), ("\\~", " "), ("\\|", ""), ("\\^", ""), ("\\/", ""), ("\\,", ""), ("\\:", ""))


def man(members: Members) -> Documents:
  """Manual pages: headings and text of the man macros, without tables."""
  for name, content in members:
    page = re.sub(r"^\.TS.*?^\.TE", "", _decode(content), flags=re.M | re.S)
    page = re.sub(r'\\".*|\\f(\(..|\[[^]]*\]|.)|\\s[-+]?\d+|\\c$', "", page, flags=re.M)
    for escape, plain in _ROFF_ESCAPES:
      page = page.replace(escape, plain)
    yield name, "\n".join(_man_lines(page))


def _man_lines(page):
  for line in page.split("\n"):
    if not line.startswith((".", "'")):
      yield line
      continue
    macro, _, rest = line[1:].strip().partition(" ")
    words = [quoted or bare for quoted, bare in re.findall(r'"([^"]*)"|(\S+)', rest)]
    if macro in ("SH", "SS"):
      yield "\n" + " ".join(words) + "\n"
    elif macro in ("PP", "P", "LP", "TP", "IP", "TQ", "HP"):
      yield ""
    elif macro in ("B", "I", "SM", "SB"):
      yield " ".join(words)
    elif macro in ("BR", "RB", "BI", "IB", "IR", "RI"):
      yield "".join(words)


def mallard(members: Members) -> Documents:
  """GNOME's help pages, without XML tags and with a blank line before each block."""
  for name, content in members:
    page = re.sub(r"<(info|media|comment)\b.*?</\1>|<!--.*?-->", "", _decode(content), flags=re.S)
    blocks = re.split(r"<(?:p|title|item|note|section|td)\b[^>]*>", page)
    yield name, "\n\n".join(" ".join(_untag(block).split()) for block in blocks)


def vim(members: Members) -> Documents:
  """Vim's help, without the marks of tags, links and examples."""
  for name, content in members:
    page = re.sub(r"\*\S+\*|^[=~-]{20,}.*$|^<|>$", "", _decode(content), flags=re.M)
    yield name, re.sub(r"\|(\S+?)\|", r"\1", page)


def fortune(members: Members) -> Documents:
  """Fortune files, in which lines of `%` separate sayings."""
  for name, content in members:
    if not name.endswith((".dat", ".u8")):
      yield from _grouped(name, re.split(r"\n%\n", _decode(content)), GROUP // 2)


def dictd(members: Members) -> Documents:
  """Dictionaries of the DICT protocol, in which a line without indentation starts an entry."""
  for name, content in members:
    entries = re.sub(r"[{}]|\s*\[[^\]]*Webster[^\]]*\]|\s*\[\+?PJC\]", "", _decode(content))
    yield from _grouped(name, re.split(r"\n(?=\S)", entries))


def wordnet(members: Members) -> Documents:
  """WordNet's data files: `words (part of speech): gloss`."""
  for name, content in members:
    entries = []
    for line in _decode(content).split("\n"):
      head, bar, gloss = line.partition("|")
      if bar and not line.startswith("  "):
        fields = head.split()
        words = ", ".join(word.replace("_", " ") for word in fields[4:4 + 2 * int(fields[3], 16):2])
        entries.append(f"{words} ({name.rpartition('.')[2]}): {gloss.strip()}")
    yield from _grouped(name, entries)


def descriptions(members: Members) -> Documents:
  """apt's index of long package descriptions, with one document per package."""
  for _, content in members:
    for stanza in _decode(content).split("\n\n"):
      match = re.match(r"Package: (\S+)\n.*?^Description-en: (.*)", stanza, flags=re.M | re.S)
      if match:
        yield match[1], f"{match[1]}: " + re.sub(r"^ \.?", "", match[2], flags=re.M)


def factbook(members: Members) -> Documents:
  """Country pages of the World Factbook, with a line `Field: text` per entry."""

  def walk(value, field):
    if isinstance(value, dict):
      for key, inner in value.items():
        yield from walk(inner, field if key == "text" else key)
    elif isinstance(value, str):
      yield f"{field}: {' '.join(_untag(value).split())}"

  for name, content in members:
    yield name, "\n".join(walk(json.loads(content), ""))


def botocore(members: Members) -> Documents:
  """Service descriptions of the AWS library, with each documentation string once, in the first service that has it."""
  seen = set()

  def walk(value):
    if isinstance(value, dict):
      for key, inner in value.items():
        if key == "documentation" and isinstance(inner, str):
          yield re.sub(r"[ \n]*\n[ \n]*", "\n", _untag(re.sub(r"</?(p|li|ul|ol|note|dl|dd|dt)>", "\n", inner))).strip()
        else:
          yield from walk(inner)
    elif isinstance(value, list):
      for inner in value:
        yield from walk(inner)

  for name, content in members:
    strings = [string for string in dict.fromkeys(walk(json.loads(content))) if string not in seen]
    seen.update(strings)
    yield name, "\n\n".join(strings)


def sword(members: Members) -> Documents:
  """Texts of SWORD modules: 12-byte records (start, size, unpacked size) index zlib blocks, one per book or chapter."""
  files = dict(members)
  for name in sorted(files):
    if not name.endswith("s"):
      continue
    index, data = files[name], files[name[:-1] + "z"]
    for number, (start, size, _) in enumerate(struct.iter_unpack("<III", index[:len(index) // 12 * 12])):
      if size:
        yield f"{name}/{number}", _sword_block(_decode(zlib.decompress(data[start:start + size])))


def _sword_block(block):
  block = re.sub(r"<note\b.*?</note>", "", block, flags=re.S)
  block = re.sub(r"<title\b[^>]*>", "\n\n", block)
  block = re.sub(r"</title>|<(lb|l|p|div|milestone|br|item|list)\b[^>]*>|</(p|div|l|lg|item)>", "\n", block)
  block = re.sub(r" ([,.;:?!])", r"\1", re.sub(r"[ \t]{2,}", " ", _untag(block)))
  return re.sub(r"\n\s*\n+", "\n\n", block)


def rdb(members: Members) -> Documents:
  """Character vectors of an R lazy-load file: zlib blocks of serialised strings (type 9, length, bytes)."""
  for name, content in members:
    position, number = 0, 0
    while position < len(content) - 6:
      block = zlib.decompressobj()
      try:
        raw = block.decompress(content[position + 4:])
      except zlib.error:
        position += 1
        continue
      position = len(content) - len(block.unused_data)
      lines = _r_strings(raw)
      # Whole novels; the shorter vectors are the package's own metadata.
      if len(lines) > 5000:
        yield f"{name}/{number}", "\n".join(lines)
        number += 1


def _r_strings(raw):
  lines, position = [], 0
  while (position := raw.find(b"\x00\x04\x00\x09", position)) >= 0:
    length, = struct.unpack(">i", raw[position + 4:position + 8])
    if 0 <= length < 4000:
      lines.append(_decode(raw[position + 8:position + 8 + length]))
      position += 4 + length
    position += 4
  return lines


FORMATS: dict[str, Callable[[Members], Documents]] = dict(
    text=text, html=web, pod=pod, man=man, mallard=mallard, vim=vim, fortune=fortune, dictd=dictd, wn=wordnet,
    trans=descriptions, factbook=factbook, boto=botocore, sword=sword, rdb=rdb)
