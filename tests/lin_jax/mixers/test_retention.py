"""Multi-scale retention against the paper's recurrence, token by token in float64, and its error messages."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lin_jax import mixers
from lin_jax.mixers.retention import RetentionConfig
from tests.close import assert_close, relative_error

WIDTH, BATCH, TIME, HEADS = 32, 2, 40, 2
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def create(config, width=WIDTH):
  mixer = mixers.build(config, width=width, norm_eps=1e-6, dtype=jnp.float32, rngs=nnx.Rngs(0))
  # Activations near 1, and a head norm whose scale is not all ones.
  return jax.tree.map(lambda x: 10 * x if x.ndim > 1 else x * jnp.linspace(0.5, 1.5, x.size), mixer)


def recurrence(mixer, x, decay, base=10000.0):
  """The paper's layer: each pair of q and k is a complex number that turns with its position."""
  weight = {name: np.asarray(getattr(mixer, name).kernel[...], np.float64)
            for name in ("query", "key", "value", "gate", "output")}
  q, k, v = ((x @ weight[name]).reshape(BATCH, TIME, HEADS, -1) for name in ("query", "key", "value"))
  half = q.shape[-1] // 2
  turn = np.exp(1j * np.arange(TIME)[:, None] * base ** (-np.arange(half) / half))[None, :, None]
  q, k = ((a[..., :half] + 1j * a[..., half:]) * turn for a in (q, k))
  memory, outputs = np.zeros((BATCH, HEADS, half, v.shape[-1]), complex), []
  for t in range(TIME):
    memory = decay[:, None, None] * memory + k[:, t, :, :, None].conj() * v[:, t, :, None, :]
    outputs.append(np.einsum("bhk,bhkv->bhv", q[:, t], memory).real / np.sqrt(2 * half))
  o = np.stack(outputs, axis=1)
  o = o / np.sqrt(np.mean(o**2, axis=-1, keepdims=True) + 1e-6) * np.asarray(mixer.norm.scale[...], np.float64)
  gate = x @ weight["gate"]
  return (o.reshape(BATCH, TIME, -1) * gate / (1 + np.exp(-gate))) @ weight["output"]


def test_is_the_papers_layer():
  mixer = create(RetentionConfig(heads=HEADS))
  x = np.random.default_rng(0).standard_normal((BATCH, TIME, WIDTH))
  actual = jit(lambda mixer, x: mixer(x)[0])(mixer, jnp.asarray(x, jnp.float32))
  decay = np.array([1 - 1 / 32, 1 - 1 / 64])
  assert_close("output", actual, recurrence(mixer, x, decay), 1e-5)
  # The bound tells this layer from its neighbours: swapped decays, and another rotary base.
  assert relative_error(actual, recurrence(mixer, x, decay[::-1])) > 1e-3
  assert relative_error(actual, recurrence(mixer, x, decay, base=1000.0)) > 1e-3


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
    (RetentionConfig(rope_base=0.0), "rope_base=0.0: must be positive"),
    (RetentionConfig(conv_width=1), "taps=1"),
], ids=str)
def test_bad_configs(config, message):
  with pytest.raises(ValueError, match=message):
    create(config)


def test_passes_its_implementation_on():
  mixer = create(RetentionConfig(implementation="nonesuch"))
  with pytest.raises(ValueError, match="nonesuch"):
    mixer(jnp.ones((1, 3, WIDTH)))
