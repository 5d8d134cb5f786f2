"""Softmax attention against its formula, its cache, its error messages, and cuDNN's kernels on a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lin_jax.mixers.attention import AttentionConfig
from tests.close import assert_close
from tests.lin_jax.mixers.formulas import by_heads, rms_norm, sigmoid, wide
from tests.lin_jax.mixers.small import BATCH, TIME, call, create, inputs, steps


@pytest.mark.parametrize("kv_heads, window", [(4, 0), (2, 0), (1, 5), (4, 1)])
def test_is_masked_softmax(kv_heads, window):
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


def expected(mixer, config, x):
  """The layer in float64, without a window."""
  x = np.asarray(x, np.float64)
  q, k, v = (x @ wide(linear.kernel) for linear in (mixer.query, mixer.key, mixer.value))
  if config.qk_norm == "heads":
    q, k = normed(q, mixer.query_norm, config), normed(k, mixer.key_norm, config)
  head_dim = v.shape[-1] // (config.kv_heads or config.heads)
  q, k, v = (by_heads(a, a.shape[-1] // head_dim) for a in (q, k, v))
  if config.qk_norm == "head":
    q, k = normed(q, mixer.query_norm, config), normed(k, mixer.key_norm, config)
  if config.rope_base:
    q, k = (rotated(a, config) for a in (q, k))
  k, v = (np.repeat(a, config.heads // a.shape[2], axis=2) for a in (k, v))
  weights = np.exp(np.einsum("bthk,bshk->bhts", q, k) / np.sqrt(head_dim)) * np.tri(TIME)
  o = np.einsum("bhts,bshk->bthk", weights / weights.sum(axis=-1, keepdims=True), v).reshape(BATCH, TIME, -1)
  return (o * sigmoid(x @ wide(mixer.gate.kernel)) if config.output_gate else o) @ wide(mixer.output.kernel)


def normed(x, norm, config):
  return rms_norm(x) * (config.qk_norm_offset + wide(norm.scale))


def rotated(x, config):
  """The pairs (i, i + n/2) of the first n channels as complex numbers, turned by their angles."""
  half = round(x.shape[-1] * config.rope_fraction) // 2
  angle = np.arange(TIME)[:, None, None] * config.rope_base ** (-np.arange(half) / half)
  pairs = (x[..., :half] + 1j * x[..., half:2 * half]) * np.exp(1j * angle)
  return np.concatenate([pairs.real, pairs.imag, x[..., 2 * half:]], axis=-1)


@pytest.mark.parametrize("config", [
    AttentionConfig(heads=2, kv_heads=1, head_dim=24, rope_fraction=0.25, qk_norm="head", qk_norm_offset=True,
                    output_gate=True),
    AttentionConfig(heads=4, kv_heads=2, rope_base=0.0, qk_norm="heads"),
], ids=["Qwen3.5", "Olmo Hybrid"])
def test_is_the_released_layer(config):
  mixer = create(config)
  for i, norm in enumerate((mixer.query_norm, mixer.key_norm)):
    scale = norm.scale[...]
    norm.scale = norm.scale.replace(scale + 0.3 * jax.random.normal(jax.random.key(i), scale.shape))
  assert_close("output", call(mixer, inputs())[0], expected(mixer, config, inputs()), 1e-5)


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
    (AttentionConfig(heads=0), "heads=0: must be at least 1"),
    (AttentionConfig(heads=4, kv_heads=-2), "kv_heads=-2: must not be negative"),
    (AttentionConfig(heads=4, window=-1), "window=-1: must not be negative"),
    (AttentionConfig(heads=4, rope_base=-1.0), "rope_base=-1.0: must not be negative"),
    (AttentionConfig(heads=5), "heads=5 must divide the width 32, unless head_dim is given"),
    (AttentionConfig(heads=4, head_dim=-8), "head_dim=-8: must not be negative"),
    (AttentionConfig(heads=4, head_dim=7), "rope_fraction=1.0 of 7 channels gives 7 to rotate: must be an even"),
    (AttentionConfig(heads=4, rope_fraction=0.3), "rope_fraction=0.3 of 8 channels gives 2.4 to rotate"),
    (AttentionConfig(heads=4, rope_fraction=0.0), "rope_fraction=0.0: must lie above 0 and not above 1"),
    (AttentionConfig(heads=4, qk_norm="layer"), "qk_norm='layer': must be one of none, head, heads"),
    (AttentionConfig(heads=4, qk_norm_offset=True), "qk_norm_offset=True: needs a qk_norm"),
    (AttentionConfig(heads=4, kv_heads=3), "kv_heads=3 must divide heads=4"),
], ids=str)
def test_bad_configs(config, message):
  with pytest.raises(ValueError, match=message):
    create(config)


def test_flops_per_token():
  attention = jax.eval_shape(lambda: create(AttentionConfig(), width=1024))
  assert attention.flops_per_token(3) == 2 * 4 * 1024**2 + 4 * 1024 * 2
  window = jax.eval_shape(lambda: create(AttentionConfig(window=2, kv_heads=4), width=1024))
  assert window.flops_per_token(4) == 2 * (2 * 1024**2 + 2 * 1024 * 256) + 4 * 1024 * 7 / 4
  config = AttentionConfig(heads=8, kv_heads=2, head_dim=256, output_gate=True)
  gated = jax.eval_shape(lambda: create(config, width=1024))
  assert gated.flops_per_token(3) == 2 * 1024 * (3 * 2048 + 2 * 512) + 4 * 2048 * 2


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("config", [
    AttentionConfig(heads=4), AttentionConfig(heads=4, kv_heads=2, window=64),
    AttentionConfig(heads=2, kv_heads=1, head_dim=256, rope_fraction=0.25, qk_norm="head", output_gate=True)], ids=str)
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
