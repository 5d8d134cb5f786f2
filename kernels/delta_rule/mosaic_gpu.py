"""The delta rule, gated or not, for Hopper GPUs: Mosaic GPU scans and gradients, and the inverse by Triton."""

import functools

import jax
import jax.numpy as jnp

from kernels import chunks, pieces, triton_blocks
from kernels.delta_rule.mosaic_gpu_gradients import gradients
from kernels.delta_rule.mosaic_gpu_scan import C, Problem, forward_scan, reverse_scan
from kernels.delta_rule.pallas_triton_operands import prepare


def supports(q, k, v, beta, log_decay=None, *, chunk_size=None) -> str | None:
  """Why these inputs cannot run here, or None."""
  K, V = q.shape[-1], v.shape[-1]
  if q.dtype != jnp.bfloat16:
    return f"dtype {q.dtype} is not bfloat16"
  if K not in (64, 128, 256) or V not in (64, 128, 256, 512):
    return f"widths {K} and {V}"
  if chunk_size not in (None, C):
    return f"chunk_size={chunk_size} is not {C}"
  return None


def delta_rule(q, k, v, beta, log_decay, initial_state, *, scale, normalize_qk, starts=None, chunk_size=None):
  """See `kernels.delta_rule`. The state is given; `starts` `[B, T]` says where segments start, if any do."""
  T, H = v.shape[1:3]
  flows = log_decay is not None  # resets alone have no gradient
  if starts is not None:
    log_decay = chunks.with_resets(log_decay, starts, H)
  fold = functools.partial(pieces.fold, count=1, chunk=C)
  output, final_state = _delta_rule(fold(q), fold(k), fold(v), fold(beta), None if log_decay is None
                                    else fold(log_decay), initial_state, scale, normalize_qk, flows)
  return output[:, :T], final_state


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def _delta_rule(q, k, v, beta, log_decay, initial_state, scale, normalize_qk, flows):
  """`flows` says whether `log_decay` has a gradient."""
  operands = prepare(q, k, beta, log_decay, normalize_qk, C, whole=True)
  output, final_state = _scan(forward_scan, operands, v, initial_state, scale, save=False)
  return output, final_state


def _forward(q, k, v, beta, log_decay, initial_state, scale, normalize_qk, flows):
  operands = prepare(q, k, beta, log_decay, normalize_qk, C, whole=True)
  output, final_state, e, states = _scan(forward_scan, operands, v, initial_state, scale, save=True)
  return (output, final_state), (operands, *triton_blocks.residuals((e, states)))


def _backward(scale, normalize_qk, flows, residuals, cotangents):
  operands, e, states = residuals
  do, dfinal_state = cotangents
  minus_f, dinitial_state, dstates = _scan(reverse_scan, operands, do, dfinal_state, scale, save=True)
  found = gradients(operands, *per_token(operands), e, do, minus_f, states, dstates, scale, flows)
  return *found, dinitial_state


def per_token(operands):
  """The kernels' vectors of each chunk, beta and the factors of norms, and the sums of gates, tokens last."""
  heads = lambda x: jnp.swapaxes(x, 1, 2)
  B, T, H = operands.beta.shape
  vectors = [operands.beta, *triton_blocks.given(operands.q_norm is not None, operands.q_norm, operands.k_norm)]
  vectors = jnp.stack([heads(x.astype(jnp.float32)).reshape(B, H, T // C, C) for x in vectors], axis=3)
  return vectors, None if operands.sums is None else heads(operands.sums)


def _scan(run, operands, v, state, scale, save):
  (B, T, H, V), (G, K) = v.shape, operands.k.shape[2:]
  vectors, sums = per_token(operands)
  problem = Problem(B, T, H, G, K, V, sums is not None, operands.q_norm is not None, scale, save)
  output, final, *saved = run(operands.q, operands.k, v, operands.y, vectors, sums, jnp.swapaxes(state, 2, 3), problem)
  return output, jnp.swapaxes(final, 2, 3), *saved


_delta_rule.defvjp(_forward, _backward)
