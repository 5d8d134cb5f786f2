"""Cleans extracted text: joins wrapped lines, drops navigation and non-prose, and removes repeated paragraphs."""

import collections
import hashlib
import re
from collections.abc import Iterable, Iterator

_BULLET = re.compile(r'\s*([-*+|=~^"#.:`>$%]|\d+[.)]|[a-z]\))')
_LIST_ITEM = re.compile(r"\s*([-*+]|\d+[.)]) ")
_STOP_WORDS = frozenset("""a about all an and any are as at be been but by can for from had has have he her his i if in
into is it its may more no not of on one or other so some such than that the their them then there these they this to
was we were when which who will with would you your""".split())


def unwrap(paragraph: str) -> str:
  """Joins the lines of a hard-wrapped paragraph, and leaves lists, tables, verse and code as they are.

  The lines of a wrapped paragraph have equal indentation and no bullets or column gaps, and all but the last one have
  45 to 110 characters.
  """
  lines = paragraph.split("\n")
  if len(lines) < 2 or _BULLET.match(lines[0]) and not _LIST_ITEM.match(lines[0]):
    return paragraph
  indent = _indent(lines[1])
  for i, line in enumerate(lines):
    words = line.strip()
    if i and (_indent(line) != indent or _BULLET.match(line)):
      return paragraph
    if "\t" in words or "  " in re.sub(r"([.?!])  ", r"\1 ", words):
      return paragraph
    if i < len(lines) - 1 and not 45 <= len(words) <= 110:
      return paragraph
  return lines[0].rstrip() + " " + " ".join(line.strip() for line in lines[1:])


def _indent(line):
  return len(line) - len(line.lstrip())


def clean(documents: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
  """Normalises white space, joins wrapped lines, and drops lines that occur in over a tenth of 20 or more pages."""
  documents = [(name, _normalise(text)) for name, text in documents]
  pages = collections.Counter(line for _, text in documents for line in set(text.split("\n")) if line.strip())
  common = {line for line, count in pages.items() if count > len(documents) / 10} if len(documents) >= 20 else set()
  for name, text in documents:
    kept = "\n".join(line for line in text.split("\n") if line not in common)
    paragraphs = [paragraph.strip("\n") for paragraph in re.split(r"\n\n+", kept)]
    yield name, "\n\n".join(unwrap(paragraph) for paragraph in paragraphs if paragraph.strip())


def _normalise(text):
  text = text.replace("\r\n", "\n").replace("\xa0", " ").replace("\x00", "").replace("\x0c", "\n")
  return re.sub(r"[ \t]+$", "", text.encode("utf-8", "replace").decode(), flags=re.M).strip("\n")


def is_prose(text: str, group: str) -> bool:
  """Whether a document is long enough and has the letters and function words of English text."""
  if len(text) < (500 if group == "tech" else 300):
    return False
  letters = sum(map(str.isalpha, text)) + text.count(" ")
  words = re.findall(r"[a-z]+", text.lower())
  stops = sum(word in _STOP_WORDS for word in words)
  return letters >= 0.6 * len(text) and stops >= (0.15 if group == "tech" else 0.10) * len(words)


def dedupe(text: str, seen: set[bytes]) -> str:
  """Removes from `text` the paragraphs of 80 characters or more that are in `seen`, and adds the others to it.

  Case and white space do not matter.
  """
  kept = []
  for paragraph in text.split("\n\n"):
    squashed = " ".join(paragraph.split()).lower()
    if len(squashed) >= 80:
      digest = hashlib.blake2b(squashed.encode(), digest_size=8).digest()
      if digest in seen:
        continue
      seen.add(digest)
    kept.append(paragraph)
  return "\n\n".join(kept).strip()
