"""The contract of every registered mixer, and each mixer against its formula."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lin_jax import mixers
from lin_jax.mixers.attention import AttentionConfig
from lin_jax.mixers.gla import GatedLinearAttention, GLAConfig
from tests.close import assert_close

WIDTH, BATCH, TIME = 32, 2, 13
# Compilation is most of the time here, optimised code none of it.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
EXAMPLES = [pytest.param(config, id=f"{name}{i}") for name in mixers.MIXERS
            for i, config in enumerate(mixers.config_class(name).examples())]


def create(config, width=WIDTH, dtype=jnp.float32):
  mixer = mixers.build(config, width=width, norm_eps=1e-6, dtype=dtype, rngs=nnx.Rngs(0))
  # At their initial scale the weights leave scores and gates nearly flat; activations near 1 exercise both.
  gain = 10 * (WIDTH / width) ** 0.5
  return jax.tree.map(lambda x: gain * x if x.ndim > 1 else x, mixer)


def inputs(time=TIME, batch=BATCH, width=WIDTH):
  return jax.random.normal(jax.random.key(1), (batch, time, width))


call = jit(lambda mixer, x, state=None, segment_ids=None: mixer(x, state, segment_ids))
step = jit(lambda mixer, x, state: mixer.step(x, state))


def steps(mixer, x, state):
  outputs = []
  for t in range(x.shape[1]):
    y, state = step(mixer, x[:, t], state)
    outputs.append(y)
  return jnp.stack(outputs, axis=1), state


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


def test_gla_is_the_papers_layer():
  config = GLAConfig(heads=2, gate_rank=4)
  mixer = create(config)
  x = np.asarray(inputs())
  weight = {name: np.asarray(getattr(mixer, name).kernel[...], np.float64)
            for name in ("query", "key", "value", "gate", "decay_in", "decay_out", "output")}

  def heads(y):
    return y.reshape(BATCH, TIME, 2, -1)

  q, k, v = (heads(x @ weight[name]) for name in ("query", "key", "value"))
  logits = x @ weight["decay_in"] @ weight["decay_out"] + np.asarray(mixer.decay_out.bias[...])
  decay = heads((1 / (1 + np.exp(-logits))) ** (1 / 16))
  memory, outputs = np.zeros((BATCH, 2, 8, 16)), []
  for t in range(TIME):
    memory = decay[:, t, :, :, None] * memory + k[:, t, :, :, None] * v[:, t, :, None, :]
    outputs.append(np.einsum("bhk,bhkv->bhv", q[:, t], memory) / np.sqrt(8))
  o = np.stack(outputs, axis=1)
  o = (o / np.sqrt(np.mean(o**2, axis=-1, keepdims=True) + 1e-6)).reshape(BATCH, TIME, -1)
  gate = x @ weight["gate"]
  assert_close("output", call(mixer, x)[0], (o * gate / (1 + np.exp(-gate))) @ weight["output"], 1e-5)


def test_gla_decay_stays_float32():
  mixer = create(GLAConfig(heads=2, gate_rank=4), dtype=jnp.bfloat16)
  log_decay = mixer._log_decay(inputs().astype(jnp.bfloat16))
  assert log_decay.dtype == jnp.float32
  assert np.abs(log_decay - log_decay.astype(jnp.bfloat16).astype(jnp.float32)).max() > 0


@pytest.mark.parametrize("kv_heads, window", [(4, 0), (2, 0), (1, 5), (4, 1)])
def test_attention_is_masked_softmax(kv_heads, window):
  mixer = create(AttentionConfig(heads=4, kv_heads=kv_heads, window=window))
  x = inputs()
  q, k, v = mixer._project(x, jnp.broadcast_to(jnp.arange(TIME), (BATCH, TIME)))
  k, v = (jnp.repeat(a, 4 // kv_heads, axis=2) for a in (k, v))
  distance = np.arange(TIME)[:, None] - np.arange(TIME)[None]
  visible = (distance >= 0) & (distance < (window or TIME))
  scores = np.where(visible, np.einsum("bthk,bshk->bhts", q, k) / np.sqrt(8), -np.inf)
  weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
  o = np.einsum("bhts,bshk->bthk", weights / weights.sum(axis=-1, keepdims=True), v).reshape(BATCH, TIME, -1)
  assert_close("output", call(mixer, x)[0], o @ np.asarray(mixer.output.kernel[...]), 1e-5)


def test_ring_cache_holds_only_the_window():
  mixer = create(AttentionConfig(heads=4, window=5))
  state = mixer.init_state(BATCH, 1000)
  assert state["key"].shape == (BATCH, 5, 4, 8)
  x = inputs(40)
  prefill, state = call(mixer, x[:, :17], state)
  rest, state = steps(mixer, x[:, 17:], state)
  assert_close("output", jnp.concatenate([prefill, rest], axis=1), call(mixer, x)[0], 1e-5)
  assert sorted(state["position"][0].tolist()) == [35, 36, 37, 38, 39]


@pytest.mark.parametrize("window", [0, 100])
def test_prompt_longer_than_the_cache(window):
  mixer = create(AttentionConfig(heads=4, window=window))
  with pytest.raises(ValueError, match="13 tokens do not fit a cache of max_length=12"):
    mixer(inputs(), mixer.init_state(BATCH, 12), None)


@pytest.mark.parametrize("config, message", [
    (GLAConfig(heads=3), "expand_k=0.5 of width 32 gives 16 channels: not divisible by heads=3"),
    (GLAConfig(expand_k=0.0), "expand_k=0.0"),
    (GLAConfig(heads=0), "heads=0: must be at least 1"),
    (GLAConfig(heads=2, gate_rank=0), "gate_rank=0: must be at least 1"),
    (GLAConfig(heads=2, gate_temperature=0.0), "gate_temperature=0.0: must be positive"),
    (GLAConfig(heads=2, conv_width=1), "taps=1"),
    (AttentionConfig(heads=0), "heads=0: must be at least 1"),
    (AttentionConfig(heads=4, kv_heads=-2), "kv_heads=-2: must not be negative"),
    (AttentionConfig(heads=4, window=-1), "window=-1: must not be negative"),
    (AttentionConfig(heads=4, rope_base=0.0), "rope_base=0.0: must be positive"),
    (AttentionConfig(heads=5), "heads=5"),
    (AttentionConfig(heads=4, kv_heads=3), "kv_heads=3 must divide heads=4"),
    ("gla", "'gla' is not a mixer config"),
], ids=str)
def test_bad_configs(config, message):
  with pytest.raises(ValueError, match=message):
    mixers.build(config, width=WIDTH, norm_eps=1e-6, dtype=jnp.float32, rngs=nnx.Rngs(0))


def test_gla_passes_its_implementation_on():
  with pytest.raises(ValueError, match="nonesuch"):
    create(GLAConfig(implementation="nonesuch"))(inputs(), None, None)


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


def test_flops_per_token():
  # 3 d^2 + 2 (d^2 / 2) weights, the low-rank gate, and a write and a read of 4 states of 128 x 256.
  gla = jax.eval_shape(lambda: create(GLAConfig(), width=1024))
  assert gla.flops_per_token(2048) == 2 * (4 * 1024**2 + 1024 * 16 + 16 * 512) + 4 * 4 * 128 * 256
  attention = jax.eval_shape(lambda: create(AttentionConfig(), width=1024))
  assert attention.flops_per_token(3) == 2 * 4 * 1024**2 + 4 * 1024 * 2
  window = jax.eval_shape(lambda: create(AttentionConfig(window=2, kv_heads=4), width=1024))
  assert window.flops_per_token(4) == 2 * (2 * 1024**2 + 2 * 1024 * 256) + 4 * 1024 * 7 / 4


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("config", [AttentionConfig(heads=4), AttentionConfig(heads=4, kv_heads=2, window=64)], ids=str)
def test_cudnn_equals_xla(config, packed):
  x = inputs(256, width=256).astype(jnp.bfloat16)
  segment_ids = jnp.repeat(jnp.array([1, 2]), np.array([100, 156]), total_repeat_length=256)[None].repeat(2, axis=0)

  def run(dtype):
    mixer = create(config, width=256, dtype=dtype)

    def loss(x):
      return jnp.square(mixer(x, None, segment_ids if packed else None)[0].astype(jnp.float32)).sum()

    with jax.default_matmul_precision("highest"):
      return jax.jit(jax.value_and_grad(loss)).lower(x.astype(dtype))

  flash, plain = run(jnp.bfloat16), run(jnp.float32)
  assert "fmha" in flash.as_text() and "fmha" not in plain.as_text()
  actual, expected = flash.compile()(x), plain.compile()(x.astype(jnp.float32))
  assert_close("loss", actual[0], expected[0], 1e-2)
  assert_close("dx", actual[1].astype(jnp.float32), expected[1], 3e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("prompt", [96, 97])
def test_gpu_prefill_then_steps(prompt):
  mixer = create(AttentionConfig(heads=4, window=64), width=256, dtype=jnp.bfloat16)
  x = inputs(128, width=256).astype(jnp.bfloat16)
  first, state = call(mixer, x[:, :prompt], mixer.init_state(BATCH, 128))
  y = jnp.concatenate([first, steps(mixer, x[:, prompt:], state)[0]], axis=1)
  assert_close("output", y.astype(jnp.float32), call(mixer, x)[0].astype(jnp.float32), 2e-2)

