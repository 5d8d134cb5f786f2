"""How GLA's GPU kernels are configured: the fields, values worth timing, and a choice without a record."""

import dataclasses

import jax.numpy as jnp

from kernels.triton_blocks import tile_width
from kernels.tuned import Tile


@dataclasses.dataclass(frozen=True)
class Config:
  """Chunk and tiles of the kernels. `kernels.tuned` has the measured ones, and `heuristic` always has an answer."""

  chunk: int  # tokens per chunk
  depth: int  # key channels of one product in the scans
  scores: Tile | None  # key channels of one product of scores; None: the scans compute P
  factors: Tile  # key channels per program of factors
  scan: Tile  # value channels per program of the forward scan
  reverse_scan: Tile  # value channels per program of the reversed scan
  dqkg: Tile  # key channels per program of the gradients, which takes as many value channels at a time (`loop_width`)


def heuristic(K: int, V: int, dtype, chunk_size: int | None = None) -> Config:
  """The answer where nothing is listed: tiles for the smallest supported GPU, which are slow on larger ones."""
  wide, most = dtype == jnp.float32, K > 128
  # Stages keep the loads of the scan in shared memory: in registers they spill, on sm_80 first.
  scan = Tile(tile_width(V, 16 if wide or most else 32), 8 if wide or most else 4, 3 if wide and most else 2)
  # With 4 warps and a single tile of value channels the loop over tiles is unrolled into more than the registers hold.
  keys = Tile(tile_width(K, 16 if wide else 32), 4 if wide or V > 32 else 8, 1)
  scores = Tile(64, 4, 1) if wide and K > 64 else None
  depth = 64 if wide else tile_width(K)
  return Config(chunk_size or (16 if wide else 64), depth, scores, keys, scan, scan, keys)


def candidates(K: int, V: int, dtype) -> dict[str, list]:
  """The values worth timing for each field, around those that were fastest on an H100."""
  wide = dtype == jnp.float32
  tiles = lambda size, *values: list(dict.fromkeys(Tile(tile_width(size, w), *launch) for w, *launch in values))
  if wide:
    scan, keys = tiles(V, (16, 4, 1), (32, 4, 1), (32, 8, 1)), tiles(K, (16, 4, 1), (32, 4, 1))
  else:
    scan = tiles(V, (64, 4, 2), (64, 4, 1), (64, 8, 2), (32, 4, 2), (32, 4, 1))
    keys = tiles(K, (32, 4, 2), (32, 4, 1), (64, 8, 2), (64, 4, 1), (64, 4, 2), (64, 4, 3))
  # For wide heads: each of many tiles would compute P again, in an accumulator that costs a second program's registers.
  scores = [Tile(64, 4, 2)] if not wide and K > 128 else []
  return {"scores": scores, "depth": sorted({32 if wide else 64, tile_width(K)}), "scan": scan, "reverse_scan": scan,
          "dqkg": keys, "factors": tiles(K, (64, 4, 1), (128, 4, 1))}
