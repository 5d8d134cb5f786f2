"""`python experiments/train.py` as a user runs it: results, signals, and exit code 2 with one message."""

import json
import signal
import subprocess
import sys

import pytest

from tests.environment import ENVIRONMENT
from tests.forked import ROOT, Command
from tests.lin_jax import tiny

SIZE = ["--config=gla_tiny", "--config.model.width=32", "--config.model.depth=1", "--config.model.mlp_width=64",
        "--config.model.mixer.implementation=xla_chunked", "--config.data.sequence_length=64",
        "--config.data.batch_size=4", "--config.optim.warmup_steps=2", "--config.log.every=1",
        "--config.checkpoint.every=4", "--config.eval.every=0", "--config.eval.batches=2", "--config.optim.steps=60"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  return tiny.write_dataset(tmp_path_factory.mktemp("cli") / "data")


def start(cwd, *arguments):
  return subprocess.Popen([sys.executable, ROOT / "experiments" / "train.py", *map(str, arguments)], cwd=cwd,
                          env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(cwd, *arguments):
  process = Command("train.py", *arguments, cwd=cwd)
  out, err = process.communicate()
  return process.returncode, out, err


def interrupt(process, number):
  """Sends the signal once step 10 is reported, and returns (exit code, rest of stdout, stderr)."""
  for line in process.stdout:
    if line.startswith("step 10/"):
      process.send_signal(number)
      break
  out, err = process.communicate()
  return process.returncode, out, err


def losses(workdir):
  records = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
  return {r["step"]: r["loss"] for r in records if "loss" in r}


def test_run_killed_and_terminated_goes_on_as_if_nothing_had_happened(data, tmp_path):
  arguments = [*SIZE, f"--config.data.path={data}"]
  assert interrupt(start(tmp_path, *arguments), signal.SIGKILL)[0] == -signal.SIGKILL
  code, out, err = interrupt(start(tmp_path, *arguments), signal.SIGTERM)
  workdir = tmp_path / "runs" / "gla_tiny"
  assert code == 0, err
  last = max(losses(workdir))
  assert f"stopped by SIGTERM after step {last}, saved as runs/gla_tiny/checkpoints/{last}" in out
  assert 10 <= last < 60 and (workdir / "checkpoints" / str(last)).is_dir()
  code, out, err = run(tmp_path, *arguments)
  assert code == 0, err
  assert f"from step {last} to 60" in out and "done: step 60, held-out bits per byte" in out
  assert (workdir / "loss.png").is_file()
  code, _, err = run(tmp_path, *arguments, "--workdir=unbroken", "--config.checkpoint.every=60")
  assert code == 0, err
  assert losses(workdir) == losses(tmp_path / "unbroken") and len(losses(workdir)) == 60


@pytest.mark.parametrize("arguments, message", [
    (["--config=gla_tyni"], "unknown config 'gla_tyni'; known: gla_tiny, "),
    ([], "--config is required: one of gla_tiny, "),
    (["--config=gla_tiny", "--config.optim.step=3"], "step"),
    (["--config=gla_tiny", "--config.optim.steps=many"], "many"),
    (["--config=transformer_tiny", "--config.model.mixer.expand_k=1.0"], "expand_k"),
    (["--config=gla_tiny", "--config.data.path=nowhere"], "data path 'nowhere': no such directory"),
    (["--config=gla_tiny", "--config.optim.name=lion"], "config.optim.name='lion': must be one of adamw, muon"),
    (["--config=gla_tiny", "--config.optim.trainable=mixer,,("], "config.optim.trainable='mixer,,(': must be regular"),
    ([*SIZE, "--config.data.path={data}", "--config.optim.trainable=hat"], "'hat' is found in no name of embedding, "),
    ([*SIZE, "--config.data.path={data}", "--config.lora.rank=2", "--config.lora.targets=hat"],
     "config.lora.targets='hat': 'hat' is found in no name of runs.0.0.mixer."),
    ([*SIZE, "--config.data.path={data}", "--init_from=nowhere"], "config.init_from='nowhere': nowhere/config.json: "),
    (["--config=gla_tiny", "--config.data.path={data}", "--workdir={data}/manifest.json/run"], "cannot be written"),
    (["--config=gla_tiny", "--config.data.path={data}", "--config.model.mixer.implementation=pallas_triton",
      "--config.model.mixer.chunk_size=128"], "declines these inputs: chunk_size=128"),
])
def test_user_errors_exit_with_2_and_one_message_and_write_nothing(data, tmp_path, arguments, message):
  process = Command("train.py", *[a.format(data=data) for a in arguments], cwd=tmp_path)
  out, err = process.communicate()
  assert process.returncode == 2 and not out and not list(tmp_path.iterdir())
  # The op says on the way which implementation it is, once the model has been traced.
  errors = [line for line in err.splitlines() if not line.endswith("gla runs as xla_chunked on cpu")]
  assert len(errors) == 1 and errors[0].startswith("train.py: ") and message in errors[0]
