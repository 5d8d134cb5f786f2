"""Linear attention against the papers' formulas in float64: sums over all earlier tokens, and its error messages."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lin_jax.mixers.linear_attention import FEATURE_MAPS, LinearAttentionConfig
from tests.close import assert_close, relative_error
from tests.lin_jax.mixers.formulas import by_heads, rms_norm, weights, wide
from tests.lin_jax.mixers.small import BATCH, WIDTH, call, create, inputs, jit

HEADS, TIME = 2, 40
MAPS = {"identity": lambda x: x, "elu1": lambda x: np.where(x > 0, x + 1, np.exp(x)),
        "relu": lambda x: np.maximum(x, 0)}


def scaled(config):
  """A mixer whose head norm has a scale that is not all ones."""
  return jax.tree.map(lambda x: x if x.ndim > 1 else x * jnp.linspace(0.5, 1.5, x.size), create(config))


def formula(mixer, x, phi, normalizer, head_norm):
  """Each output from the weights of all tokens up to it, as the papers write it before the recurrence."""
  weight = weights(mixer, "query", "key", "value", "output")
  q, k, v = (by_heads(x @ weight[name], HEADS) for name in ("query", "key", "value"))
  q, k, outputs = phi(q), phi(k), []
  for t in range(TIME):
    scores = np.einsum("bhk,bshk->bhs", q[:, t], k[:, :t + 1]) / np.sqrt(q.shape[-1])
    if normalizer:
      scores /= scores.sum(axis=-1, keepdims=True) + 1e-10
    outputs.append(np.einsum("bhs,bshv->bhv", scores, v[:, :t + 1]))
  o = np.stack(outputs, axis=1)
  if head_norm:
    o = rms_norm(o) * wide(mixer.norm.scale)
  return o.reshape(BATCH, TIME, -1) @ weight["output"]


@pytest.mark.parametrize("feature_map, normalizer, head_norm", [
    ("identity", False, True), ("identity", False, False), ("elu1", True, False), ("relu", True, False),
    ("elu1", False, True)])
def test_is_the_papers_layer(feature_map, normalizer, head_norm):
  config = LinearAttentionConfig(heads=HEADS, feature_map=feature_map, normalizer=normalizer, head_norm=head_norm)
  mixer, x = scaled(config), wide(inputs(TIME))
  actual, _ = call(mixer, inputs(TIME))
  assert_close("output", actual, formula(mixer, x, MAPS[feature_map], normalizer, head_norm), 1e-5)
  # The bound tells this layer from those with another feature map.
  for name in MAPS.keys() - {feature_map}:
    assert relative_error(actual, formula(mixer, x, MAPS[name], normalizer, head_norm)) > 1e-2


def test_normalised_weights_average_the_values():
  config = LinearAttentionConfig(heads=HEADS, feature_map="elu1", normalizer=True, head_norm=False)
  mixer, x = create(config), inputs(1)
  assert_close("first output", call(mixer, x)[0], mixer.output(mixer.value(x)), 1e-5)


def test_relu_may_see_no_key():
  """Where every product of query and keys is 0 the output is 0, and so are the gradients: neither is 0 / 0."""
  mixer = create(LinearAttentionConfig(heads=HEADS, feature_map="relu", normalizer=True, head_norm=False))
  mixer.key.kernel[...] = jnp.zeros((WIDTH, WIDTH))
  y, gradient = jit(jax.value_and_grad(lambda x: mixer(x)[0].sum()))(jnp.ones((1, 3, WIDTH)))
  assert y == 0 and not gradient.any()


def test_elu1_keeps_small_values_in_bfloat16():
  x = jnp.array([-8.0, -1.0, 0.0, 2.0], jnp.bfloat16)
  assert_close("elu1", FEATURE_MAPS["elu1"](x).astype(jnp.float32), np.array([np.exp(-8), np.exp(-1), 1, 3]), 4e-3)
  assert FEATURE_MAPS["elu1"](x)[0] > 0 and jax.nn.elu(x)[0] + 1 == 0
  assert jax.vmap(jax.grad(FEATURE_MAPS["elu1"]))(jnp.array([-200.0, 0.0, 200.0])).tolist() == [0, 1, 1]


def test_state_does_not_grow():
  def shapes(**options):
    mixer = jax.eval_shape(lambda: create(LinearAttentionConfig(heads=HEADS, feature_map="relu", **options)))
    return jax.tree.map(jnp.shape, mixer.init_state(BATCH, 10**6))

  assert shapes() == {"memory": (BATCH, HEADS, 16, 16)}
  assert shapes(normalizer=True) == {"memory": (BATCH, HEADS, 16, 16), "normalizer": (BATCH, HEADS, 16, 1)}


@pytest.mark.parametrize("normalizer", [False, True])
def test_flops_per_token(normalizer):
  # 4 d^2 weights, and a write and a read of 4 states of 256 x 256; the normaliser is one more value channel.
  config = LinearAttentionConfig(feature_map="relu", normalizer=normalizer)
  mixer = jax.eval_shape(lambda: create(config, width=1024))
  assert mixer.flops_per_token(2048) == 2 * 4 * 1024**2 + 4 * 4 * 256 * (256 + normalizer)


@pytest.mark.parametrize("config, message", [
    (LinearAttentionConfig(heads=0), "heads=0: must be at least 1"),
    (LinearAttentionConfig(heads=3), "expand_k=1.0 of width 32 gives 32 channels: not divisible by heads=3"),
    (LinearAttentionConfig(expand_v=0.0), "expand_v=0.0 of width 32 gives 0 channels"),
    (LinearAttentionConfig(feature_map="softmax"), "feature_map='softmax': must be one of identity, elu1, relu"),
    (LinearAttentionConfig(normalizer=True), "normalizer=True: needs a feature_map without negative .*'identity'"),
], ids=str)
def test_bad_configs(config, message):
  with pytest.raises(ValueError, match=message):
    create(config)
