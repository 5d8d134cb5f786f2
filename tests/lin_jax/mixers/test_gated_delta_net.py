"""Gated DeltaNet against the paper's formulas in numpy float64; the start of its decay, and no weight decay on it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lin_jax.config import ModelConfig, OptimConfig
from lin_jax.layers import time_step_biases
from lin_jax.mixers.gated_delta_net import GatedDeltaNetConfig, log_rates
from lin_jax.model import LanguageModel
from lin_jax.optim import make_optimizer
from tests.close import assert_close
from tests.lin_jax.mixers.formulas import by_heads, convolve, rms_norm, silu, unit, wide
from tests.lin_jax.mixers.small import BATCH, TIME, WIDTH, assert_stays_float32, call, create, inputs, jit


def expected(mixer, config, x):
  x = np.asarray(x, np.float64)
  qkv = [x @ wide(linear.kernel) for linear in (mixer.query, mixer.key, mixer.value)]
  if config.conv_width:
    qkv = [convolve(y, conv.kernel) for y, conv in zip(qkv, mixer.convolutions, strict=True)]
  heads = config.value_heads or config.heads
  q, k = (unit(by_heads(silu(y), config.heads)) for y in qkv[:2])
  q, k = (np.repeat(y, heads // config.heads, axis=2) for y in (q, k))
  v = by_heads(silu(qkv[2]), heads)
  beta = (2 if config.allow_neg_eigval else 1) / (1 + np.exp(-x @ wide(mixer.beta.kernel)))
  decay = np.exp(-np.exp(wide(mixer.A_log)) * np.log1p(np.exp(x @ wide(mixer.decay.kernel) + wide(mixer.dt_bias))))
  assert decay.min() < 0.7 and decay.max() > 0.95  # neither all kept nor all forgotten
  memory, outputs = np.zeros((BATCH, heads, k.shape[-1], v.shape[-1])), []
  for t in range(TIME):
    write, key = beta[:, t, :, None, None], k[:, t, :, :, None]
    transition = decay[:, t, :, None, None] * (np.eye(k.shape[-1]) - write * key * np.swapaxes(key, -1, -2))
    memory = transition @ memory + write * key * v[:, t, :, None, :]
    outputs.append(np.einsum("bhk,bhkv->bhv", q[:, t], memory) / np.sqrt(k.shape[-1]))
  o = np.stack(outputs, axis=1)
  o = rms_norm(o, config.norm_eps or 1e-6).reshape(BATCH, TIME, -1)
  return (o * silu(x @ wide(mixer.gate.kernel)) if config.output_gate else o) @ wide(mixer.output.kernel)


@pytest.mark.parametrize("config", [
    GatedDeltaNetConfig(heads=2, head_dim=12),
    GatedDeltaNetConfig(heads=2, value_heads=6, head_dim=8, expand_v=1.5, conv_width=3, allow_neg_eigval=True,
                        norm_eps=1e-2),
    GatedDeltaNetConfig(heads=3, head_dim=8, expand_v=1.0, conv_width=0, output_gate=False),
], ids=["paper", "grouped", "bare"])
def test_is_the_papers_layer(config):
  mixer = create(config)
  assert_close("output", call(mixer, inputs())[0], expected(mixer, config, inputs()), 1e-5)


def test_decay_and_beta_stay_float32():
  mixer = create(GatedDeltaNetConfig(heads=2, head_dim=8), dtype=jnp.bfloat16)
  for gate in jit(lambda mixer, x: (mixer._log_decay(x), mixer._beta(x)))(mixer, inputs(dtype=jnp.bfloat16)):
    assert_stays_float32(gate)


def test_decay_starts_as_published():
  count, levels = 10**5, np.linspace(0.01, 0.99, 9)
  rate = np.exp(np.asarray(log_rates(jax.random.key(0), (count,), jnp.float32), np.float64))
  step = np.log1p(np.exp(np.asarray(time_step_biases(jax.random.key(1), (count,), jnp.float32), np.float64)))
  assert 0 < rate.min() and rate.max() < 16.001 and 0.000999 < step.min() and step.max() < 0.1001
  np.testing.assert_allclose(np.quantile(rate, levels), 16 * levels, atol=0.1)
  np.testing.assert_allclose(np.quantile(np.log10(step), levels), -3 + 2 * levels, atol=0.015)


def test_layers_start_apart_and_only_matrices_decay():
  config = ModelConfig(mixer=GatedDeltaNetConfig(heads=2, head_dim=8), vocab_size=50, width=WIDTH, depth=2,
                       mlp_width=48, dtype="float32")
  optimizer = make_optimizer(OptimConfig(steps=10, warmup_steps=0, learning_rate=0.1, weight_decay=0.1))

  def start_and_update():
    params = nnx.state(LanguageModel(config, rngs=nnx.Rngs(0)))
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    return params["runs"][0][0]["mixer"], updates["runs"][0][0]["mixer"]

  before, after = jit(start_and_update)()
  for name in ("A_log", "dt_bias"):
    start, update = before[name][...], after[name][...]
    assert start.shape == (2, 2) and start.dtype == jnp.float32 and np.unique(start).size == 4
    assert (update == 0).all()
  for name in ("decay", "beta", "query"):
    np.testing.assert_allclose(after[name]["kernel"][...], -0.01 * before[name]["kernel"][...], rtol=1e-5)


@pytest.mark.parametrize("config, message", [
    (GatedDeltaNetConfig(heads=0), "heads=0: must be at least 1"),
    (GatedDeltaNetConfig(head_dim=0), "head_dim=0: must be at least 1"),
    (GatedDeltaNetConfig(value_heads=8), "value_heads=8: must be a multiple of heads=6, or 0"),
    (GatedDeltaNetConfig(value_heads=-6), "value_heads=-6: must be a multiple"),
    (GatedDeltaNetConfig(head_dim=8, expand_v=0.3), "expand_v=0.3: gives 2.4 channels for head_dim=8"),
    (GatedDeltaNetConfig(expand_v=0.0), "expand_v=0.0: gives 0.0 channels"),
    (GatedDeltaNetConfig(heads=2, head_dim=8, conv_width=1), "taps=1"),
], ids=str)
def test_bad_configs(config, message):
  with pytest.raises(ValueError, match=message):
    create(config)


def test_flops_per_token():
  # Queries and keys of 6 x 256; values, gates and outputs of 6 x 512; two scalars a head; three products with a state.
  mixer = jax.eval_shape(lambda: create(GatedDeltaNetConfig(), width=2048))
  projections = 2 * 2048 * (2 * 1536 + 3 * 3072 + 2 * 6)
  assert mixer.flops_per_token(4096) == projections + 2 * 4 * (2 * 1536 + 3072) + 6 * 6 * 256 * 512
  grouped = jax.eval_shape(lambda: create(GatedDeltaNetConfig(heads=3, value_heads=6, output_gate=False), width=2048))
  projections = 2 * 2048 * (2 * 768 + 2 * 3072 + 2 * 6)
  assert grouped.flops_per_token(4096) == projections + 2 * 4 * (2 * 768 + 3072) + 6 * 6 * 256 * 512
