"""The contract of every registered mixer, and the registry."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lin_jax import mixers
from lin_jax.mixers.gla import GatedLinearAttention
from tests.close import assert_close
from tests.lin_jax.mixers.small import BATCH, TIME, call, create, inputs, jit, start, step, steps

EXAMPLES = [pytest.param(config, id=f"{name}{i}") for name in mixers.MIXERS
            for i, config in enumerate(mixers.config_class(name).examples())]


@pytest.fixture(params=EXAMPLES, scope="module")
def mixer(request):
  return create(request.param)


def test_steps_equal_parallel(mixer):
  x = inputs()
  y, none = call(mixer, x)
  assert none is None
  assert_close("steps", steps(mixer, x, mixer.init_state(BATCH, 2 * TIME))[0], y, 1e-5)


@pytest.mark.parametrize("prompt", [1, 6])
def test_prefill_then_steps_equal_parallel(mixer, prompt):
  x = inputs()
  empty = mixer.init_state(BATCH, 2 * TIME)
  first, state = call(mixer, x[:, :prompt], empty)
  assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, empty)
  assert jax.tree.map(jnp.result_type, state) == jax.tree.map(jnp.result_type, empty)
  rest, _ = steps(mixer, x[:, prompt:], state)
  assert_close("output", jnp.concatenate([first, rest], axis=1), call(mixer, x)[0], 1e-5)


def test_pieces_equal_whole(mixer):
  x, state, outputs = inputs(), mixer.init_state(BATCH, 2 * TIME), []
  for piece in (x[:, :6], x[:, 6:7], x[:, 7:]):
    y, state = call(mixer, piece, state)
    outputs.append(y)
  assert_close("output", jnp.concatenate(outputs, axis=1), call(mixer, x)[0], 1e-5)


@jit
def pullback(mixer, x, dy):
  """Gradients of the sum of dy * y."""
  return jax.vjp(lambda mixer, x: mixer(x, None, None)[0], mixer, x)[1](dy)


def test_causal(mixer):
  x = inputs()
  for t in (0, 5, TIME - 1):
    _, dx = pullback(mixer, x, np.zeros(x.shape, np.float32) + (np.arange(TIME) == t)[None, :, None])
    dx = np.abs(dx).max(axis=(0, 2))
    assert (dx[t + 1:] == 0).all() and dx[t] > 0


def test_segments_equal_separate_calls(mixer):
  x, bounds = inputs(), (0, 6, 7, TIME)
  # The first id comes back in the last segment: it is another document all the same.
  segment_ids = jnp.repeat(jnp.array([3, 8, 3]), np.diff(bounds), total_repeat_length=TIME)[None].repeat(BATCH, axis=0)
  # What comes later changes nothing, so that one shape serves every segment.
  alone = [call(mixer, np.roll(x, -a, axis=1))[0][:, :b - a] for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
  assert_close("output", call(mixer, x, None, segment_ids)[0], jnp.concatenate(alone, axis=1), 1e-5)


def test_first_segment_continues_the_state_and_last_one_leaves_its_own(mixer):
  x, past = inputs(12), inputs(6)
  _, state = call(mixer, past, mixer.init_state(BATCH, 2 * TIME))
  segment_ids = jnp.repeat(jnp.array([1, 2]), np.array([6, 6]), total_repeat_length=12)[None]
  segment_ids = segment_ids.repeat(BATCH, axis=0)
  y, after = call(mixer, x, state, segment_ids)
  first, _ = call(mixer, x[:, :6], state)
  second, alone = call(mixer, x[:, 6:], mixer.init_state(BATCH, 2 * TIME))
  assert_close("output", y, jnp.concatenate([first, second], axis=1), 1e-5)
  assert_close("next step", step(mixer, past[:, 0], after)[0], step(mixer, past[:, 0], alone)[0], 1e-5)


@pytest.mark.parametrize("config", EXAMPLES)
def test_bfloat16_is_close_to_float32(config):
  low, high = create(config, dtype=jnp.bfloat16), create(config)
  x = inputs().astype(jnp.bfloat16)
  y, _ = call(low, x)
  assert y.dtype == jnp.bfloat16
  assert_close("output", y.astype(jnp.float32), call(high, x.astype(jnp.float32))[0], 3e-2)


def test_gradients_are_finite_and_reach_every_parameter(mixer):
  # Of the sum of squares.
  gradients, _ = pullback(mixer, inputs(), 2 * call(mixer, inputs())[0])
  for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
    assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0, jax.tree_util.keystr(path)


@pytest.mark.parametrize("config", EXAMPLES)
def test_the_op_gets_the_named_implementation(config):
  if not hasattr(config, "implementation"):
    assert mixers.name_of(config) == "attention"  # it calls no op of `kernels`
    return
  named = dataclasses.replace(config, implementation="nonesuch")
  with pytest.raises(ValueError, match="implementation='nonesuch' is unknown"):
    jax.eval_shape(lambda: start(named)(inputs()))


def test_registry():
  for name in mixers.MIXERS:
    assert mixers.name_of(mixers.config_class(name)()) == name
  with pytest.raises(ValueError, match="unknown mixer 'nonesuch'.*gla"):
    mixers.config_class("nonesuch")
  with pytest.raises(ValueError, match="'gla' is registered twice"):
    mixers.register("gla")(GatedLinearAttention)
  with pytest.raises(ValueError, match="Config must be a dataclass"):
    mixers.register("incomplete")(type("Incomplete", (nnx.Module,), {}))
  assert "incomplete" not in mixers.MIXERS


def test_a_config_of_no_mixer():
  with pytest.raises(ValueError, match="'gla' is not a mixer config"):
    start("gla")
