"""Kimi Delta Attention against the formulas of its docstring in numpy float64; its gates' type, start and FLOPs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lin_jax.mixers.kda import KDAConfig, log_rates
from tests.close import assert_close
from tests.lin_jax.mixers.formulas import by_heads, convolve, rms_norm, sigmoid, silu, unit, weights, wide
from tests.lin_jax.mixers.small import BATCH, TIME, assert_stays_float32, call, create, inputs, jit


def expected(mixer, config, x):
  x, heads = np.asarray(x, np.float64), config.value_heads or config.heads
  w = weights(mixer, "query", "key", "value", "beta", "decay_in", "decay_out", "output")
  qkv = [x @ w[name] for name in ("query", "key", "value")]
  if config.conv_width:
    qkv = [convolve(y, conv.kernel) for y, conv in zip(qkv, mixer.convolutions, strict=True)]
  q, k = (np.repeat(unit(by_heads(silu(y), config.heads)), heads // config.heads, axis=2) for y in qkv[:2])
  v, beta = by_heads(silu(qkv[2]), heads), (2 if config.allow_neg_eigval else 1) * sigmoid(x @ w["beta"])
  steps = by_heads(np.log1p(np.exp(x @ w["decay_in"] @ w["decay_out"] + wide(mixer.dt_bias))), heads)
  decay = np.exp(-np.exp(wide(mixer.A_log))[:, None] * steps)
  assert decay.min() < 0.5 and decay.max() > 0.95  # neither all kept nor all forgotten
  memory, outputs = np.zeros((BATCH, heads, k.shape[-1], v.shape[-1])), []
  for t in range(TIME):
    memory = decay[:, t, :, :, None] * memory
    error = v[:, t] - np.einsum("bhk,bhkv->bhv", k[:, t], memory)
    memory = memory + np.einsum("bh,bhk,bhv->bhkv", beta[:, t], k[:, t], error)
    outputs.append(np.einsum("bhk,bhkv->bhv", q[:, t], memory) / np.sqrt(k.shape[-1]))
  o = rms_norm(np.stack(outputs, axis=1)).reshape(BATCH, TIME, -1)
  if config.output_gate:
    o = o * sigmoid(x @ wide(mixer.gate_in.kernel) @ wide(mixer.gate_out.kernel))
  return o @ w["output"]


@pytest.mark.parametrize("config", [
    KDAConfig(heads=2, head_dim=12),
    KDAConfig(heads=2, value_heads=6, head_dim=8, expand_v=1.5, conv_width=3, allow_neg_eigval=True),
    KDAConfig(heads=3, head_dim=8, conv_width=0, output_gate=False),
], ids=["paper", "grouped", "bare"])
def test_is_the_papers_layer(config):
  mixer = create(config)
  assert_close("output", call(mixer, inputs())[0], expected(mixer, config, inputs()), 1e-5)


def test_decay_stays_float32():
  mixer = create(KDAConfig(heads=2, head_dim=8), dtype=jnp.bfloat16)
  assert_stays_float32(jit(lambda mixer, x: mixer._log_decay(x))(mixer, inputs(dtype=jnp.bfloat16)))


def test_rates_start_uniform_from_1_to_16():
  rates = np.exp(np.asarray(log_rates(jax.random.key(0), (10**5,), jnp.float32), np.float64))
  levels = np.linspace(0.01, 0.99, 9)
  np.testing.assert_allclose(np.quantile(rates, levels), 1 + 15 * levels, atol=0.1)


def test_flops_per_token():
  # Four projections of 32 x 128 channels, two gates of rank 128, a beta per head; three products with a state.
  mixer = jax.eval_shape(lambda: create(KDAConfig(), width=2304))
  gates = 2 * 2 * 128 * (2304 + 4096)
  assert mixer.flops_per_token(4096) == (2 * 2304 * (4 * 4096 + 32) + gates + 2 * 4 * 3 * 4096 + 6 * 32 * 128 * 128)
