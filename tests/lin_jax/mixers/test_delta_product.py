"""Gated DeltaProduct against the paper's recurrence in numpy float64, and its relation to Gated DeltaNet."""

import jax
import numpy as np
import pytest
from flax import nnx

from lin_jax.mixers.delta_product import DeltaProductConfig
from lin_jax.mixers.gated_delta_net import GatedDeltaNetConfig
from tests.close import assert_close
from tests.lin_jax.mixers.formulas import by_heads, convolve, rms_norm, silu, unit, wide
from tests.lin_jax.mixers.small import BATCH, TIME, call, create, inputs, jit


def expected(mixer, config, x):
  x, H, n = np.asarray(x, np.float64), config.heads, config.householders
  qkv = [x @ wide(linear.kernel) for linear in (mixer.query, mixer.key, mixer.value)]
  if config.conv_width:
    qkv = [convolve(y, conv.kernel) for y, conv in zip(qkv, mixer.convolutions, strict=True)]
  q = unit(by_heads(silu(qkv[0]), H))
  k = unit(by_heads(silu(qkv[1]), H, n))
  v = by_heads(silu(qkv[2]), H, n)
  beta = (2 if config.allow_neg_eigval else 1) / (1 + np.exp(-x @ wide(mixer.beta.kernel)).reshape(BATCH, TIME, H, n))
  decay = np.ones((BATCH, TIME, H))
  if config.decay:
    dt = np.log1p(np.exp(x @ wide(mixer.decay.kernel) + wide(mixer.dt_bias)))
    decay = np.exp(-np.exp(wide(mixer.A_log)) * dt)
    assert decay.min() < 0.7 and decay.max() > 0.95  # neither all kept nor all forgotten
  o = np.zeros((BATCH, TIME, H, v.shape[-1]))
  for b, h in np.ndindex(BATCH, H):
    memory = np.zeros((k.shape[-1], v.shape[-1]))
    for t in range(TIME):
      memory = decay[b, t, h] * memory
      for j in range(n):
        key = k[b, t, h, j]
        memory = memory + beta[b, t, h, j] * np.outer(key, v[b, t, h, j] - key @ memory)
      o[b, t, h] = q[b, t, h] @ memory / np.sqrt(k.shape[-1])
  o = rms_norm(o).reshape(BATCH, TIME, -1)
  return (o * silu(x @ wide(mixer.gate.kernel)) if config.output_gate else o) @ wide(mixer.output.kernel)


@pytest.mark.parametrize("config", [
    DeltaProductConfig(heads=2, head_dim=12),
    DeltaProductConfig(heads=3, head_dim=8, expand_v=1.0, conv_width=0, householders=3, output_gate=False,
                       allow_neg_eigval=False),
    DeltaProductConfig(heads=2, head_dim=8, householders=3, conv_width=3, decay=False),
], ids=["two", "three", "plain"])
def test_is_the_papers_recurrence(config):
  mixer = create(config)
  assert_close("output", call(mixer, inputs())[0], expected(mixer, config, inputs()), 1e-5)


def test_one_step_a_token_is_gated_delta_net():
  shape = dict(heads=2, head_dim=8, allow_neg_eigval=True)
  product, net = (jit(lambda config=config: create(config))() for config in (
      DeltaProductConfig(householders=1, **shape), GatedDeltaNetConfig(**shape)))
  nnx.update(net, nnx.state(product))
  assert_close("output", call(product, inputs())[0], call(net, inputs())[0], 1e-6)


def test_flops_per_token():
  # Queries and keys of 8 x 64, values, gates and outputs of 8 x 128; two products with a state a step, one to read.
  config = DeltaProductConfig(heads=8, head_dim=64, expand_v=2.0, householders=3)
  mixer = jax.eval_shape(lambda: create(config, width=1024))
  projections = 2 * 1024 * (512 + 3 * 512 + 3 * 1024 + 2 * 1024 + 3 * 8 + 8)
  taps = 2 * 4 * (512 + 3 * 512 + 3 * 1024)
  assert mixer.flops_per_token(2048) == projections + taps + (2 * 2 * 3 + 2) * 8 * 64 * 128
  config.decay = False
  mixer = jax.eval_shape(lambda: create(config, width=1024))
  assert mixer.flops_per_token(2048) == projections - 2 * 1024 * 8 + taps + (2 * 2 * 3 + 2) * 8 * 64 * 128


@pytest.mark.parametrize("field, value", [("householders", 0), ("value_heads", 4)])
def test_wrong_fields_are_named(field, value):
  with pytest.raises(ValueError, match=f"{field}={value}: must be"):
    create(DeltaProductConfig(heads=2, head_dim=8, **{field: value}))
