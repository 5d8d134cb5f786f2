"""The commands from text to sample, as a user types them, and their answers to mistakes."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.environment import ENVIRONMENT
from tests.forked import ROOT, Command

SMALL = ["--config.model.width=32", "--config.model.depth=1", "--config.model.mlp_width=32",
         "--config.data.sequence_length=32", "--config.data.batch_size=4", "--config.optim.warmup_steps=1"]


def start(command, *arguments):
  # Users have no fake devices.
  return subprocess.Popen([sys.executable, ROOT / "experiments" / command, *map(str, arguments)], cwd=ROOT,
                          env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def succeed(command, *arguments):
  process = start(command, *arguments)
  out, err = process.communicate()
  assert process.returncode == 0, err
  return out, err


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  path = tmp_path_factory.mktemp("data")
  for i in range(20):
    (path / f"{i}.txt").write_text(f"Document {i}. " + "the cat sat on the mat; " * 20)
  succeed("prepare_data.py", f"--input={path}/*.txt", "--tokenizer=bytes", "--val_fraction=0.2", f"--out={path}/bytes")
  return path / "bytes"


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("run") / "run"
  out, _ = succeed("train.py", "--config=gla_tiny", f"--workdir={workdir}", f"--config.data.path={data}", *SMALL,
                   "--config.optim.steps=6", "--config.optim.learning_rate=0.01", "--config.log.every=1")
  assert "step 6/6" in out
  return workdir


def test_commands_switch_the_faulty_fusions_off():
  code = "import os; from running import commands; commands.run(lambda _: print(os.environ['XLA_FLAGS']))"
  environment = ENVIRONMENT | {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=true"}
  out = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "experiments", env=environment, check=True,
                       capture_output=True, text=True).stdout
  assert out == "--xla_cpu_multi_thread_eigen=true --xla_cpu_experimental_ynn_fusion_type=\n"


def test_train_leaves_curve_config_and_metrics(run):
  assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
  assert json.loads((run / "config.json").read_text())["optim"]["steps"] == 6
  losses = [r["loss"] for line in (run / "metrics.jsonl").read_text().splitlines() if "loss" in (r := json.loads(line))]
  assert len(losses) == 6 and losses[-1] < losses[0]


def test_evaluate_prints_a_table_and_writes_it(run):
  out, _ = succeed("evaluate.py", f"--workdir={run}", "--sequence_length=64,128", "--bucket_width=16", "--piece=64")
  result = json.loads((run / "evaluation_val_64.json").read_text())
  assert [b["start"] for b in result["buckets"]] == [0, 16, 32, 48]
  assert sum(b["targets"] for b in result["buckets"]) == result["targets"]
  assert 0 < result["bits_per_byte"] < 8.2
  assert f"{result['bits_per_byte']:.4f} bits per byte" in out and "evaluation_val_64.json" in out
  longer = json.loads((run / "evaluation_val_128.json").read_text())
  assert (longer["sequence_length"], longer["piece"], longer["split"]) == (128, 64, "val")
  assert longer["targets"] == result["targets"]


def test_generate_repeats_with_its_seed(run, tmp_path):
  processes = [begin("generate.py", f"--workdir={run}", "--prompt=the cat", "--tokens=20", f"--seed={seed}",
                     f"--out={tmp_path}/{i}.txt")
               for i, (begin, seed) in enumerate([(start, 1), (Command, 1), (Command, 2)])]
  outputs = [process.communicate() for process in processes]
  assert [process.returncode for process in processes] == [0, 0, 0], outputs
  texts = [out for out, _ in outputs]
  assert texts[0].startswith("the cat") and texts[0] == texts[1] != texts[2]
  assert (tmp_path / "0.txt").read_text() == texts[0]
  assert "tokens/s" in outputs[0][1] and "decoding state" in outputs[0][1]


def test_generate_answers_requests_as_it_answers_each_alone(run, tmp_path):
  lines = [{"prompt": "the cat", "seed": 1}, {"prompt": "a prompt of another length", "id": "x", "max_tokens": 3}]
  (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  processes = [start("generate.py", f"--workdir={run}", "--tokens=20", f"--requests={tmp_path}/prompts.jsonl",
                     "--rows=2", f"--out={tmp_path}/answers.jsonl"),
               Command("generate.py", f"--workdir={run}", "--tokens=20", "--prompt=the cat", "--seed=1")]
  (out, err), (alone, _) = (process.communicate() for process in processes)
  assert [process.returncode for process in processes] == [0, 0], err
  answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
  assert sorted(out.splitlines()) == sorted((tmp_path / "answers.jsonl").read_text().splitlines())
  assert [answer["id"] for answer in answers] == [1, "x"] and answers[1]["tokens"] == 3
  assert f"the cat{answers[0]['text']}\n" == alone
  assert "tokens/s" in err and "bytes per row" in err and "0 in caches" in err


def test_mistakes_exit_with_2_and_one_message(run, data, tmp_path):
  train = ["train.py", f"--workdir={tmp_path}/new", "--config=gla_tiny", f"--config.data.path={data}", *SMALL]
  requests = f"--requests={data}/manifest.json"
  cases = [
      ([*train, "--config.data.batch_size=0"], "config.data.batch_size=0: must be at least 1"),
      ([*train, "--config.optim.steps=7", f"--workdir={run}"], "holds a run of another config"),
      ([*train, "extra"], "unexpected argument 'extra'"),
      (["generate.py", f"--workdir={tmp_path}/new"], "not a saved lin_jax config"),
      (["generate.py", f"--workdir={run}", "--top_p=0"], "top_p=0.0: must lie in (0, 1]"),
      (["generate.py", f"--workdir={run}", "--tokens=some"], "--tokens=some: invalid literal for int()"),
      (["generate.py", f"--workdir={run}", "--tokens=1", f"--out={tmp_path}/new/x"], "new/x: cannot be written: No"),
      (["generate.py", f"--workdir={run}", requests, f"--out={tmp_path}/x"], "manifest.json: line 1: '{': not JSON"),
      (["generate.py", f"--workdir={run}", requests, "--rows=0"], "rows=0: must be at least 1"),
      (["generate.py", f"--workdir={run}", requests, "--interactive"], "only one of them can be given"),
      (["generate.py", f"--workdir={run}", "--interactive", "--prompt=a"], "--prompt=a: prompts come from"),
      (["generate.py", f"--workdir={run}", "--interactive", "--out=a"], "--out=a: --interactive writes to standard"),
      (["evaluate.py", f"--workdir={run}", "--checkpoint=5"], "no checkpoint of step 5; saved: "),
      (["evaluate.py", f"--workdir={run}", "--split=nope"], "no split 'nope': it has test, train, val"),
  ]
  for arguments, message in cases:
    process = Command(*arguments)
    out, err = process.communicate()
    assert process.returncode == 2, (arguments, out, err)
    assert message in err and "Traceback" not in err
    assert len([line for line in err.splitlines() if line.startswith(f"{arguments[0]}: ")]) == 1
  assert not list(tmp_path.iterdir())


def test_a_damaged_checkpoint_is_one_message_and_another_is_taken_by_name(run, data, tmp_path):
  shutil.copytree(run, tmp_path / "run")
  broken = tmp_path / "run" / "checkpoints" / "999"
  broken.mkdir()
  train = ["train.py", "--config=gla_tiny", f"--config.data.path={data}", *SMALL, "--config.optim.steps=6",
           "--config.optim.learning_rate=0.01"]
  for command in (["evaluate.py", "--batches=1"], train):
    process = Command(*command, f"--workdir={tmp_path}/run")
    out, err = process.communicate()
    errors = [line for line in err.splitlines() if not line.endswith("gla runs as xla_chunked on cpu")]
    assert process.returncode == 2 and not out and len(errors) == 1, (out, err)
    assert errors[0].startswith(f"{command[0]}: checkpoint {broken} is damaged: ")
    assert "checkpoints/6: --checkpoint=6 goes on from it" in errors[0]
  process = Command("evaluate.py", "--batches=1", f"--workdir={tmp_path}/run", "--checkpoint=previous")
  out, err = process.communicate()
  assert process.returncode == 0, err


@pytest.mark.skipif(not shutil.which("make"), reason="tests the Makefile")
def test_make_without_a_python_says_what_to_install(tmp_path):
  shutil.copy(ROOT / "Makefile", tmp_path)
  for name in ("requirements.txt", "pyproject.toml"):
    (tmp_path / name).touch()
  commands = tmp_path / "bin"
  commands.mkdir()
  (commands / "make").symlink_to(shutil.which("make"))
  # A version manager leaves this of an interpreter that is not selected.
  for name in ("python3.12", "python3.13", "python3.14", "python3", "python"):
    (commands / name).write_text("#!/bin/sh\necho 'command not found' >&2\nexit 127\n")
    (commands / name).chmod(0o755)
  result = subprocess.run(["make", "test"], cwd=tmp_path, env=os.environ | {"PATH": str(commands)}, text=True,
                          capture_output=True)
  assert result.returncode != 0 and not (tmp_path / ".venv").exists()
  assert result.stderr.startswith("Python 3.12 or newer is needed and none was found: install it from https://")
