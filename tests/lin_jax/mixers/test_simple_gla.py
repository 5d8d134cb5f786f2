"""Simple GLA against its recurrence, token by token in float64; its decay's precision, and its error messages."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lin_jax import mixers
from lin_jax.mixers.simple_gla import SimpleGLAConfig
from tests.close import assert_close, relative_error

WIDTH, BATCH, TIME, HEADS = 32, 2, 40, 2
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def create(config, width=WIDTH, dtype=jnp.float32):
  mixer = mixers.build(config, width=width, norm_eps=1e-6, dtype=dtype, rngs=nnx.Rngs(0))
  if mixer.decay:
    mixer.decay.bias[...] = jnp.linspace(-2.0, 1.0, config.heads)
  # Activations near 1, and a head norm whose scale is not all ones.
  mixer.norm.scale[...] = jnp.linspace(0.5, 1.5, mixer.norm.scale.size)
  return jax.tree.map(lambda x: 10 * x if x.ndim > 1 else x, mixer)


def inputs():
  return np.random.default_rng(0).standard_normal((BATCH, TIME, WIDTH)).astype(np.float32)


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def convolve(mixer, i, x):
  kernel = np.asarray(mixer.convolutions[i].kernel[...], np.float64)
  padded = np.pad(x, ((0, 0), (len(kernel) - 1, 0), (0, 0)))
  y = sum(tap * padded[:, j:j + TIME] for j, tap in enumerate(kernel))
  return y * sigmoid(y)


def token_decay(mixer, x, temperature):
  weight, bias = (np.asarray(a[...], np.float64) for a in (mixer.decay.kernel, mixer.decay.bias))
  return sigmoid(x @ weight + bias) ** (1 / temperature)


def recurrence(mixer, x, decay):
  """`decay` broadcasts to [B,T,H]."""
  weight = {name: np.asarray(getattr(mixer, name).kernel[...], np.float64)
            for name in ("query", "key", "value", "gate", "output")}
  qkv = [x @ weight[name] for name in ("query", "key", "value")]
  if mixer.convolutions:
    qkv = [convolve(mixer, i, a) for i, a in enumerate(qkv)]
  q, k, v = (a.reshape(BATCH, TIME, HEADS, -1) for a in qkv)
  decay = np.broadcast_to(decay, (BATCH, TIME, HEADS))
  memory, outputs = np.zeros((BATCH, HEADS, q.shape[-1], v.shape[-1])), []
  for t in range(TIME):
    memory = decay[:, t, :, None, None] * memory + k[:, t, :, :, None] * v[:, t, :, None, :]
    outputs.append(np.einsum("bhk,bhkv->bhv", q[:, t], memory) / np.sqrt(q.shape[-1]))
  o = np.stack(outputs, axis=1)
  o = o / np.sqrt(np.mean(o**2, axis=-1, keepdims=True) + 1e-6) * np.asarray(mixer.norm.scale[...], np.float64)
  gate = x @ weight["gate"]
  return (o.reshape(BATCH, TIME, -1) * gate * sigmoid(gate)) @ weight["output"]


@pytest.mark.parametrize("conv_width", [0, 4])
def test_is_the_scalar_gate_recurrence(conv_width):
  mixer = create(SimpleGLAConfig(heads=HEADS, conv_width=conv_width))
  actual, x = jit(lambda mixer, x: mixer(x)[0])(mixer, inputs()), inputs().astype(np.float64)
  assert_close("output", actual, recurrence(mixer, x, token_decay(mixer, x, 16.0)), 1e-5)
  # The bound tells this gate from a slightly stronger one.
  assert relative_error(actual, recurrence(mixer, x, token_decay(mixer, x, 15.0))) > 1e-3


@pytest.mark.parametrize("decay, factors", [("constant", [1 - 1 / 32, 1 - 1 / 64]), ("none", [1.0, 1.0])])
def test_other_rows_of_the_ablation(decay, factors):
  mixer = create(SimpleGLAConfig(heads=HEADS, decay=decay))
  x = inputs()
  expected = recurrence(mixer, x.astype(np.float64), np.array(factors))
  assert mixer.decay is None
  assert_close("parallel form", jit(lambda mixer, x: mixer(x)[0])(mixer, x), expected, 1e-5)

  @jit
  def steps(mixer, x):
    state = mixer.init_state(BATCH, TIME)
    return jax.lax.scan(lambda state, token: mixer.step(token, state)[::-1], state, jnp.moveaxis(x, 1, 0))[1]

  assert_close("steps", np.moveaxis(steps(mixer, x), 0, 1), expected, 1e-5)
  full = jax.eval_shape(lambda: create(SimpleGLAConfig(), width=1024)).flops_per_token(1)
  less = jax.eval_shape(lambda: create(SimpleGLAConfig(decay=decay), width=1024)).flops_per_token(1)
  assert full - less == 2 * 1024 * 4


def test_decay_stays_float32():
  mixer = create(SimpleGLAConfig(heads=HEADS), dtype=jnp.bfloat16)
  log_decay = mixer._log_decay(jnp.asarray(inputs(), jnp.bfloat16))
  assert log_decay.shape == (BATCH, TIME, HEADS) and log_decay.dtype == jnp.float32
  assert np.abs(log_decay - log_decay.astype(jnp.bfloat16).astype(jnp.float32)).max() > 0


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


def test_passes_its_implementation_on():
  mixer = create(SimpleGLAConfig(implementation="nonesuch"))
  with pytest.raises(ValueError, match="nonesuch"):
    mixer(jnp.ones((1, 3, WIDTH)))
