import contextlib
import json
import os
import resource
import subprocess
import sys

import pytest

from lin_jax import files
from tests.forked import ROOT


@contextlib.contextmanager
def longest_file(size):
  """Acts like a full disk for one process: no file grows beyond `size` bytes."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def in_process(code):
  """What another process that runs `code` prints, or the message of its ValueError; it needs no JAX, so is quick."""
  code = f"from lin_jax import files\ntry:\n  {code}\nexcept ValueError as e:\n  print(e)"
  return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout


def test_a_file_is_replaced_whole_or_left(tmp_path):
  path = tmp_path / "page.md"
  files.write(path, "old\n")
  with pytest.raises(ValueError, match=f"{path}: cannot be written: File too large"), longest_file(100):
    files.write(path, "new\n" * 100)
  with pytest.raises(ZeroDivisionError), files.replacing(path) as file:
    file.write(b"half")
    raise ZeroDivisionError
  assert path.read_text() == "old\n" and list(tmp_path.iterdir()) == [path]
  files.write(path, "caf\u00e9 \udcff\n")
  assert path.read_bytes() == b"caf\xc3\xa9 \\udcff\n" and list(tmp_path.iterdir()) == [path]


def test_what_is_no_file_is_written_and_not_replaced(tmp_path):
  (tmp_path / "real").write_text("old")
  (tmp_path / "link").symlink_to("real")
  files.write(tmp_path / "link", "new")
  assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"
  with pytest.raises(ValueError, match="/dev/full: cannot be written: No space left on device"):
    files.write("/dev/full", "text")
  files.write(os.devnull, "text")
  assert os.path.exists(os.devnull) and not os.path.isfile(os.devnull)
  with pytest.raises(ValueError, match="cannot be written: Is a directory"):
    files.write(tmp_path, "text")
  with pytest.raises(ValueError, match="cannot be written: Not a directory"):
    files.write(tmp_path / "real" / "x", "text")
  assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


def test_a_line_that_does_not_fit_is_not_begun(tmp_path):
  path = tmp_path / "records.jsonl"
  files.append(path, "one\n")
  with pytest.raises(ValueError, match="records.jsonl: cannot be written"), longest_file(10):
    files.append(path, "another line\n")
  files.append(path, "two\n")
  assert path.read_text() == "one\ntwo\n"


def test_a_folder_appears_whole(tmp_path):
  with files.whole_folder(tmp_path / "deep" / "run") as work:
    (work / "a").write_text("a")
    assert not (tmp_path / "deep" / "run").exists()
    message = in_process(f"files.whole_folder({str(tmp_path / 'deep' / 'run')!r}).__enter__()")
  assert f"run is being made by process {os.getpid()} on host" in message
  assert [path.name for path in (tmp_path / "deep").iterdir()] == ["run"]
  with pytest.raises(ValueError, match="run exists and is not an empty"), files.whole_folder(work.parent / "run"):
    pass
  with pytest.raises(ZeroDivisionError), files.whole_folder(tmp_path / "other" / "run") as work:
    (work / "a").write_text("a")
    raise ZeroDivisionError
  assert not (tmp_path / "other").exists()


def test_a_folder_of_a_killed_process_is_made_anew(tmp_path):
  folder = str(tmp_path / "run")
  in_process(f"import os; f = files.whole_folder({folder!r}); files.write(f.__enter__() / 'half', ''); "
             "os.kill(os.getpid(), 9)")
  assert len(list(tmp_path.iterdir())) == 2 and not (tmp_path / "run").exists()
  with files.whole_folder(tmp_path / "run") as work:
    (work / "a").write_text("a")
  assert [path.name for path in tmp_path.iterdir()] == ["run"] and os.listdir(tmp_path / "run") == ["a"]


def test_a_lock_names_its_holder_and_ends_with_it(tmp_path):
  path = tmp_path / "lock"
  with files.lock(path, "the run is in use"):
    assert json.loads(path.read_text())["pid"] == os.getpid()
    message = in_process(f"files.lock({str(path)!r}, 'the run is in use').__enter__()")
    assert message.startswith(f"the run is in use by process {os.getpid()} on host {os.uname().nodename}")
    with pytest.raises(ValueError, match="in use by process"), files.lock(path, "it is in use"):
      pass
  assert not path.exists()
  path.write_text('{"pid": 1, "host": "here"}')  # of a process that was killed
  with files.lock(path, "the run is in use"):
    pass


def test_without_locks_in_the_file_system_a_warning_says_so(tmp_path, monkeypatch, capsys):
  def none(*_):
    raise OSError(95, "Operation not supported")

  monkeypatch.setattr(files.fcntl, "flock", none)
  with files.lock(tmp_path / "lock", "in use"):
    assert "this file system has no locks (Operation not supported): nothing keeps a second" in capsys.readouterr().err


def test_errors_about_files_get_a_name(tmp_path):
  for error in (OSError(28, "No space left on device"), ValueError("EXHAUSTED: x: No space left on device; more")):
    with pytest.raises(files.Unwritable, match=f"^{tmp_path}: cannot be written: No space left on device$"):
      with files.naming(tmp_path):
        raise error
  with pytest.raises(ValueError, match="another rule"), files.naming(tmp_path):
    raise ValueError("another rule")
