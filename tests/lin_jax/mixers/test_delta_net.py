"""DeltaNet against the paper's formulas, token by token in numpy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lin_jax.mixers.delta_net import DeltaNetConfig
from tests.close import assert_close
from tests.lin_jax.mixers.formulas import by_heads, convolve, rms_norm, sigmoid, silu, unit, weights, wide
from tests.lin_jax.mixers.small import BATCH, TIME, WIDTH, assert_stays_float32, call, create, inputs, jit

ACTIVATIONS = {"silu": silu, "relu": lambda x: np.maximum(x, 0), "identity": lambda x: x,
               "elu1": lambda x: np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))}
NORMS = {"l2": unit, "l1": lambda x: x / (np.abs(x).sum(axis=-1, keepdims=True) + 1e-6)}


def expected(mixer, config, x):
  weight = weights(mixer, "query", "key", "value", "beta", "output")
  x = np.asarray(x, np.float64)
  qkv = [x @ weight[name] for name in ("query", "key", "value")]
  if config.conv_width:
    qkv = [convolve(y, conv.kernel) for y, conv in zip(qkv, mixer.convolutions, strict=True)]
  q, k, v = (by_heads(y, config.heads) for y in qkv)
  q, k = (NORMS[config.qk_norm](ACTIVATIONS[config.qk_activation](y)) for y in (q, k))
  v = silu(v)
  beta = sigmoid(x @ weight["beta"]) * (2 if config.allow_neg_eigval else 1)
  memory, outputs = np.zeros((BATCH, config.heads, k.shape[-1], v.shape[-1])), []
  for t in range(TIME):
    write, key = beta[:, t, :, None, None], k[:, t, :, :, None]
    transition = np.eye(k.shape[-1]) - write * key * np.swapaxes(key, -1, -2)
    memory = transition @ memory + write * key * v[:, t, :, None, :]
    outputs.append(np.einsum("bhk,bhkv->bhv", q[:, t], memory) / np.sqrt(k.shape[-1]))
  o = np.stack(outputs, axis=1)
  o = rms_norm(o).reshape(BATCH, TIME, -1)
  if config.output_gate:
    o = o * silu(x @ wide(mixer.gate.kernel))
  return o @ weight["output"]


@pytest.mark.parametrize("config", [
    DeltaNetConfig(heads=2),
    DeltaNetConfig(heads=4, expand_k=0.5, conv_width=3, qk_activation="relu", output_gate=True),
    DeltaNetConfig(heads=2, expand_v=0.5, qk_activation="elu1", qk_norm="l1", allow_neg_eigval=True),
    DeltaNetConfig(heads=4, conv_width=0, qk_activation="identity", allow_neg_eigval=True),
    DeltaNetConfig(heads=2, conv_width=0, qk_activation="identity", qk_norm="l1"),
], ids=lambda config: f"{config.qk_activation}-{config.qk_norm}")
def test_is_the_papers_layer(config):
  mixer = create(config)
  assert_close("output", call(mixer, inputs())[0], expected(mixer, config, inputs()), 1e-5)


def test_beta_stays_float32_and_doubles():
  x = inputs(dtype=jnp.bfloat16)
  beta, doubled = (create(DeltaNetConfig(heads=2, allow_neg_eigval=double), dtype=jnp.bfloat16)._beta(x)
                   for double in (False, True))
  assert_stays_float32(beta)
  assert 0 < beta.min() and beta.max() < 1
  np.testing.assert_array_equal(doubled, 2 * beta)


def test_keys_that_relu_zeroes_give_zeros():
  mixer = create(DeltaNetConfig(heads=2, conv_width=0, qk_activation="relu", qk_norm="l1"))
  mixer.query.kernel[...] = jnp.zeros((WIDTH, WIDTH))

  def loss(mixer, x):
    y, _ = mixer(x, None, None)
    return jnp.square(y - 1).sum(), y

  gradients, y = jit(jax.grad(loss, has_aux=True))(mixer, inputs())
  assert (y == 0).all()
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize("config, message", [
    (DeltaNetConfig(heads=0), "heads=0: must be at least 1"),
    (DeltaNetConfig(heads=3), "expand_k=1.0 of width 32 gives 32 channels: not divisible by heads=3"),
    (DeltaNetConfig(expand_v=0.0), "expand_v=0.0 of width 32 gives 0 channels"),
    (DeltaNetConfig(qk_activation="elu"), "qk_activation='elu': must be one of silu, relu, elu1, identity"),
    (DeltaNetConfig(qk_norm="sum"), "qk_norm='sum': must be one of l2, l1"),
    (DeltaNetConfig(conv_width=1), "taps=1"),
], ids=str)
def test_bad_configs(config, message):
  with pytest.raises(ValueError, match=message):
    create(config)


def test_flops_per_token():
  # 4 d^2 weights, beta, three convolutions, and two reads and a write of 8 states of 128 x 128.
  mixer = jax.eval_shape(lambda: create(DeltaNetConfig(), width=1024))
  expected = 2 * (4 * 1024**2 + 1024 * 8 + 3 * 4 * 1024) + 6 * 8 * 128 * 128
  assert mixer.flops_per_token(2048) == expected
  gated = jax.eval_shape(lambda: create(DeltaNetConfig(output_gate=True), width=1024))
  assert gated.flops_per_token(2048) == expected + 2 * 1024**2
