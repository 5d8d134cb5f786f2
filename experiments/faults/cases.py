"""The faults that `inject_faults.py` injects into each command, with the exit code and message that each must give."""

import contextlib
import dataclasses
import hashlib
import os
import re
import shutil
import signal
import subprocess
import time

from lin_jax import files

from .judge import Case, Impossible
from .runner import Process, finish
from .writers import WRITERS, copied, generate

KILLS = 5  # the moments at which a command is killed, spread over the time that it takes
PATHS = r"/\S*"


def full_disk(name, kib):
  """The command writes to a file system that has `kib` KiB free."""
  def inject(inputs, folder):
    with mounted(folder) as out:
      words = WRITERS[name](inputs, out)
      (out / "filler").write_bytes(b"\0" * (shutil.disk_usage(out).free - 1024 * kib))
      return finish(words)

  return Case(f"{name}: {kib} KiB left on the disk", inject, 2, f"{PATHS} cannot be written: No space left on device")


def largest_file(name, size):
  """No file of the command may grow beyond `size` bytes, as under a quota."""
  def inject(inputs, folder):
    return finish(WRITERS[name](inputs, folder), largest=size)

  return Case(f"{name}: files of {size} bytes", inject, 2, f"{PATHS} cannot be written: File too large")


def read_only(name):
  def inject(inputs, folder):
    with mounted(folder) as out:
      words = WRITERS[name](inputs, out)
      _system("mount", "-o", "remount,ro", str(out))
      return finish(words)

  return Case(f"{name}: read-only file system", inject, 2, "cannot be written: Read-only file system")


def file_for_folder(name):
  """There is a file in the place of the folder to write to."""
  def inject(inputs, folder):
    (folder / "file").touch()
    return finish(WRITERS[name](inputs, folder / "file"))

  return Case(f"{name}: a file for a folder", inject, 2, "(cannot be written|Not a directory)")


def output(name, stdout, message):
  return Case(f"{name}: standard output {stdout}",
              lambda inputs, folder: finish(WRITERS[name](inputs, folder), stdout=stdout), 2, message)


def encoding(name, script, env):
  """The output's encoding has no accents, so the text is printed with codes in their place."""
  def inject(inputs, folder):
    ended = finish(script(inputs, folder), env=env, fresh=True)
    found = re.search(r"caf\\(xe9|udcc3)", ended.out)  # codes of the character, or of the bytes in a file's name
    return ended if found else dataclasses.replace(ended, code=-1, err=f"no code of an accent in {ended.out!r}")

  return Case(f"{name}: {' '.join(f'{key}={value}' for key, value in env.items())}", inject, 0, "")


def changed(what, file, reader, message, change=lambda content: bytes([content[0] ^ 1]) + content[1:]):
  """A file of the dataset was changed, by default in its first byte."""
  def inject(inputs, folder):
    data = copied(inputs.data, folder / "data")
    (data / file).write_bytes(change((data / file).read_bytes()))
    return finish(reader(inputs, folder, data))

  return Case(f"{what}: {file} {'changed' if 'SHA' in message else 'cut short'}", inject, 2, message)


def other_data():
  def inject(inputs, folder):
    data, run = copied(inputs.data, folder / "data"), folder / "run"
    _require(finish([*inputs.train(run, data), "--config.optim.steps=8"]))
    (text := folder / "text.txt").write_text(inputs.text.read_text(encoding="utf-8").upper(), encoding="utf-8")
    shutil.rmtree(data)
    _require(finish([word.replace(str(inputs.text), str(text)) for word in inputs.prepare(data)]))
    return finish([*inputs.train(run, data)])

  return Case("train: resumed on other data", inject, 2, r"holds a run on other data \(it was .* it is now .*\)")


def unfit_to_join(what, other, message):
  """A dataset is to be joined with another folder, which `other` makes."""
  def inject(inputs, folder):
    return finish(["prepare_data.py", f"--join={inputs.data},{other(inputs, folder)}", f"--out={folder}/joined"])

  return Case(f"join: {what}", inject, 2, message)


