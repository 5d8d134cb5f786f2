"""The GPUs that kernels are compiled for on a machine without one."""

import dataclasses
import functools

from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh


@dataclasses.dataclass(frozen=True)
class Gpu:
  """The properties of a GPU that XLA needs. Shared memory is in bytes, per block at most and per multiprocessor."""

  device: str
  capability: tuple[int, int]
  cores: int
  shared_per_block: int
  shared_per_core: int
  threads_per_core: int
  lanes: int
  gigahertz: float
  memory: int
  bytes_per_second: int
  l2: int

  @property
  def abstract(self) -> AbstractMesh:
    return AbstractMesh((), (), abstract_device=AbstractDevice(self.device, self.cores, "gpu"))


# From the vendor's datasheets and the tables of compute capabilities in the CUDA C++ Programming Guide.
GPUS = {
    "sm_80": Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 166912, 167936, 2048, 64, 1.41, 80 << 30, 2039 * 10**9,
                 40 << 20),
    "sm_89": Gpu("NVIDIA GeForce RTX 4090", (8, 9), 128, 101376, 102400, 1536, 128, 2.52, 24 << 30, 1008 * 10**9,
                 72 << 20),
    "sm_90a": Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 232448, 233472, 2048, 128, 1.98, 79 << 30, 3352 * 10**9,
                  50 << 20),
    "sm_100a": Gpu("NVIDIA B200", (10, 0), 148, 232448, 233472, 2048, 128, 1.96, 180 << 30, 7700 * 10**9, 126 << 20),
}
_TARGET = """gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: {threads_per_core}
  shared_memory_per_block: 49152 shared_memory_per_block_optin: {shared_per_block}
  shared_memory_per_core: {shared_per_core} registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  core_count: {cores} fpus_per_core: {lanes} clock_rate_ghz: {gigahertz}
  device_memory_size: {memory} memory_bandwidth: {bytes_per_second} l2_cache_size: {l2}
  cuda_compute_capability {{ major: {capability[0]} minor: {capability[1]} }}
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 12 }} runtime_version {{ major: 13 minor: 0 }}
device_description_str: "{device}"
"""


@functools.cache
def mesh(gpu):
  """Returns a compile-only device. Raises ValueError if JAX's CUDA plugin is missing."""
  return topologies.make_mesh(topology(gpu), (1,), ("device",))


def topology(gpu: str, hosts: int = 1, each: int = 1):
  """Returns compile-only devices, `each` on every host. Raises ValueError if JAX's CUDA plugin is missing."""
  target = _TARGET.format(**dataclasses.asdict(GPUS[gpu]))
  try:
    return topologies.get_topology_desc("", platform="cuda", target_config=target, topology=f"1x{hosts}x{each}")
  except (RuntimeError, KeyError, ValueError) as e:
    raise ValueError(f"JAX cannot compile for CUDA: {e}; install the extra 'compile'") from e
