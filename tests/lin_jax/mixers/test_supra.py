"""The layer of SUPRA against the paper's formulas in float64, and its error messages."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lin_jax.mixers.attention import AttentionConfig
from lin_jax.mixers.supra import SupraConfig
from lin_jax.optim import matrices
from tests.close import assert_close, relative_error
from tests.lin_jax.mixers.formulas import by_heads, weights, wide
from tests.lin_jax.mixers.small import BATCH, call, create, inputs, start

HEADS, GROUPS, TIME = 4, 2, 40
GROUPED = SupraConfig(heads=HEADS, kv_heads=GROUPS)


def formula(mixer, x, slopes, base=10000.0, mean=True):
  """Equation 10, which sums over the tokens before each one. Pairs of channels turn as complex numbers."""
  weight = weights(mixer, "query", "key", "value", "output")
  q = by_heads(x @ weight["query"], HEADS)
  k, v = (np.repeat(by_heads(x @ weight[name], GROUPS), HEADS // GROUPS, axis=2) for name in ("key", "value"))
  maps = np.repeat(wide(mixer.feature_map.kernel), HEADS // GROUPS, axis=0)
  biases = np.repeat(wide(mixer.feature_map.bias).reshape(GROUPS, -1), HEADS // GROUPS, axis=0)
  q, k = (np.maximum(np.einsum("bthk,hkf->bthf", a, maps) + biases, 0) for a in (q, k))
  half = q.shape[-1] // 2
  turn = np.exp(1j * np.arange(TIME)[:, None] * base ** (-np.arange(half) / half))[None, :, None]
  q, k = ((a[..., :half] + 1j * a[..., half:]) * turn for a in (q, k))
  similarity = np.einsum("bthk,bshk->bhts", q, k.conj()).real / np.sqrt(2 * half)
  distance = np.arange(TIME)[:, None] - np.arange(TIME)[None]
  decay = np.where(distance >= 0, np.exp(-slopes[:, None, None] * np.maximum(distance, 0)), 0)
  o = np.einsum("bhts,bshv->bthv", similarity * decay, v)
  o = o - o.mean(axis=-1, keepdims=True) * mean
  return (o / np.sqrt((o**2).mean(axis=-1, keepdims=True) + 1e-5)).reshape(BATCH, TIME, -1) @ weight["output"]


def test_is_the_papers_layer():
  mixer, x = create(GROUPED), wide(inputs(TIME))
  actual, _ = call(mixer, inputs(TIME))
  slopes = np.array([2**-2, 2**-4, 2**-6, 2**-8])
  assert_close("output", actual, formula(mixer, x, slopes), 1e-5)
  # The slowest head remembers as little after 2048 tokens as the paper says.
  assert np.exp(-slopes[-1] * 2048) == pytest.approx(3.35e-4, rel=2e-3)
  # The bound tells this layer from its neighbours: swapped decays, another rotary base, no mean taken away.
  for other in (formula(mixer, x, slopes[::-1]), formula(mixer, x, slopes, base=1000.0),
                formula(mixer, x, slopes, mean=False)):
    assert relative_error(actual, other) > 1e-3


def test_the_projections_are_those_of_attention_and_the_rest_is_the_feature_map():
  shapes = [{jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(
      jax.eval_shape(lambda config=config: create(config)))}
            for config in (AttentionConfig(heads=HEADS, kv_heads=GROUPS), GROUPED)]
  attention, supra = shapes
  assert attention.items() <= supra.items()
  assert {name: shape for name, shape in supra.items() if name not in attention} == {
      ".feature_map.kernel.value": (GROUPS, 8, 8), ".feature_map.bias.value": (GROUPS * 8,)}


def test_the_feature_map_starts_as_the_authors_and_its_bias_does_not_decay():
  feature_map = start(SupraConfig(heads=1), width=64).feature_map
  for values in (feature_map.kernel[...], feature_map.bias[...]):
    assert 0.11 < np.abs(values).max() <= 1 / 8 and values.std() == pytest.approx(0.125 / 3**0.5, rel=0.15)
  decays = matrices(feature_map)
  assert (decays.kernel, decays.bias) == (True, False)


def test_state_does_not_grow_and_flops():
  mixer = jax.eval_shape(lambda: create(SupraConfig(heads=8, kv_heads=2), width=512))
  assert jax.tree.map(jnp.shape, mixer.init_state(BATCH, 10**6)) == {"memory": (BATCH, 8, 64, 64), "length": (BATCH,)}
  # 4 d^2 for queries and outputs and d^2 for keys and values, ten feature maps, a write and a read of 8 states.
  assert mixer.flops_per_token(2048) == 5 * 512**2 + 2 * 10 * 64**2 + 4 * 8 * 64**2


@pytest.mark.parametrize("config, message", [
    (SupraConfig(heads=0), "heads=0: must be at least 1"),
    (SupraConfig(heads=3), "heads=3: must divide the width 32 into an even number of channels"),
    (SupraConfig(heads=32), "heads=32: must divide the width 32 into an even number of channels"),
    (SupraConfig(heads=4, kv_heads=-1), "kv_heads=-1: must not be negative"),
    (SupraConfig(heads=4, kv_heads=3), "kv_heads=3: must divide heads=4"),
    (SupraConfig(rope_base=0.0), "rope_base=0.0: must be positive"),
], ids=str)
def test_bad_configs(config, message):
  with pytest.raises(ValueError, match=message):
    create(config)
