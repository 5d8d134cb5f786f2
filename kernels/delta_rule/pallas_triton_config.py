"""How the delta rule's GPU kernels are configured: the fields, values worth timing, and a choice without a record."""

import dataclasses

import jax.numpy as jnp

from kernels.triton_blocks import tile_width
from kernels.tuned import Tile


@dataclasses.dataclass(frozen=True)
class Config:
  """Chunks and tiles of the kernels. `kernels.tuned` has the measured ones, and `heuristic` always has an answer."""

  chunk: int  # tokens per chunk of the scans
  span: int  # tokens per chunk of the gradients, a multiple of `chunk`
  depth: int  # key channels of one product in the scans
  width: int  # value channels of one product of the gradients
  scan: Tile  # value channels per program of the forward scan
  reverse_scan: Tile  # value channels per program of the reversed scan
  gradients: Tile  # key channels per program of the gradients


def heuristic(K: int, V: int, dtype, chunk_size: int | None = None) -> Config:
  """The answer where nothing is listed: tiles for the smallest supported GPU, which are slow on larger ones."""
  # Neighbouring widths differ where a compiler spilled.
  wide = dtype == jnp.float32
  chunk = chunk_size or (16 if wide else 32)
  block, warps = tile_width(V, 16 if wide or K > 128 else 32), 8 if wide and K > 64 else 4
  stages = 3 if K <= 32 and (wide or V < 128) or wide and K == 64 and chunk < 64 else 2
  scan = Tile(64 if K <= 16 and V >= 128 and not wide else block, warps, stages)
  reverse_scan = Tile(block, warps, 3 if K * block <= (512 if wide else 2048) else 1 if wide and K == 128 else 2)
  gradients = Tile(tile_width(K, 16 if wide and V <= 16 else 32), 4, 1 if wide else 2)
  depth, width = 32 if wide and K > 64 else 64, 16 if wide or K <= 32 or V == 256 else 32
  return Config(chunk, chunk, depth, width, scan, reverse_scan, gradients)


def candidates(K: int, V: int, dtype) -> dict[str, list]:
  """The values worth timing for each field, around those that were fastest on an H100.

  Chunks of 16 tokens round the state so often that bfloat16 misses the bounds where keys are alike.
  """
  wide = dtype == jnp.float32
  tiles = lambda size, *values: list(dict.fromkeys(Tile(tile_width(size, w), *launch) for w, *launch in values))
  if wide:
    scan, keys = tiles(V, (16, 4, 2), (32, 4, 2), (32, 8, 2)), tiles(K, (16, 4, 1), (32, 4, 1), (32, 8, 1))
  else:
    scan = tiles(V, (64, 4, 3), (64, 4, 2), (128, 8, 3), (32, 4, 2), (32, 4, 3))
    keys = tiles(K, (64, 4, 1), (64, 4, 2), (64, 4, 3))
  return {"scan": scan, "reverse_scan": scan, "width": [16] if wide else [32, 64, 128], "gradients": keys,
          "depth": sorted({32 if wide else 64, tile_width(K)}), "span": [16, 32] if wide else [32, 64],
          "chunk": [16] if wide else [32]}
