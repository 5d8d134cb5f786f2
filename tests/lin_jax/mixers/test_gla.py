"""GLA against the paper's recurrence, token by token in float64; its decay's precision, and its error messages."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lin_jax.mixers.gla import GLAConfig, log_decays
from lin_jax.mixers.simple_gla import SimpleGLAConfig
from tests.close import assert_close
from tests.lin_jax.mixers.formulas import by_heads, rms_norm, sigmoid, silu, weights, wide
from tests.lin_jax.mixers.small import BATCH, TIME, assert_stays_float32, call, create, inputs, start


def test_is_the_papers_layer():
  config = GLAConfig(heads=2, gate_rank=4)
  mixer = create(config)
  x = wide(inputs())
  weight = weights(mixer, "query", "key", "value", "gate", "decay_in", "decay_out", "output")
  q, k, v = (by_heads(x @ weight[name], 2) for name in ("query", "key", "value"))
  logits = x @ weight["decay_in"] @ weight["decay_out"] + wide(mixer.decay_out.bias)
  decay = by_heads(sigmoid(logits) ** (1 / 16), 2)
  memory, outputs = np.zeros((BATCH, 2, 8, 16)), []
  for t in range(TIME):
    memory = decay[:, t, :, :, None] * memory + k[:, t, :, :, None] * v[:, t, :, None, :]
    outputs.append(np.einsum("bhk,bhkv->bhv", q[:, t], memory) / np.sqrt(8))
  o = rms_norm(np.stack(outputs, axis=1)).reshape(BATCH, TIME, -1)
  assert_close("output", call(mixer, inputs())[0], (o * silu(x @ weight["gate"])) @ weight["output"], 1e-5)


def test_the_decays_derivative_comes_from_the_decay():
  x = jnp.concatenate([jnp.linspace(-90.0, 90.0, 181), jnp.array([-1e30, -1e4, 1e4, 1e30])])
  plain = lambda x: jax.nn.log_sigmoid(x) / 16.0
  np.testing.assert_array_equal(log_decays(x, 16.0), plain(x))
  for derivative in (jax.grad, lambda f: jax.grad(jax.grad(f))):
    actual, expected = (jax.vmap(derivative(f))(x) for f in (lambda x: log_decays(x, 16.0), plain))
    # Up to 0.06. A decay near 1 is a difference from 1, so that its derivatives below 1e-7 lose relative precision.
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-7)
  kept = jax.tree.leaves(jax.eval_shape(lambda x: jax.vjp(lambda x: log_decays(x, 16.0), x)[1], x))
  assert [array.shape for array in kept if array.ndim] == [x.shape]


def test_gates_start_at_the_authors_time_constant_or_spread():
  zeros = jnp.zeros((1, 1, 32))
  times = lambda config: np.sort(-1 / start(config)._log_decay(zeros)[0, 0])
  np.testing.assert_allclose(times(GLAConfig(heads=2)), 16 / np.log(2), rtol=1e-6)
  spread = np.broadcast_to(np.geomspace(16, 1024, 8), (2, 8))
  np.testing.assert_allclose(times(GLAConfig(heads=2, longest_memory=1024.0)), spread, rtol=1e-4)
  per_head = start(SimpleGLAConfig(heads=2, longest_memory=1024.0))._log_decay(zeros)
  np.testing.assert_allclose(-1 / per_head[0, 0], [16, 1024], rtol=1e-4)


def test_decay_stays_float32():
  mixer = create(GLAConfig(heads=2, gate_rank=4), dtype=jnp.bfloat16)
  assert_stays_float32(mixer._log_decay(inputs(dtype=jnp.bfloat16)))


@pytest.mark.parametrize("config, message", [
    (GLAConfig(heads=3), "expand_k=0.5 of width 32 gives 16 channels: not divisible by heads=3"),
    (GLAConfig(expand_k=0.0), "expand_k=0.0"),
    (GLAConfig(heads=0), "heads=0: must be at least 1"),
    (GLAConfig(heads=2, gate_rank=0), "gate_rank=0: must be at least 1"),
    (GLAConfig(heads=2, gate_temperature=0.0), "gate_temperature=0.0: must be positive"),
    (GLAConfig(heads=2, longest_memory=16.0), "longest_memory=16.0: must be 0 or more than 16 tokens"),
    (GLAConfig(heads=2, conv_width=1), "taps=1"),
], ids=str)
def test_bad_configs(config, message):
  with pytest.raises(ValueError, match=message):
    create(config)


def test_flops_per_token():
  # 3 d^2 + 2 (d^2 / 2) weights, the low-rank gate, and a write and a read of 4 states of 128 x 256.
  gla = jax.eval_shape(lambda: create(GLAConfig(), width=1024))
  assert gla.flops_per_token(2048) == 2 * (4 * 1024**2 + 1024 * 16 + 16 * 512) + 4 * 4 * 128 * 256
