"""Commands keep compiled programs: where, not at all, and what a bad folder or entry does."""

import pytest

from tests.environment import ENVIRONMENT
from tests.forked import ROOT, Command

SCRIPT = f"""
import sys
sys.path.insert(0, {str(ROOT / "experiments")!r})
import jax
import jax.numpy as jnp
from running import commands

def main(_):
  print(jax.jit(lambda x: jnp.sign(x) @ x)(jnp.ones((2, 2)))[0, 0])

commands.run(main, cached=True)
"""
RESULT = "2.0\n"


def run(folder, *arguments, **environment):
  """The messages of a command that compiles a program and prints its right result."""
  (script := folder / "command.py").write_text(SCRIPT)
  env = {name: value for name, value in ENVIRONMENT.items() if name != "JAX_COMPILATION_CACHE_DIR"} | environment
  process = Command(script, *arguments, env=env)
  out, err = process.communicate()
  assert (process.returncode, out) == (0, RESULT), err
  return err


def entries(folder):
  return {path: path.stat().st_mtime_ns for path in folder.rglob("*-cache")}


@pytest.mark.parametrize("given, kept", [
    (dict(XDG_CACHE_HOME="{0}/xdg"), "xdg/lin_jax/compiled"),
    (dict(HOME="{0}/home", XDG_CACHE_HOME="not/absolute"), "home/.cache/lin_jax/compiled"),
    (dict(XDG_CACHE_HOME="{0}/xdg", JAX_COMPILATION_CACHE_DIR="{0}/jax"), "jax")])
def test_a_second_start_compiles_nothing(tmp_path, given, kept):
  given = {name: value.format(tmp_path) for name, value in given.items()}
  assert run(tmp_path, **given) == ""
  found = entries(tmp_path)
  assert found and all(path.is_relative_to(tmp_path / kept) for path in found)
  assert run(tmp_path, **given) == "" and entries(tmp_path) == found


def test_the_flag_moves_the_cache_and_switches_it_off(tmp_path):
  elsewhere = dict(XDG_CACHE_HOME=str(tmp_path / "xdg"), JAX_COMPILATION_CACHE_DIR=str(tmp_path / "jax"))
  assert run(tmp_path, "--compilation_cache=off", **elsewhere) == "" and not entries(tmp_path)
  assert run(tmp_path, **elsewhere | {"JAX_COMPILATION_CACHE_DIR": ""}) == "" and not entries(tmp_path)
  assert run(tmp_path, f"--compilation_cache={tmp_path}/flag", **elsewhere) == ""
  assert entries(tmp_path) and entries(tmp_path) == entries(tmp_path / "flag")


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
  (tmp_path / "file").write_text("")
  for folder in ("file", "file/below"):
    err = run(tmp_path, f"--compilation_cache={tmp_path / folder}")
    assert err.startswith(f"command.py: compiled programs are not kept: {tmp_path / folder}: ")
    assert err.count("\n") == 1, err


def test_a_damaged_entry_is_compiled_again(tmp_path):
  arguments = f"--compilation_cache={tmp_path}/flag",
  run(tmp_path, *arguments)
  for path in entries(tmp_path):
    path.write_bytes(b"damaged")
  assert "Error reading persistent compilation cache entry" in run(tmp_path, *arguments)
