"""Trains a config by name. The same command resumes an interrupted run.

  python experiments/train.py --config=gla_tiny
  python experiments/train.py --config=gla_tiny --checkpoint=previous
  python experiments/train.py --config=gla_1b3 --workdir=runs/long --config.optim.steps=20000 --config.mesh.fsdp=8
  python experiments/train.py --config=gla_1b3 --init_from=hub/gla-1.3B-100B --config.lora.rank=16 --workdir=runs/tuned

A larger --config.optim.steps lengthens a run, finished or not. At a constant rate (final_learning_rate equal to
learning_rate) the result is the run that was planned with so many steps. A rate that decays does so until the step that
was first planned, which config.json records as optim.decay_steps, and then stays where it is. A run cannot be
shortened. A run with --config.optim.schedule=wsd can be lengthened while it has no decay (optim.decay_steps=0).

--init_from starts from the parameters of a run's last checkpoint, or of a Hugging Face folder, with a fresh optimizer.
--config.optim.trainable=mixer,head freezes all parameters whose names contain neither. --config.lora.rank=16 freezes
all of them and trains low-rank adapters beside the layers that --config.lora.targets chooses (default: all). They are
merged for generation, evaluation and export. --config.optim.name=muon and --config.optim.schedule=wsd choose another
optimizer and schedule.

The run continues from its last checkpoint, or from --checkpoint, and sets later checkpoints aside.

--coordinator=host:port --num_processes=2 --process_id=0 trains over the devices of several processes, on one host or
several, as `experiments/configs/README.md` says.

Exit codes: 0 finished, or stopped by SIGTERM with a checkpoint saved; 130 stopped by Ctrl-C with a checkpoint saved; 1
the loss was not finite; 2 a user's error, or one of the machine, such as a full disk; 1 or 134 another process of the
run died.
"""

import sys

import jax
from absl import flags
from ml_collections import config_flags

from configs import CONFIGS, lookup
from lin_jax.config import TrainConfig
from lin_jax.training import train
from running import commands, processes

_CONFIG = config_flags.DEFINE_config_dataclass(
    "config", TrainConfig(), f"One of {', '.join(CONFIGS)}; --config.<field>=<value> overrides a field.",
    parse_fn=lookup)
_INIT_FROM = flags.DEFINE_string("init_from", "", "A run's workdir, or a Hugging Face folder, whose parameters the run "
                                 "starts with. The same as --config.init_from.")
_WORKDIR = flags.DEFINE_string("workdir", "", "Directory of the run; by default runs/<config>.")
_CHECKPOINT = commands.define_checkpoint()
_JOIN = processes.define()


def main(_):
  config = _CONFIG.value
  if not config.name:
    raise ValueError(f"--config is required: one of {', '.join(CONFIGS)}")
  config.init_from = _INIT_FROM.value or config.init_from
  _JOIN()
  workdir = _WORKDIR.value or f"runs/{config.name}"
  checkpoint = commands.checkpoint_step(_CHECKPOINT.value)
  try:
    result = train(config, workdir, checkpoint)
  except FloatingPointError as e:
    print(f"train.py: {e}", file=sys.stderr)
    sys.exit(1)
  if jax.process_index():
    return  # process 0 has written the metrics, and says how the run has ended
  if result["preempted"]:
    print(f"stopped by {result['preempted']} after step {result['step']}, saved as {result['checkpoint']}: the same "
          "command resumes")
    sys.exit(130 if result["preempted"] == "SIGINT" else 0)
  print(f"done: step {result['step']}, held-out bits per byte {result['bits_per_byte']:.3f}, "
        f"loss curve {workdir}/loss.png, checkpoint {result['checkpoint']}")


if __name__ == "__main__":
  with processes.failing_alone():
    commands.run(main, cached=True)