def damaged_start():
  """A run is to start from parameters whose files were cut short."""
  def inject(inputs, folder):
    source = copied(inputs.run, folder / "source")
    for file in source.glob("checkpoints/*/params/d/*"):
      os.truncate(file, file.stat().st_size // 2)
    return finish([*inputs.train(folder / "run"), f"--init_from={source}"])

  return Case("train: started from a damaged run", inject, 2, r"config.init_from='.*source': checkpoint .* is damaged")


def cut_while_training():
  def inject(inputs, folder):
    data = copied(inputs.data, folder / "data")
    process = Process([*inputs.train(folder / "run", data), "--config.optim.steps=100000"])
    process.wait_for("step 5/")
    os.truncate(data / "train-00000.bin", 100)
    return process.end()

  return Case("train: a shard cut short under it", inject, 2, "train-00000.bin: ends before id .*: it was cut short")


def in_use(name, lock):
  """Another process works in the same place."""
  def inject(inputs, folder):
    with files.lock(folder / lock, "held"):
      return finish(WRITERS[name](inputs, folder))

  return Case(f"{name}: a second process", inject, 2, rf"by process {os.getpid()} on host \S+: stop that one")


def beside_training():
  def inject(inputs, folder):
    run = copied(inputs.run, folder / "run")
    with files.lock(run / "lock", "held"):
      ended = finish(["evaluate.py", f"--workdir={run}", "--batches=1"])
      return ended if ended.code else finish(["generate.py", f"--workdir={run}", "--tokens=3"])

  return Case("evaluate, generate: a run under way", inject, 0, "")


def stale_lock():
  def inject(inputs, folder):
    run = copied(inputs.run, folder / "run")
    (run / "lock").write_text('{"pid": 1, "host": "elsewhere"}')
    ended = finish(inputs.train(run))
    return dataclasses.replace(ended, code=-1) if (run / "lock").exists() else ended

  return Case("train: the lock of a dead process", inject, 0, "")


def interrupted(name, words, text, message):
  def inject(inputs, folder):
    process = Process(words(inputs, folder))
    process.wait_for(text)
    os.kill(process.pid, signal.SIGINT)
    return process.end()

  return Case(f"{name}: Ctrl-C", inject, 130, message)


def killed(name, part):
  """The command gets SIGKILL after a part of its time. Repeated, it ends as one that was never killed."""
  def inject(inputs, folder):
    words = WRITERS[name]
    begin = time.monotonic()
    _require(finish(words(inputs, folder / "whole")))
    time_taken = time.monotonic() - begin
    process = Process(words(inputs, folder / "killed"))
    time.sleep(time_taken * part / KILLS)
    with contextlib.suppress(ProcessLookupError):  # the command has ended
      os.kill(process.pid, signal.SIGKILL)
    process.end()
    ended = finish(words(inputs, folder / "killed"))
    same = _content(folder / "whole") == _content(folder / "killed")
    return ended if same else dataclasses.replace(ended, code=-1, err=f"other content than unbroken; {ended.err}")

  return Case(f"{name}: killed at {part}/{KILLS} of its time", inject, 0, "")


@contextlib.contextmanager
def mounted(folder):
  """Mounts a file system of 4 MiB, if this machine allows that."""
  (out := folder / "mounted").mkdir()
  _system("mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(out))
  try:
    yield out
  finally:
    _system("umount", str(out))


def _of_bytes(inputs, folder):
  """The dataset `folder`/bytes of the inputs' text, with another tokenizer than theirs."""
  _require(finish([word.replace(str(inputs.tokenizer), "bytes") for word in inputs.prepare(folder / "bytes")]))
  return folder / "bytes"


def _system(*words):
  done = subprocess.run(words, capture_output=True, text=True)
  if done.returncode:
    raise Impossible(f"{' '.join(words[:3])}: {done.stderr.strip()}")


def _require(ended):
  if ended.code:
    raise AssertionError(f"the command that precedes the fault failed: {ended.err}")


def _content(folder):
  """Returns digests of all files, without the times and the files of Orbax, which differ in any two runs."""
  return {path.relative_to(folder): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*")
          if path.is_file() and "checkpoints" not in path.parts
          and path.name not in ("environment.json", "config.json", "data.json")}


def _cases():
  training = lambda inputs, folder, data: inputs.train(folder / "run", data)
  yield from (full_disk(name, kib) for name, kib in (
      ("train", 0), ("train", 8), ("train", 100), ("train", 300), ("evaluate", 0), ("generate", 0),
      ("generate_requests", 0), ("prepare_data", 0), ("prepare_data", 16), ("pack", 8), ("unpack", 8),
      ("convert_to", 0), ("convert_to", 40), ("convert_from", 20), ("convert_from", 60), ("run_synthetic", 0),
      ("run_language", 0), ("run_language", 40), ("smoke_models", 0), ("bench_kernels", 0), ("report_models", 0),
      ("report_kernels", 0)))
  yield from (largest_file(name, size) for name, size in (
      ("train", 1000), ("train", 20000), ("prepare_data", 2000), ("pack", 1000), ("unpack", 2000), ("convert_to", 9000),
      ("convert_from", 9000), ("report_models", 500)))
  yield from map(read_only, WRITERS)
  yield from (file_for_folder(name) for name in WRITERS if name not in ("evaluate", "report_kernels"))
  for name in ("train", "evaluate", "generate", "generate_requests", "prepare_data", "convert_from", "run_synthetic",
               "report_models"):
    yield output(name, "closed", "standard output was closed before the command had ended")
    yield output(name, "/dev/full", "standard output: No space left on device")
  for env in ({"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}):
    yield encoding("generate", lambda i, _: [*generate(i), "--prompt=caf\u00e9"], env)
    yield encoding("prepare_data", lambda i, out: i.prepare(out / "caf\u00e9"), env)
  differs = "has SHA-256 .*: the manifest says"
  for file in ("train-00000.bin", "val-00000.bin", "train.idx.npy"):
    yield changed("train", file, training, f"{file}: {differs}")
  yield changed("train", "train-00000.bin", training, "bytes: the manifest says", lambda content: content[:-2])
  yield changed("evaluate", "val-00000.bin", lambda i, _, data: ["evaluate.py", f"--workdir={i.run}", f"--data={data}"],
                f"val-00000.bin: {differs}")
  yield changed("generate", "tokenizer.model", lambda i, _, data: [*generate(i), f"--data={data}"],
                f"tokenizer.model: {differs}")
  yield changed("prepare_data", "train-00000.bin", lambda i, folder, data: [
      "prepare_data.py", f"--pack={data}", f"--out={folder}/packed"], f"train-00000.bin: {differs}")
  yield changed("prepare_data", "tokenizer.model", lambda i, folder, data: ["prepare_data.py", f"--verify={data}"],
                f"tokenizer.model: {differs}")
  yield from (other_data(), damaged_start(), cut_while_training())
  yield unfit_to_join("a folder that is no dataset", lambda _, folder: folder, "no manifest.json: not a directory")
  yield unfit_to_join("datasets of different tokenizers", _of_bytes, "--join=bytes: must have the tokenizer of data")
  yield from (in_use(name, lock) for name, lock in (
      ("train", "run/lock"), ("prepare_data", "data.lock"), ("pack", "packed.lock"), ("unpack", "data.lock"),
      ("convert_to", "hub.lock"), ("convert_from", "run.lock")))
  yield from (beside_training(), stale_lock())
  yield interrupted("train", lambda i, folder: [*i.train(folder / "run"), "--config.optim.steps=100000"], "step 5/",
                    "interrupted: saving after this step")
  yield interrupted("run_synthetic", lambda i, folder: [
      word.replace("--steps=2", "--steps=1000000") for word in WRITERS["run_synthetic"](i, folder)], "mqar",
      "run_synthetic.py: interrupted")
  yield interrupted("generate_requests", lambda i, folder: [
      *(word.replace("--tokens=4", "--tokens=100000000") for word in WRITERS["generate_requests"](i, folder)),
      "--temperature=0"], '"id": 1', "generate.py: interrupted")
  yield from (killed(name, part) for name in ("prepare_data", "pack", "unpack", "convert_to", "convert_from")
              for part in range(1, KILLS + 1))


CASES = tuple(_cases())
