"""The English recipe, on packages made here."""

import gzip

import numpy as np
import pytest

from corpora import archives, clean, english, formats, overlap
from lin_jax.manifests import read_manifest
from lin_jax.tokenizer import ByteTokenizer
from tests.experiments.datasets import PROSE, content, deb, decoded, interrupt


def test_members_of_a_debian_package(tmp_path):
  files = {"usr/a.txt": b"A", "usr/b.txt.gz": gzip.compress(b"B"), "usr/c.md": b"C"}
  path = deb(tmp_path / "a_1%3a2.0-1_all.deb", files)
  assert list(archives.members(path, r"\.txt(\.gz)?$")) == [("usr/a.txt", b"A"), ("usr/b.txt.gz", b"B")]
  assert list(archives.members(path, r"\.txt", r"/a")) == [("usr/b.txt.gz", b"B")]
  assert english.apt.version(path) == "1:2.0-1"
  path.write_bytes(b"other")
  with pytest.raises(ValueError, match="not a Debian package"):
    list(archives.members(path))


def test_formats():
  def only(name, *members):
    return [text for _, text in formats.FORMATS[name](iter([(f"m{i}", m.encode()) for i, m in enumerate(members)]))]

  assert only("pod", "=head1 NAME\n\nB<open> a I<file C<x>>, E<lt>here") == ["NAME\n\nopen a file x, <here"]
  assert only("man", '.SH "THE NAME"\n.BR ls (1)\nlists \\fBfiles\\fP \\- all\n.\\" hidden\n.TS\nx\n.TE\n') == [
      "\nTHE NAME\n\nls(1)\nlists files - all\n\n"]
  assert only("mallard", "<page><info>i</info><title>T</title><p>a <b>b</b>\nc</p></page>") == ["\n\nT\n\na b c"]
  assert only("fortune", "one\n%\ntwo\n%\n") == ["one\n\ntwo"]
  assert only("dictd", "word\n  {its} meaning [1913 Webster]\nother\n  m\n") == ["word\n  its meaning\n\nother\n  m"]
  assert only("trans", "Package: p\nDescription-md5: 0\nDescription-en: short\n long\n .\n more") == [
      "p: short\nlong\n\nmore"]
  assert only("factbook", '{"Geography": {"Area": {"text": "1 <b>km</b>"}, "Coast": {"x": {"text": "0"}}}}') == [
      "Area: 1 km\nx: 0"]
  assert only("boto", '{"documentation": "<p>A b.</p>", "shapes": [{"documentation": "<p>A b.</p>"}]}') == ["A b."]
  gloss = "00001740 03 n 02 entity 0 a_thing 0 000 | that which is\n"
  assert list(formats.wordnet([("data.noun", gloss.encode())])) == [
      ("data.noun/0", "entity, a thing (noun): that which is")]


def test_unwrapping_joins_wrapped_prose_only():
  wrapped = "This paragraph was wrapped at some seventy columns, as\nplain text files were, and goes on in one line."
  assert clean.unwrap(wrapped) == wrapped.replace("\n", " ")
  for kept in ("short\nlines of verse", "* a list item that is quite long, with many many words in it\n* and another",
               "columns of a table are far apart    like this one here\ncolumns of a table are far apart    like this"):
    assert clean.unwrap(kept) == kept


def test_cleaning_drops_navigation_and_repeated_paragraphs():
  pages = [(str(i), f"Home | Next | Previous\n\n{PROSE} Page {i}.") for i in range(30)]
  cleaned = dict(clean.clean(pages))
  assert cleaned["7"] == f"{PROSE} Page 7."
  seen = set()
  assert clean.dedupe(f"{PROSE}\n\nshort\n\n{PROSE.upper()}", seen) == f"{PROSE}\n\nshort"
  assert clean.dedupe(f"{PROSE}\n\nshort", seen) == "short"
  assert clean.is_prose(PROSE * 2, "prose") and not clean.is_prose("0x1f 17 " * 100, "prose")
  assert not clean.is_prose(PROSE, "prose") and not clean.is_prose("Haus Baum Feld " * 50, "prose")


