"""How the GPU kernels are configured: the fields, values worth timing, and a choice without a record."""

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
  scan: Tile  # value channels per program of the forward scan
  reverse_scan: Tile  # value channels per program of the reversed scan
  dqk: Tile  # key channels per program of the gradients, which takes as many value channels at a time (`loop_width`)


def heuristic(K: int, V: int, dtype, chunk_size: int | None = None) -> Config:
  """The answer where nothing is listed: tiles for the smallest supported GPU, which are slow on larger ones."""
  wide = dtype == jnp.float32
  # Stages keep the loads of the scan in shared memory: in registers they spill, on sm_80 first. Narrower tiles of
  # float32 spill too, so V is padded.
  warps, stages = 8 if K > 128 else 4, 3 if K <= 32 and V > 256 else 2
  scan = Tile(32, 8, 2) if wide else Tile(tile_width(V, 16 if K > 64 else 32), warps, stages)
  chunk = 16 if wide else 32 if K > 128 else 64
  keys = Tile(tile_width(K, 16), 4, 1) if wide else Tile(tile_width(K, 32), 4 if K > 16 else 8, 2)
  scores = Tile(64, 4, 1) if wide and K > 64 else None
  return Config(chunk_size or chunk, 64, scores, scan, scan, keys)


def candidates(K: int, V: int, dtype) -> dict[str, list]:
  """The values worth timing for each field, around those that were fastest on an H100."""
  wide = dtype == jnp.float32
  tiles = lambda size, *values: list(dict.fromkeys(Tile(tile_width(size, w), *launch) for w, *launch in values))
  if wide:
    scan, keys = tiles(V, (16, 4, 1), (32, 4, 1), (32, 8, 1)), tiles(K, (16, 4, 1), (32, 4, 1))
  else:
    scan = tiles(V, (64, 4, 2), (64, 4, 1), (64, 8, 2), (32, 4, 2), (32, 4, 1), *([(128, 8, 2)] if K > 128 else []))
    keys = tiles(K, (32, 4, 2), (32, 4, 1), (64, 4, 1), (64, 4, 2), (64, 4, 3))
  # For wide heads: each of many tiles would compute P again, in an accumulator that costs a second program's registers.
  scores = [Tile(64, 4, 2)] if not wide and K > 128 else []
  return {"chunk": [16 if wide else 64], "scores": scores, "depth": sorted({32 if wide else 64, tile_width(K)}),
          "scan": scan, "reverse_scan": scan, "dqk": keys}
