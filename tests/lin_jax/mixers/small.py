"""A small mixer of any config, its inputs, its calls, and checks of arrays that mixers have in common."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lin_jax import mixers

WIDTH, BATCH, TIME = 32, 2, 13
# Compilation is most of the time here, optimised code none of it.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
call = jit(lambda mixer, x, state=None, segment_ids=None: mixer(x, state, segment_ids))
step = jit(lambda mixer, x, state: mixer.step(x, state))


def start(config, width=WIDTH, dtype=jnp.float32, norm_eps=1e-6):
  """A mixer with the parameters that training starts from."""
  return mixers.build(config, width=width, norm_eps=norm_eps, dtype=dtype, rngs=nnx.Rngs(0))


def create(config, width=WIDTH, dtype=jnp.float32, norm_eps=1e-6):
  """A mixer with larger matrices: at their start, activations leave scores, gates and beta nearly flat."""
  gain = 10 * (WIDTH / width) ** 0.5
  return jax.tree.map(lambda x: gain * x if x.ndim > 1 else x, start(config, width, dtype, norm_eps))


def inputs(time=TIME, batch=BATCH, width=WIDTH, dtype=jnp.float32):
  return jax.random.normal(jax.random.key(1), (batch, time, width)).astype(dtype)


def steps(mixer, x, state):
  """The outputs of one step after another, and the last state."""
  outputs = []
  for t in range(x.shape[1]):
    y, state = step(mixer, x[:, t], state)
    outputs.append(y)
  return jnp.stack(outputs, axis=1), state


def assert_stays_float32(array):
  """Fails for an array of another type, and for one whose values bfloat16 could hold."""
  assert array.dtype == jnp.float32
  assert np.abs(array - array.astype(jnp.bfloat16).astype(jnp.float32)).max() > 0
