"""Mamba against the published layer in float64, its channels on several devices, its start, and its error messages."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lin_jax import optim, sharding
from lin_jax.config import MeshConfig
from lin_jax.mixers.mamba import MambaConfig, skip_and_gate
from lin_jax.model import products
from tests.close import assert_close, assert_uniform
from tests.lin_jax.mixers.formulas import convolve, silu, wide
from tests.lin_jax.mixers.small import BATCH, TIME, WIDTH, assert_stays_float32, call, inputs, jit, start

STATE, RANK = 3, 5
SMALL = MambaConfig(state_size=STATE, dt_rank=RANK)


@functools.cache
def build(dtype=jnp.float32):
  """A mixer away from its start: decays well below one that differ by channel and state, and skips that are not one."""

  def uneven():
    mixer = jax.tree.map(lambda x: 4 * x if x.ndim > 1 else x, start(SMALL, dtype=dtype))
    mixer.dt_bias[...] = jnp.linspace(-3, 0, 2 * WIDTH)
    mixer.A_log[...] = jnp.linspace(-1, 0.5, 2 * WIDTH * STATE)
    mixer.skip[...] = jnp.linspace(-2, 3, 2 * WIDTH)
    return mixer

  return jit(uneven)()


def test_is_the_published_layer():
  """In the parameters of the paper's code: one input projection, x_proj for dt, B and C in this order."""
  mixer, D = build(), 2 * WIDTH
  in_proj = np.concatenate([wide(mixer.value.kernel), wide(mixer.gate.kernel)], axis=1)
  x_proj = np.concatenate([wide(getattr(mixer, name).kernel) for name in ("rank", "key", "query")], axis=1)
  x, z = np.split(np.asarray(inputs(), np.float64) @ in_proj, [D], axis=-1)
  x = silu(wide(mixer.convolution.bias) + convolve(x, mixer.convolution.kernel))
  dt, B, C = np.split(x @ x_proj, [RANK, RANK + STATE], axis=-1)
  dt = np.log1p(np.exp(dt @ wide(mixer.dt.kernel) + wide(mixer.dt_bias)))
  A = -np.exp(wide(mixer.A_log).reshape(D, STATE))
  memory, outputs = np.zeros((BATCH, D, STATE)), []
  for t in range(TIME):
    memory = np.exp(dt[:, t, :, None] * A) * memory + (dt[:, t] * x[:, t])[:, :, None] * B[:, t, None]
    outputs.append(np.einsum("bdn,bn->bd", memory, C[:, t]) + wide(mixer.skip) * x[:, t])
  y = np.stack(outputs, axis=1) * silu(z)
  assert_close("output", call(mixer, inputs())[0], y @ wide(mixer.output.kernel), 1e-5)


def test_channels_on_two_devices_equal_one():
  mixer, x = build(), inputs()
  loss = jit(jax.value_and_grad(lambda mixer, x: jnp.sin(mixer(x)[0]).sum()))
  expected = loss(mixer, x)
  mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=1, tensor=2), jax.devices()[:2])
  with jax.set_mesh(mesh):
    placed = jax.device_put(mixer, sharding.param_shardings(mixer, mesh))
    assert placed.A_log[...].sharding.shard_shape(placed.A_log.shape) == (WIDTH * STATE,)
    leaves = jax.tree_util.tree_leaves_with_path(loss(placed, x))
  for (path, leaf), other in zip(leaves, jax.tree.leaves(expected), strict=True):
    assert_close(jax.tree_util.keystr(path), leaf, other, 1e-5)


def test_step_sizes_stay_float32():
  dt = build(jnp.bfloat16)._projected(jnp.ones((BATCH, TIME, 2 * WIDTH), jnp.bfloat16))[0]
  assert_stays_float32(dt)


def test_remat_computes_no_time_step_twice():
  loss = jax.checkpoint(lambda mixer: jnp.sin(mixer(inputs())[0]).sum(), policy=products)
  assert str(jax.make_jaxpr(jax.grad(loss))(build())).count(" log1p ") == 1


@pytest.mark.parametrize("dtype, bound", [("bfloat16", 5e-3), ("float32", 1e-6)])
def test_skip_and_gate_are_their_formula(dtype, bound):
  arrays = [jnp.asarray(2 * x, dtype) for x in np.random.default_rng(0).standard_normal((4, BATCH, TIME, WIDTH))]
  skip = jnp.linspace(-2, 3, WIDTH)

  def results(fn, *arrays):
    *inputs, dy = arrays
    y, pull = jax.vjp(fn, *inputs, skip)
    return y, *pull(dy)

  formula = lambda y, v, gate, skip: (y + skip[None, None] * v) * jax.nn.silu(gate)
  found, expected = results(skip_and_gate, *arrays), results(formula, *(x.astype(jnp.float32) for x in arrays))
  for name, x, wanted in zip(("output", "dy", "dv", "dgate", "dskip"), found, expected, strict=True):
    assert x.dtype == (jnp.float32 if name == "dskip" else dtype)
    assert_close(name, x.astype(jnp.float32), wanted, bound)


def test_parameters_start_in_the_published_ranges():
  mixer = start(MambaConfig(), width=256)
  for name, values, low, high in (("log dt", np.log(jax.nn.softplus(mixer.dt_bias[...])), np.log(1e-3), np.log(1e-1)),
                                  ("dt", np.asarray(mixer.dt.kernel[...]).ravel(), -0.25, 0.25),
                                  ("bias", np.asarray(mixer.convolution.bias[...]), -0.5, 0.5)):
    assert_uniform(name, values, low, high)
  assert_close("A", mixer._rates(), np.broadcast_to(-np.arange(1, 17), (512, 16)), 1e-6)
  assert (mixer.skip[...] == 1).all()


def test_rates_are_free_of_weight_decay():
  decayed = optim.matrices(jax.eval_shape(lambda: start(SMALL)))
  assert not decayed.A_log and not decayed.skip and not decayed.dt_bias and decayed.dt.kernel


@pytest.mark.parametrize("config, message", [
    (MambaConfig(state_size=0), "state_size=0: must be at least 1"),
    (MambaConfig(dt_rank=-1), "dt_rank=-1: must not be negative"),
    (MambaConfig(expand=0.0), "expand=0.0: of width 32 gives 0 channels"),
    (MambaConfig(conv_width=1), "taps=1"),
], ids=str)
def test_bad_configs(config, message):
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(lambda: start(config))


def test_channels_that_the_devices_do_not_divide():
  mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=1, tensor=4), jax.devices()[:4])
  with jax.set_mesh(mesh), pytest.raises(ValueError, match="54 heads: not divisible by the mesh axis tensor=4"):
    jax.eval_shape(lambda: start(MambaConfig(expand=1.5), width=36)(jnp.zeros((2, TIME, 36))))


def test_size_of_the_published_layer():
  mixer = jax.eval_shape(lambda: start(MambaConfig(), width=1024))
  # In and out projections, x_proj and dt_proj, the convolution and its bias, dt_bias, A and D.
  projections = 1024 * 4096 + 2048 * 1024 + 2048 * (64 + 32) + 64 * 2048
  assert sum(leaf.size for leaf in jax.tree.leaves(mixer)) == projections + 2048 * (5 + 1 + 16 + 1)
  assert mixer.flops_per_token(2048) == 2 * projections + 2 * 4 * 2048 + 4 * 16 * 2048
