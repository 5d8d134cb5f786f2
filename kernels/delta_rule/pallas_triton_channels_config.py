"""How the delta rule's GPU kernels for a decay per key channel are configured, as `pallas_triton_config.py` has it."""

import dataclasses

import jax.numpy as jnp

from kernels.triton_blocks import tile_width
from kernels.tuned import Tile


@dataclasses.dataclass(frozen=True)
class Config:
  """Chunks and tiles of the kernels. `kernels.tuned` has the measured ones, and `heuristic` always has an answer."""

  chunk: int  # tokens per chunk
  depth: int  # key channels of one product in the scans
  width: int  # value channels of one product of the gradients
  factors: Tile  # key channels of one product of the factors
  scan: Tile  # value channels per program of the forward scan
  reverse_scan: Tile  # value channels per program of the reversed scan
  gradients: Tile  # key channels per program of the gradients


def heuristic(K: int, V: int, dtype, chunk_size: int | None = None) -> Config:
  """The answer where nothing is listed: tiles for the smallest supported GPU, which are slow on larger ones."""
  wide = dtype == jnp.float32
  scan = Tile(tile_width(V, 16 if wide or K > 128 else 32), 8 if wide and K > 64 else 4, 1 if K > 128 else 2)
  keys = Tile(tile_width(K, 32 if wide else 16), 4, 1)
  depth = (32 if K > 64 else 64) if wide else tile_width(K, 128)
  return Config(chunk_size or (16 if wide else 32), depth, 16 if wide else 32,
                Tile(tile_width(K, 32 if wide else 64), 4, 1), scan, scan, keys)


def candidates(K: int, V: int, dtype) -> dict[str, list]:
  """The values worth timing for each field."""
  wide = dtype == jnp.float32
  tiles = lambda size, *values: list(dict.fromkeys(Tile(tile_width(size, w), *launch) for w, *launch in values))
  if wide:
    scan, keys = tiles(V, (16, 4, 2), (32, 4, 2), (32, 8, 2)), tiles(K, (16, 4, 1), (32, 4, 1), (32, 8, 1))
  else:
    scan = tiles(V, (64, 4, 2), (64, 4, 1), (64, 4, 3), (64, 8, 2), (128, 8, 1), (32, 4, 2), (32, 4, 3))
    keys = tiles(K, (64, 4, 1), (64, 8, 1), (128, 8, 1), (16, 4, 1))
  return {"scan": scan, "reverse_scan": scan, "gradients": keys, "width": [16] if wide else [32, 64, 128],
          "factors": tiles(K, (32, 4, 1), (64, 4, 1), (32, 2, 1), (128, 8, 1)),
          "depth": sorted({32 if wide else 64, tile_width(K)}), "chunk": [16] if wide else [32]}
