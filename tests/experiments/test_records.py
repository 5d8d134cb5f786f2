"""Files of records: what they say about where they were made, and what is refused."""

import sys

import pytest

from running import records


def test_a_command_names_no_folder_of_a_machine(monkeypatch):
  monkeypatch.setattr(sys, "argv", [
      "/a/bench.py", "--out=/a/b/c.jsonl", "--data=/a/x,/b/y", "--part=1/2", "--in=runs/z"])
  assert records.command() == "python bench.py --out=c.jsonl --data=x,y --part=1/2 --in=runs/z"


@pytest.mark.parametrize("text, message", [
    ('{"bits": 1.0}\n{"loss": 2.0}\n', r"--out=\S*out.jsonl: line 2 is not a record of this command: it has no 'bits'"),
    ('{"bits": 1.0}\nsome words\n', r"--out=\S*out.jsonl: line 2 is not a record: b'some words'"),
])
def test_a_file_of_something_else_is_refused_and_stays_as_it_is(tmp_path, text, message):
  path = tmp_path / "out.jsonl"
  path.write_text(text)
  with pytest.raises(ValueError, match=message):
    records.load(path, "bits")
  assert path.read_text() == text
  with pytest.raises(ValueError, match=r"cannot be written: \S*out.jsonl is not a folder"):
    records.load(path / "more.jsonl")
