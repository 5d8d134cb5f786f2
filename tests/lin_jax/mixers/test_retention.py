"""Multi-scale retention against the paper's recurrence, token by token in float64, and its error messages."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lin_jax.mixers.retention import RetentionConfig, constant_log_decay
from tests.close import assert_close, relative_error
from tests.lin_jax.mixers.formulas import by_heads, rms_norm, silu, weights, wide
from tests.lin_jax.mixers.small import BATCH, call, create, inputs

HEADS, TIME = 2, 40


def recurrence(mixer, x, decay, base=10000.0):
  """The paper's layer: each pair of q and k is a complex number that turns with its position."""
  weight = weights(mixer, "query", "key", "value", "gate", "output")
  q, k, v = (by_heads(x @ weight[name], HEADS) for name in ("query", "key", "value"))
  half = q.shape[-1] // 2
  turn = np.exp(1j * np.arange(TIME)[:, None] * base ** (-np.arange(half) / half))[None, :, None]
  q, k = ((a[..., :half] + 1j * a[..., half:]) * turn for a in (q, k))
  memory, outputs = np.zeros((BATCH, HEADS, half, v.shape[-1]), complex), []
  for t in range(TIME):
    memory = decay[:, None, None] * memory + k[:, t, :, :, None].conj() * v[:, t, :, None, :]
    outputs.append(np.einsum("bhk,bhkv->bhv", q[:, t], memory).real / np.sqrt(2 * half))
  o = rms_norm(np.stack(outputs, axis=1)) * wide(mixer.norm.scale)
  return (o.reshape(BATCH, TIME, -1) * silu(x @ weight["gate"])) @ weight["output"]


def test_is_the_papers_layer():
  mixer, x = create(RetentionConfig(heads=HEADS, decays="consecutive")), wide(inputs(TIME))
  mixer.norm.scale[...] = jnp.linspace(0.5, 1.5, mixer.norm.scale.size)
  actual, _ = call(mixer, inputs(TIME))
  decay = np.array([1 - 1 / 32, 1 - 1 / 64])
  assert_close("output", actual, recurrence(mixer, x, decay), 1e-5)
  # The bound tells this layer from its neighbours: swapped decays, and another rotary base.
  assert relative_error(actual, recurrence(mixer, x, decay[::-1])) > 1e-3
  assert relative_error(actual, recurrence(mixer, x, decay, base=1000.0)) > 1e-3


def test_few_heads_keep_the_slow_decays():
  rates = lambda heads, decays: (-1 / np.expm1(np.float64(constant_log_decay(heads, decays)))).round(2).tolist()
  assert rates(2, "spread") == [32, 256] and rates(2, "consecutive") == [32, 64] and rates(1, "spread") == [32]
  for heads in (4, 6, 8):  # as in the papers
    assert rates(heads, "spread") == rates(heads, "consecutive") == [2.0 ** (5 + h) for h in range(heads)]


def test_decays_are_constants():
  mixer = jax.eval_shape(lambda: create(RetentionConfig(heads=HEADS)))
  leaves = jax.tree_util.tree_leaves_with_path(mixer, is_leaf=lambda x: isinstance(x, nnx.Param))
  names = {path[0].name for path, _ in leaves}
  assert names == {"query", "key", "value", "gate", "norm", "output"}


def test_state_does_not_grow():
  mixer = jax.eval_shape(lambda: create(RetentionConfig(heads=HEADS)))
  state = mixer.init_state(BATCH, 10**6)
  assert jax.tree.map(jnp.shape, state) == {"memory": (BATCH, HEADS, 16, 32), "inputs": [], "length": (BATCH,)}


def test_flops_per_token():
  # 2 d^2 for q and k, 6 d^2 for values, gate and output, and a write and a read of 4 states of 256 x 512.
  mixer = jax.eval_shape(lambda: create(RetentionConfig(), width=1024))
  assert mixer.flops_per_token(2048) == 2 * 8 * 1024**2 + 4 * 4 * 256 * 512


@pytest.mark.parametrize("config, message", [
    (RetentionConfig(heads=0), "heads=0: must be at least 1"),
    (RetentionConfig(heads=3), "expand_k=1.0 of width 32 gives 32 channels: not divisible by heads=3"),
    (RetentionConfig(heads=4, expand_v=0.0), "expand_v=0.0 of width 32 gives 0 channels"),
    (RetentionConfig(heads=32), r"expand_k=1.0 of width 32 gives heads=32 an odd number of channels \(1\)"),
    (RetentionConfig(decays="slow"), "decays='slow': must be one of spread, consecutive"),
    (RetentionConfig(rope_base=0.0), "rope_base=0.0: must be positive"),
    (RetentionConfig(conv_width=1), "taps=1"),
], ids=str)
def test_bad_configs(config, message):
  with pytest.raises(ValueError, match=message):
    create(config)
