"""HGRN2 against the paper's recurrence in float64, its gates, and its error messages."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lin_jax import mixers
from lin_jax.mixers.hgrn2 import HGRN2Config
from tests.close import assert_close

WIDTH, BATCH, TIME, HEADS = 32, 2, 13, 4
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def create(config, width=WIDTH, dtype=jnp.float32):
  mixer = mixers.build(config, width=width, norm_eps=1e-3, dtype=dtype, rngs=nnx.Rngs(0))
  # Initial weights leave gates nearly flat, and a scale of ones would not show whether it is applied.
  mixer = jax.tree.map(lambda x: 10 * x if x.ndim > 1 else x, mixer)
  mixer.norm.scale[...] = jnp.linspace(0.5, 2, width)
  return mixer


def inputs():
  return jax.random.normal(jax.random.key(1), (BATCH, TIME, WIDTH))


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def convolve(x, kernel):
  taps = len(kernel)
  x = np.pad(x, ((0, 0), (taps - 1, 0), (0, 0)))
  return sum(kernel[i] * x[:, i:i + TIME] for i in range(taps))


@pytest.mark.parametrize("lower_bound, conv_width", [(0.0, 0), (0.3, 0), (0.9, 3)])
def test_is_the_papers_layer(lower_bound, conv_width):
  mixer = jit(lambda: create(HGRN2Config(heads=HEADS, lower_bound=lower_bound, conv_width=conv_width)))()
  weight = {name: np.asarray(getattr(mixer, name).kernel[...], np.float64)
            for name in ("query", "forget", "input", "output")}
  q, f, i = (np.asarray(inputs(), np.float64) @ weight[name] for name in ("query", "forget", "input"))
  if conv_width:
    q, f, i = (convolve(x, np.asarray(conv.kernel[...])) for x, conv in zip((q, f, i), mixer.convolutions, strict=True))
  q = q * sigmoid(q)
  f = lower_bound + (1 - lower_bound) * sigmoid(f)
  q, f, i = (x.reshape(BATCH, TIME, HEADS, -1) for x in (q, f, i))
  memory, outputs = np.zeros((BATCH, HEADS, 8, 8)), []
  for t in range(TIME):
    memory = f[:, t, :, :, None] * memory + (1 - f[:, t, :, :, None]) * i[:, t, :, None, :]
    outputs.append(np.einsum("bhk,bhkv->bhv", q[:, t], memory).reshape(BATCH, -1) / np.sqrt(8))
  o = np.stack(outputs, axis=1)
  o = o / np.sqrt(np.mean(o**2, axis=-1, keepdims=True) + 1e-3) * np.linspace(0.5, 2, WIDTH)
  actual, _ = jit(lambda mixer, x: mixer(x))(mixer, inputs())
  assert_close("output", actual, o @ weight["output"], 1e-5)


@pytest.mark.parametrize("lower_bound", [0.0, 0.3])
def test_gates_keep_their_precision_and_their_bound(lower_bound):
  mixer = jit(lambda: create(HGRN2Config(heads=HEADS, lower_bound=lower_bound)))()
  f = np.array([-60.0, -20.0, -1.0, 0.0, 1.0, 12.0, 30.0], np.float32)
  k, log_decay = mixer._gates(jnp.asarray(f))
  expected = (1 - lower_bound) * sigmoid(-f.astype(np.float64))
  np.testing.assert_allclose(k, expected, rtol=1e-6)
  # The log of lower_bound + (1 - lower_bound) sigmoid(f), written without cancellation on either side.
  odds = np.exp(-f.astype(np.float64))
  np.testing.assert_allclose(log_decay, np.log1p(lower_bound * odds) - np.log1p(odds), rtol=1e-6)
  gradient = jax.grad(lambda f: sum(a.sum() for a in mixer._gates(f)))(jnp.asarray(f))
  assert np.isfinite(gradient).all()


def test_gates_stay_float32():
  mixer = jit(lambda: create(HGRN2Config(heads=HEADS, conv_width=3), dtype=jnp.bfloat16))()
  q, k, v, log_decay, _ = mixer._project(inputs().astype(jnp.bfloat16), None, None)
  assert q.dtype == k.dtype == v.dtype == jnp.bfloat16 and log_decay.dtype == jnp.float32
  assert np.abs(log_decay - log_decay.astype(jnp.bfloat16).astype(jnp.float32)).max() > 0


@pytest.mark.parametrize("config, message", [
    (HGRN2Config(heads=0), "heads=0: must be at least 1"),
    (HGRN2Config(heads=5), "heads=5: must divide the width 32"),
    (HGRN2Config(heads=2, lower_bound=-0.1), "lower_bound=-0.1: must be at least 0 and less than 1"),
    (HGRN2Config(heads=2, lower_bound=1.0), "lower_bound=1.0: must be at least 0 and less than 1"),
    (HGRN2Config(heads=2, conv_width=1), "taps=1"),
], ids=str)
def test_bad_configs(config, message):
  with pytest.raises(ValueError, match=message):
    create(config)


def test_implementation_is_passed_on():
  with pytest.raises(ValueError, match="nonesuch"):
    create(HGRN2Config(implementation="nonesuch"))(inputs())


def test_flops_per_token():
  # Four square projections, a write and a read of 8 states of 128 x 128, and three convolutions of 4 taps.
  mixer = jax.eval_shape(lambda: create(HGRN2Config(conv_width=4), width=1024))
  assert mixer.flops_per_token(2048) == 8 * 1024**2 + 4 * 8 * 128 * 128 + 3 * 2 * 4 * 1024
