"""A training step compiled for many GPUs that the machine need not have: memory, and traffic between the GPUs.

The step is the one that trains, with its kernels, compiled for an H100 on a topology of hosts with eight of them. XLA's
autotuning needs a GPU and is left out, so products have the tiles of its rules.
"""

import dataclasses
import time
from unittest import mock

from kernel_tuning import gpus
from kernels import dispatch
from lin_jax import sharding
from lin_jax.config import TrainConfig
from speed import training
from speed.collectives import HOST, collectives

GPU = "sm_90a"


def compile_step(config: TrainConfig, devices: int) -> dict:
  """Compiles the step of `config`, and returns its memory per GPU in GiB and its collectives.

  Raises ValueError if JAX's CUDA plugin is missing.
  """
  topology = gpus.topology(GPU, max(1, devices // HOST), min(devices, HOST))
  mesh = sharding.make_mesh(config.mesh, topology.devices)
  begin = time.monotonic()
  with mock.patch.object(dispatch, "platform", lambda: "cuda"):  # kernels are chosen as on a GPU
    _, step = training.lower(config, mesh, documents=False)
  step = step.compile()
  memory = step.memory_analysis()
  gib = lambda size: round(size / 2**30, 3)
  return {"memory_gib": training.gibibytes(step), "state_gib": gib(memory.argument_size_in_bytes),
          "temporary_gib": gib(memory.temp_size_in_bytes), "compile_s": round(time.monotonic() - begin, 1),
          "collectives": [dataclasses.asdict(x) for x in collectives(step.as_text())]}
