"""The end of a command: one message and its code for errors that others have to mend, a traceback for a defect."""

import pytest

from tests.forked import ROOT, Command

SCRIPT = f"""
import json, os, sys
sys.path.insert(0, {str(ROOT / "experiments")!r})
from running import commands

def main(_):
  {{body}}

commands.run(main)
"""


def ended(folder, body, **options):
  (script := folder / "command.py").write_text(SCRIPT.format(body=body))
  process = Command(script, **options)
  out, err = process.communicate()
  return process.returncode, out, err


@pytest.mark.parametrize("body, code, message", [
    ("raise KeyboardInterrupt", 130, "command.py: interrupted\n"),
    ("open('no/such/file')", 2, "command.py: no/such/file: No such file or directory\n"),
    ("raise OSError(28, 'No space left on device')", 2, "command.py: No space left on device\n"),
    ("os.dup2(os.open('/dev/full', os.O_WRONLY), 1); print('text')", 2,
     "command.py: standard output: No space left on device\n"),
    ("raise BrokenPipeError(32, 'Broken pipe')", 2,
     "command.py: standard output was closed before the command had ended\n"),
    ("__import__('logging').exception('of a library')", 0, ""),
])
def test_what_others_have_to_mend_is_one_message(tmp_path, body, code, message):
  assert ended(tmp_path, body) == (code, "", message)


@pytest.mark.parametrize("body, error", [("1 / 0", "ZeroDivisionError"), ("json.loads('{')", "JSONDecodeError"),
                                         ("raise RuntimeError('Event loop is closed')", "RuntimeError: Event loop")])
def test_a_defect_keeps_its_traceback(tmp_path, body, error):
  code, _, err = ended(tmp_path, body)
  assert code == 1 and "Traceback" in err and error in err


def test_threads_that_the_system_refuses_say_so_on_one_line(tmp_path):
  body = "import threading; t = threading.Thread(target=open, args=('/dev/full/x',)); t.start(); t.join()"
  assert ended(tmp_path, body) == (0, "", "command.py: /dev/full/x: Not a directory, in the background\n")
