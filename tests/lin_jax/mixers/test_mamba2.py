"""Mamba-2 against the published layer in float64, its shared heads on several devices, and its error messages."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lin_jax import sharding
from lin_jax.config import MeshConfig
from lin_jax.mixers.mamba2 import Mamba2Config
from tests.close import assert_close, assert_uniform
from tests.lin_jax.mixers.formulas import by_heads, convolve, rms_norm, silu, wide
from tests.lin_jax.mixers.small import BATCH, TIME, WIDTH, assert_stays_float32, call, create, inputs, jit, start

HEADS, STATE = 4, 6


def small(groups=1):
  return Mamba2Config(heads=HEADS, groups=groups, state_size=STATE)


@functools.cache
def build(groups=1, dtype=jnp.float32):
  """A mixer away from its start: decays well below one that differ by head, and skips and scales that are not one."""

  def uneven():
    mixer = create(small(groups), dtype=dtype, norm_eps=1e-3)
    mixer.dt_bias[...] = jnp.linspace(-3, 0, HEADS)
    mixer.A_log[...] = jnp.linspace(-1, 0.5, HEADS)
    mixer.D[...] = jnp.linspace(-2, 3, HEADS)
    mixer.norm_scale[...] = jnp.linspace(0.5, 2, mixer.norm_scale.shape[0])
    return mixer

  return jit(uneven)()


@pytest.mark.parametrize("groups", [1, 2])
def test_is_the_published_layer(groups):
  mixer = build(groups)
  inner, shared = 2 * WIDTH, groups * STATE
  in_proj = np.concatenate([wide(getattr(mixer, name).kernel) for name in ("gate", "value", "key", "query", "dt")], 1)
  kernel, bias = (np.concatenate([wide(getattr(conv, name)) for conv in mixer.convolutions], axis=-1)
                  for name in ("kernel", "bias"))
  z, xBC, dt = np.split(np.asarray(inputs(), np.float64) @ in_proj, [inner, 2 * inner + 2 * shared], axis=-1)
  xBC = silu(bias + convolve(xBC, kernel))
  x, B, C = np.split(xBC, [inner, inner + shared], axis=-1)
  x = by_heads(x, HEADS)
  B, C = (by_heads(a, groups).repeat(HEADS // groups, axis=2) for a in (B, C))
  dt = np.log1p(np.exp(dt + wide(mixer.dt_bias)))
  decay = np.exp(-np.exp(wide(mixer.A_log)) * dt)
  memory, outputs = np.zeros((BATCH, HEADS, inner // HEADS, STATE)), []
  for t in range(TIME):
    write = np.einsum("bh,bhn,bhp->bhpn", dt[:, t], B[:, t], x[:, t])
    memory = decay[:, t, :, None, None] * memory + write
    outputs.append(np.einsum("bhpn,bhn->bhp", memory, C[:, t]) + wide(mixer.D)[:, None] * x[:, t])
  y = by_heads(np.stack(outputs, axis=1).reshape(BATCH, TIME, inner) * silu(z), groups)
  y = rms_norm(y, 1e-3).reshape(BATCH, TIME, inner)
  assert_close("output", call(mixer, inputs())[0], y * wide(mixer.norm_scale) @ wide(mixer.output.kernel), 1e-5)


@pytest.mark.parametrize("groups, devices", [(1, 2), (2, 4)])
def test_fewer_groups_than_devices_equal_one_device(groups, devices):
  mixer, x = build(groups), inputs()
  loss = jit(jax.value_and_grad(lambda mixer, x: jnp.sin(mixer(x)[0]).sum()))
  expected = loss(mixer, x)
  mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=1, tensor=devices), jax.devices()[:devices])
  with jax.set_mesh(mesh):
    leaves = jax.tree_util.tree_leaves_with_path(
        loss(jax.device_put(mixer, sharding.param_shardings(mixer, mesh)), x))
  for (path, leaf), other in zip(leaves, jax.tree.leaves(expected), strict=True):
    assert_close(jax.tree_util.keystr(path), leaf, other, 1e-5)


def test_heads_that_the_devices_do_not_divide():
  mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=1, tensor=8), jax.devices()[:8])
  with jax.set_mesh(mesh), pytest.raises(ValueError, match="4 heads: not divisible by the mesh axis tensor=8"):
    jax.eval_shape(lambda: create(small(groups=2))(inputs()))


def test_decays_stay_float32():
  mixer = build(dtype=jnp.bfloat16)
  for a in mixer.project(inputs(dtype=jnp.bfloat16), None, None)[0][3:]:
    assert_stays_float32(a)


def test_parameters_start_in_the_published_ranges():
  mixer = start(Mamba2Config(heads=512, state_size=8), width=256)
  for name, values, low, high in (("A", np.exp(mixer.A_log[...]), 1, 16),
                                  ("log dt", np.log(jax.nn.softplus(mixer.dt_bias[...])), np.log(1e-3), np.log(1e-1)),
                                  ("bias", np.asarray(mixer.convolutions[0].bias[...]), -0.5, 0.5)):
    assert_uniform(name, values, low, high)
  assert (mixer.D[...] == 1).all() and (mixer.norm_scale[...] == 1).all()


@pytest.mark.parametrize("config, message", [
    (Mamba2Config(heads=0), "heads=0: must be at least 1"),
    (Mamba2Config(heads=4, groups=0), "groups=0: must be at least 1"),
    (Mamba2Config(heads=4, groups=3), "groups=3: must divide heads=4"),
    (Mamba2Config(heads=4, state_size=0), "state_size=0: must be at least 1"),
    (Mamba2Config(heads=6), "expand=2.0 of width 32 gives 64 channels: not divisible by heads=6"),
    (Mamba2Config(heads=4, expand=0.0), "expand=0.0 of width 32 gives 0 channels"),
    (Mamba2Config(heads=4, conv_width=0), "taps=0"),
], ids=str)
def test_bad_configs(config, message):
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(lambda: create(config))


def test_size_of_the_published_layer():
  mixer = jax.eval_shape(lambda: create(Mamba2Config(), width=1024))
  # In and out projections, the convolution and its bias, the norm's scale, and A_log, dt_bias and D.
  projections, channels = 1024 * (2 * 2048 + 2 * 128 + 32) + 2048 * 1024, 2048 + 2 * 128
  assert sum(leaf.size for leaf in jax.tree.leaves(mixer)) == projections + 5 * channels + 2048 + 3 * 32
  assert mixer.flops_per_token(2048) == 2 * projections + 2 * 4 * channels + 4 * 32 * 128 * 64
