"""FLOPs of a model and peak FLOP/s of devices, for model FLOPs utilisation (MFU)."""

from lin_jax.config import ModelConfig
from lin_jax.model import abstract_model

# Dense bfloat16 FLOP/s from the vendors' data sheets, by a part of `jax.Device.device_kind`. The first match counts.
PEAK_FLOPS = {
    "GB200": 2.5e15,
    "B200": 2.25e15,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "V100": 125e12,
    "TPU v6": 918e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v4": 275e12,
}


def forward_flops_per_token(config: ModelConfig, sequence_length: int) -> int:
  """Matmul and mixing FLOPs of one token's forward pass, averaged over a sequence."""
  return abstract_model(config).flops_per_token(sequence_length)


def training_flops_per_token(config: ModelConfig, sequence_length: int) -> int:
  """FLOPs per token of forward and backward pass, the latter counted as twice the former, without recomputation."""
  return 3 * forward_flops_per_token(config, sequence_length)


def peak_flops(device_kind: str) -> float | None:
  """Peak dense bfloat16 FLOP/s of one device, or None for a kind that is not in the table (a CPU, say)."""
  return next((peak for name, peak in PEAK_FLOPS.items() if name in device_kind), None)
