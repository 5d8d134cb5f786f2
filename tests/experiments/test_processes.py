"""`python experiments/train.py` in two processes: one run, killed and resumed, and flags that cannot start one."""

import signal
import socket
import time

import pytest

from lin_jax import metrics
from tests.experiments.test_train_cli import SIZE
from tests.forked import Command
from tests.lin_jax import tiny

STEPS = 40
FIRST, SECOND = (["--num_processes=2", f"--process_id={i}"] for i in range(2))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  return tiny.write_dataset(tmp_path_factory.mktemp("processes") / "data")


def free_port():
  with socket.socket() as s:
    s.bind(("", 0))
    return s.getsockname()[1]


def start(workdir, data, *arguments):
  return Command("train.py", *SIZE, f"--config.optim.steps={STEPS}", f"--config.data.path={data}",
                 "--config.model.dtype=float32", "--config.log.tensorboard=false",
                 "--config.checkpoint.every=6", f"--workdir={workdir}", *arguments)


def start_two(workdir, data, *arguments):
  address = f"--coordinator=localhost:{free_port()}"
  return [start(workdir, data, address, *number, *arguments) for number in (FIRST, SECOND)]


def ends(processes):
  """[(exit code, stdout, stderr)] of the processes."""
  texts = [process.communicate() for process in processes]
  return [(process.returncode, *text) for process, text in zip(processes, texts, strict=True)]


def losses(workdir):
  return {record["step"]: record["loss"] for record in metrics.read(workdir / "metrics.jsonl") if "loss" in record}


def signalled(processes, workdir, index, number, step):
  """Sends the signal to one process after the step is on record, and returns all ends and the seconds until then."""
  while max(losses(workdir), default=0) < step:
    assert processes[index].returncode is None, ends(processes)
    time.sleep(0.02)
  processes[index].send_signal(number)
  begin = time.monotonic()
  return ends(processes), time.monotonic() - begin


def test_processes_that_die_end_the_others_and_the_run_goes_on(data, tmp_path):
  workdir = tmp_path / "run"
  for index, step in ((1, 8), (0, 14)):
    found, seconds = signalled(start_two(workdir, data), workdir, index, signal.SIGKILL, step)
    assert found[index][0] == -signal.SIGKILL
    assert found[1 - index][0] not in (0, -signal.SIGKILL) and seconds < 40
    assert "another task died" in found[1 - index][2] or "another process of the run has ended" in found[1 - index][2]
  found, _ = signalled(start_two(workdir, data), workdir, 1, signal.SIGTERM, 22)
  last = max(losses(workdir))
  assert [code for code, _, _ in found] == [0, 0] and 22 <= last < STEPS
  assert f"stopped by SIGTERM after step {last}, saved as {workdir}/checkpoints/{last}" in found[0][1]
  assert "step" not in found[1][1]

  (code, out, err), = ends([start(workdir, data)])
  assert code == 0 and f"from step {last} to {STEPS}" in out, err
  codes = [code for code, _, _ in ends(start_two(tmp_path / "unbroken", data, "--config.checkpoint.every=0"))]
  broken, unbroken = losses(workdir), losses(tmp_path / "unbroken")
  assert codes == [0, 0] and list(broken) == list(unbroken) == list(range(1, STEPS + 1))
  assert all(broken[step] == unbroken[step] for step in range(1, last + 1))
  assert [broken[step] for step in unbroken] == pytest.approx(list(unbroken.values()), rel=1e-5)


def test_an_error_of_all_processes_is_one_message_of_each(data, tmp_path):
  for code, out, err in ends(start_two(tmp_path / "run", data, "--config.data.batch_size=3")):
    assert code == 2 and not out and err.count("\n") == 1 and "config.data.batch_size=3" in err
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments, message", [
    (["--coordinator=localhost:1"], "--num_processes and --process_id must be given too"),
    (["--num_processes=2", "--process_id=0"], "--coordinator must be given too"),
    (["--coordinator=localhost", *SECOND], "--coordinator=localhost: must be host:port of process 0"),
    (["--coordinator=localhost:1", "--num_processes=2", "--process_id=2"], "--process_id=2: must be at least 0 and"),
    (["--coordinator=localhost:1", *SECOND], "localhost:1: not all processes have joined within 1 seconds"),
    (["--coordinator=localhost:{free}", *FIRST], "not all processes have joined within 1 seconds"),
    (["--coordinator=localhost:{used}", *FIRST], "cannot be used: Address already in use"),
])
def test_flags_that_start_no_run_exit_with_2_and_one_message(tmp_path, arguments, message):
  with socket.create_server(("", 0)) as used:
    places = {"free": free_port(), "used": used.getsockname()[1]}
    process = Command("train.py", "--config=gla_tiny", "--connect_seconds=1",
                      *[argument.format(**places) for argument in arguments], cwd=tmp_path)
    out, err = process.communicate()
  assert (process.returncode, out) == (2, "") and not list(tmp_path.iterdir())
  messages = [line for line in err.splitlines() if line.startswith("train.py: ")]
  assert len(messages) == 1 and message in messages[0]