def test_overlap_counts_shared_ngrams():
  random = np.random.default_rng(0)
  train = [random.integers(0, 300, n).astype(np.uint16) for n in (400, 5, 200)]
  half = np.concatenate([train[0][:113], random.integers(0, 300, 112).astype(np.uint16)])

  def grams(ids):
    return [tuple(ids[i:i + overlap.N]) for i in range(len(ids) - overlap.N + 1)]

  known = {gram for ids in train for gram in grams(ids)}
  held_out = [half, train[0][50:90], random.integers(0, 300, 50).astype(np.uint16), train[1]]
  expected = [np.mean([gram in known for gram in grams(ids)]) if len(ids) >= overlap.N else 0 for ids in held_out]
  np.testing.assert_allclose(list(overlap.fractions(held_out, train)), expected)
  assert 0.4 < expected[0] < 0.5 and expected[1] == 1 and expected[2] == 0


def test_the_source_table_is_sound():
  table = english.sources("full")
  assert len(table) == 84 and len(english.sources("prose")) == 16 and len(english.sources("quick")) == 3
  for source in table:
    assert source.format in formats.FORMATS and source.group in english.HELD_OUT and len(source.sha256) == 64, source
  assert len({source.package for source in table}) == 84


@pytest.fixture
def english_options(tmp_path, monkeypatch):
  """The recipe over one package made here, and one that cannot be had."""
  random = np.random.default_rng(0)
  words = PROSE.split()
  texts = {f"usr/{i}.txt": " ".join(random.choice(words, 300)).encode() for i in range(200)}
  package = deb(tmp_path / "good_1.0_all.deb", texts)
  row = ["1.0", "text", r"\.txt$", "", "none", "0" * 64]
  monkeypatch.setattr(english, "sources", lambda _: [english.Source("prose", "deb", n, *row) for n in ("good", "gone")])
  monkeypatch.setattr(english.apt, "packages", lambda names, cache: {"good": package})
  return dict(tier="prose", seed=0, cache=tmp_path, tokenizer=ByteTokenizer())


def test_the_english_recipe_skips_what_it_cannot_get(tmp_path, english_options, capfd):
  assert english.prepare(tmp_path / "out", **english_options)
  assert not english.prepare(tmp_path / "out", **english_options)
  manifest = read_manifest(tmp_path / "out")
  assert [(s["package"], s["documents"], s["drifted"]) for s in manifest["sources"]] == [("good", 200, True)]
  assert [(s["package"], s["reason"]) for s in manifest["skipped"]] == [("gone", "not in this machine's apt sources")]
  assert "skipped deb:gone" in capfd.readouterr().err
  found = sum((decoded(tmp_path / "out", split) for split in manifest["splits"]), [])
  texts = {text.decode() for _, text in archives.members(tmp_path / "good_1.0_all.deb")}
  assert set(found) <= texts
  # Words drawn from one paragraph repeat each other, so the held-out documents are the ones that are dropped.
  assert 0 < manifest["dropped_for_overlap"] == 200 - len(found) < 30


def test_the_english_recipe_continues_to_the_same_bytes(tmp_path, english_options, monkeypatch):
  english.prepare(tmp_path / "whole", **english_options)
  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(overlap, "fractions", interrupt)
    english.prepare(tmp_path / "out", **english_options)
  assert not (tmp_path / "out").exists()
  # The steps that were finished are not repeated.
  monkeypatch.setattr(english, "extract", interrupt)
  monkeypatch.setattr(english_options["tokenizer"], "encode", interrupt)
  english.prepare(tmp_path / "out", **english_options)
  assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_the_english_recipe_needs_some_source(tmp_path, english_options, monkeypatch):
  monkeypatch.setattr(english.apt, "packages", lambda names, cache: {})
  with pytest.raises(ValueError, match="none of the 2 sources could be downloaded"):
    english.prepare(tmp_path / "out", **english_options)


def test_html_sources_ask_for_their_parser_before_anything_is_downloaded(tmp_path, monkeypatch):
  monkeypatch.setattr(english, "download", interrupt)
  monkeypatch.setattr(english.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ValueError, match="--tier=prose has HTML sources, which need the package resiliparse"):
    english.prepare(tmp_path / "out", tier="prose", seed=0, cache=tmp_path, tokenizer=ByteTokenizer())
  assert not list(tmp_path.iterdir())
