"""What a record says about where it was made."""

import sys

from running import records


def test_a_command_names_no_folder_of_a_machine(monkeypatch):
  monkeypatch.setattr(sys, "argv", [
      "/a/bench.py", "--out=/a/b/c.jsonl", "--data=/a/x,/b/y", "--part=1/2", "--in=runs/z"])
  assert records.command() == "python bench.py --out=c.jsonl --data=x,y --part=1/2 --in=runs/z"
