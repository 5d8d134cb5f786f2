"""Simple GLA against its recurrence, token by token in float64; its decay's precision, and its error messages."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lin_jax.mixers.simple_gla import SimpleGLAConfig
from tests.close import assert_close, relative_error
from tests.lin_jax.mixers.formulas import by_heads, convolve, rms_norm, sigmoid, silu, weights, wide
from tests.lin_jax.mixers.small import BATCH, assert_stays_float32, call, create, inputs, jit

HEADS, TIME = 2, 40


def uneven(config, dtype=jnp.float32):
  """A mixer whose heads decay differently, and whose head norm has a scale that is not all ones."""
  mixer = create(config, dtype=dtype)
  if mixer.decay:
    mixer.decay.bias[...] = jnp.linspace(-2.0, 1.0, config.heads)
  mixer.norm.scale[...] = jnp.linspace(0.5, 1.5, mixer.norm.scale.size)
  return mixer


def token_decay(mixer, x, temperature):
  return sigmoid(x @ wide(mixer.decay.kernel) + wide(mixer.decay.bias)) ** (1 / temperature)


def recurrence(mixer, x, decay):
  """`decay` broadcasts to [B,T,H]."""
  weight = weights(mixer, "query", "key", "value", "gate", "output")
  qkv = [x @ weight[name] for name in ("query", "key", "value")]
  if mixer.convolutions:
    qkv = [silu(convolve(a, conv.kernel)) for a, conv in zip(qkv, mixer.convolutions, strict=True)]
  q, k, v = (by_heads(a, HEADS) for a in qkv)
  decay = np.broadcast_to(decay, (BATCH, TIME, HEADS))
  memory, outputs = np.zeros((BATCH, HEADS, q.shape[-1], v.shape[-1])), []
  for t in range(TIME):
    memory = decay[:, t, :, None, None] * memory + k[:, t, :, :, None] * v[:, t, :, None, :]
    outputs.append(np.einsum("bhk,bhkv->bhv", q[:, t], memory) / np.sqrt(q.shape[-1]))
  o = rms_norm(np.stack(outputs, axis=1)) * wide(mixer.norm.scale)
  return (o.reshape(BATCH, TIME, -1) * silu(x @ weight["gate"])) @ weight["output"]


@pytest.mark.parametrize("conv_width", [0, 4])
def test_is_the_scalar_gate_recurrence(conv_width):
  mixer = uneven(SimpleGLAConfig(heads=HEADS, conv_width=conv_width))
  (actual, _), x = call(mixer, inputs(TIME)), wide(inputs(TIME))
  assert_close("output", actual, recurrence(mixer, x, token_decay(mixer, x, 16.0)), 1e-5)
  # The bound tells this gate from a slightly stronger one.
  assert relative_error(actual, recurrence(mixer, x, token_decay(mixer, x, 15.0))) > 1e-3


@pytest.mark.parametrize("decay, factors", [("constant", [1 - 1 / 32, 1 - 1 / 64]), ("none", [1.0, 1.0])])
def test_other_rows_of_the_ablation(decay, factors):
  mixer = uneven(SimpleGLAConfig(heads=HEADS, decay=decay, decays="consecutive"))
  x = inputs(TIME)
  expected = recurrence(mixer, wide(x), np.array(factors))
  assert mixer.decay is None
  assert_close("parallel form", call(mixer, x)[0], expected, 1e-5)

  @jit
  def steps(mixer, x):
    state = mixer.init_state(BATCH, TIME)
    return jax.lax.scan(lambda state, token: mixer.step(token, state)[::-1], state, jnp.moveaxis(x, 1, 0))[1]

  assert_close("steps", np.moveaxis(steps(mixer, x), 0, 1), expected, 1e-5)
  full = jax.eval_shape(lambda: create(SimpleGLAConfig(), width=1024)).flops_per_token(1)
  less = jax.eval_shape(lambda: create(SimpleGLAConfig(decay=decay), width=1024)).flops_per_token(1)
  assert full - less == 2 * 1024 * 4


def test_decay_stays_float32():
  mixer = uneven(SimpleGLAConfig(heads=HEADS), dtype=jnp.bfloat16)
  log_decay = mixer._log_decay(inputs(TIME, dtype=jnp.bfloat16))
  assert log_decay.shape == (BATCH, TIME, HEADS)
  assert_stays_float32(log_decay)


def test_flops_per_token():
  # As GLA, with H decays per token in place of a low-rank map to d / 2.
  mixer = jax.eval_shape(lambda: create(SimpleGLAConfig(), width=1024))
  assert mixer.flops_per_token(2048) == 2 * (4 * 1024**2 + 1024 * 4) + 4 * 4 * 128 * 256


@pytest.mark.parametrize("config, message", [
    (SimpleGLAConfig(heads=0), "heads=0: must be at least 1"),
    (SimpleGLAConfig(heads=3), "expand_k=0.5 of width 32 gives 16 channels: not divisible by heads=3"),
    (SimpleGLAConfig(expand_v=0.0), "expand_v=0.0 of width 32 gives 0 channels"),
    (SimpleGLAConfig(gate_temperature=0.0), "gate_temperature=0.0: must be positive"),
    (SimpleGLAConfig(decay="fixed"), "decay='fixed': must be one of token, constant, none"),
    (SimpleGLAConfig(conv_width=1), "taps=1"),
], ids=str)
def test_bad_configs(config, message):
  with pytest.raises(ValueError, match=message):
    create(config)
