"""The delta rule, gated or not, as kernels for Hopper: scans of the Mosaic GPU backend between two kernels of Triton's.

Triton's backend waits after every product. In the scans of `mosaic_gpu_forward.py` and `mosaic_gpu_reverse.py`, one
warpgroup copies while others multiply, and products run while the program goes on. The inverse of a chunk and the
gradients per chunk come from the kernels of `pallas_triton`, here for chunks of 64 tokens. Precision is as there.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from kernels import chunks, pieces, triton_blocks, tuned
from kernels.delta_rule.mosaic_gpu_forward import forward_scan
from kernels.delta_rule.mosaic_gpu_reverse import reverse_scan
from kernels.delta_rule.mosaic_gpu_ring import C, Problem
from kernels.delta_rule.pallas_triton_config import Config, heuristic
from kernels.delta_rule.pallas_triton_gradients import gradients
from kernels.delta_rule.pallas_triton_operands import prepare
from kernels.mosaic_blocks import TILE
from kernels.tuned import Tile

ENOUGH = 64  # programs, half a GPU's multiprocessors


def supports(q, k, v, beta, log_decay=None, segment_ids=None, *, chunk_size=None) -> str | None:
  """Why these inputs cannot run here, or None."""
  if q.dtype != jnp.bfloat16:
    return f"its kernels take bfloat16, not {q.dtype}"
  if chunk_size not in (None, C):
    return f"chunk_size={chunk_size} is not {C}"
  if log_decay is not None and log_decay.ndim == 4:
    return "it takes no decay per key channel"
  return triton_blocks.declines(q, None)


def avoids(q, k, v, beta, log_decay=None, segment_ids=None) -> str | None:
  """Why these inputs run here only if the implementation is named, or None."""
  (B, T, H, V), (G, K) = v.shape, q.shape[2:]
  if K <= TILE:
    return f"pallas_triton is as fast with gradients for {K} key channels"
  if V < TILE:
    return f"it would pad {V} value channels to {TILE}"
  problem = Problem(B, T, H, G, _width(K), V + -V % TILE, False, False, 1.0, False)
  if (programs := math.prod(problem.grid)) < ENOUGH:
    return f"pallas_triton cuts long sequences into pieces, and {programs} programs leave most of a GPU idle"
  return None


def delta_rule(q, k, v, beta, log_decay, initial_state, *, scale, normalize_qk, starts=None, chunk_size=None):
  """See `kernels.delta_rule`. The state is given; `starts` `[B, T]` says where segments start, if any do."""
  (_, T, H, V), K = v.shape, q.shape[3]
  flows = log_decay is not None  # resets alone have no gradient
  if starts is not None:
    log_decay = chunks.with_resets(log_decay, starts, H)
  dK, dV = _width(K) - K, -V % TILE
  pad = lambda x, extra: pieces.fold(jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, extra))), 1, C)
  fold = lambda x: pieces.fold(x, 1, C)
  state = jnp.pad(initial_state, ((0, 0), (0, 0), (0, dK), (0, dV)))
  config = _gradient_config(K + dK, V + dV, tuned.gate_key(log_decay))
  output, final_state = _delta_rule(pad(q, dK), pad(k, dK), pad(v, dV), fold(beta), None if log_decay is None
                                    else fold(log_decay), state, scale, normalize_qk, config, flows)
  return output[:, :T, :, :V], final_state[:, :, :K, :V]


def _width(K):
  """Key channels with the zeros behind them: the kernels of Triton's backend take powers of two."""
  return max(TILE, triton_blocks.tile_width(K))


def _gradient_config(K, V, gate):
  """What the kernel of the gradients reads of the configuration of `pallas_triton`, here for chunks of 64 tokens.

  The configurations were measured for chunks of 32. Where one would spill hundreds of bytes, its tiles are smaller.
  """
  config = tuned.lookup("delta_rule", Config, gate=gate, K=K, V=V, dtype=jnp.bfloat16) or heuristic(K, V, jnp.bfloat16)
  width, tile = math.gcd(config.width, V), config.gradients
  if K == TILE:
    tile = Tile(32, 4, 1)
  elif V > 2 * TILE:
    width, tile = min(width, 32), Tile(tile.block, tile.num_warps, 2)
  return dataclasses.replace(config, chunk=C, span=C, width=width, gradients=tile)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8, 9))
def _delta_rule(q, k, v, beta, log_decay, initial_state, scale, normalize_qk, config, flows):
  operands = prepare(q, k, beta, log_decay, normalize_qk, C, by_head=True)
  output, final_state = _scan(forward_scan, operands, v, initial_state, scale, save=False)
  return output, final_state


def _forward(q, k, v, beta, log_decay, initial_state, scale, normalize_qk, config, flows):
  operands = prepare(q, k, beta, log_decay, normalize_qk, C, by_head=True)
  output, final_state, e, states = _scan(forward_scan, operands, v, initial_state, scale, save=True)
  return (output, final_state), (operands, *triton_blocks.residuals((e, states)))


def _backward(scale, normalize_qk, config, flows, residuals, cotangents):
  operands, e, states = residuals
  do, dfinal_state = cotangents
  minus_f, dinitial_state, dstates = _scan(reverse_scan, operands, do, dfinal_state, scale, save=True)
  return *gradients(operands, e, do, minus_f, states, dstates, scale, config, flows), dinitial_state


def _scan(run, operands, v, state, scale, save):
  """A scan over whole sequences from a state `[B, H, K, V]`, and back to that arrangement."""
  (B, T, H, V), (G, K) = v.shape, operands.k.shape[2:]
  problem = Problem(B, T, H, G, K, V, operands.sums is not None, operands.q_norm is not None, scale, save)
  output, final, *saved = run(operands, v, jnp.swapaxes(state, 2, 3), problem)
  return output, jnp.swapaxes(final, 2, 3), *saved


_delta_rule.defvjp(_forward, _backward)
