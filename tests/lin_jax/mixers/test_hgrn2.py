"""HGRN2 against the paper's recurrence in float64, its gates and bounds, alone and in a model, and its errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lin_jax.config import ModelConfig
from lin_jax.mixers.attention import AttentionConfig
from lin_jax.mixers.hgrn2 import HGRN2Config, gates, lower_bounds
from lin_jax.model import LanguageModel, parameter_count
from tests.close import assert_close
from tests.lin_jax.mixers.formulas import by_heads, convolve, rms_norm, sigmoid, silu, weights
from tests.lin_jax.mixers.small import BATCH, TIME, WIDTH, assert_stays_float32, call, create, inputs, jit

HEADS = 4


def uneven(config, dtype=jnp.float32):
  """A mixer whose norm has a scale that shows where it is applied, and whose bounds differ by channel."""
  mixer = create(config, dtype=dtype, norm_eps=1e-3)
  mixer.norm.scale[...] = jnp.linspace(0.5, 2, WIDTH)
  if mixer.bound_logits is not None:
    mixer.bound_logits[...] = jnp.linspace(-3, 3, WIDTH)
  return mixer


@pytest.mark.parametrize("learned, placed, conv_width", [(False, False, 0), (True, False, 3), (True, True, 0)])
def test_is_the_papers_layer(learned, placed, conv_width):
  mixer = uneven(HGRN2Config(heads=HEADS, learned_bound=learned, conv_width=conv_width))
  # By itself the layer is the second of two, of which the first has logits of zero.
  lower_bound = sigmoid(np.linspace(-3, 3, WIDTH)) if learned else np.zeros(WIDTH)
  if placed:
    lower_bound = np.linspace(0, 0.95, WIDTH)
    mixer.lower_bound = jnp.asarray(lower_bound, jnp.float32)
  weight = weights(mixer, "query", "forget", "input", "output")
  q, f, i = (np.asarray(inputs(), np.float64) @ weight[name] for name in ("query", "forget", "input"))
  if conv_width:
    q, f, i = (convolve(x, conv.kernel) for x, conv in zip((q, f, i), mixer.convolutions, strict=True))
  q = silu(q)
  f = lower_bound + (1 - lower_bound) * sigmoid(f)
  q, f, i = (by_heads(x, HEADS) for x in (q, f, i))
  memory, outputs = np.zeros((BATCH, HEADS, 8, 8)), []
  for t in range(TIME):
    memory = f[:, t, :, :, None] * memory + (1 - f[:, t, :, :, None]) * i[:, t, :, None, :]
    outputs.append(np.einsum("bhk,bhkv->bhv", q[:, t], memory).reshape(BATCH, -1) / np.sqrt(8))
  o = rms_norm(np.stack(outputs, axis=1), 1e-3) * np.linspace(0.5, 2, WIDTH)
  assert_close("output", call(mixer, inputs())[0], o @ weight["output"], 1e-5)


@pytest.mark.parametrize("bound", [None, 0.0, 1e-9, 0.3, 0.5, 0.9, 0.999])
def test_gates_keep_their_precision_and_their_bound(bound):
  f = jnp.array([-60.0, -20.0, -1.0, 0.0, 1.0, 12.0, 30.0])
  given = None if bound is None else jnp.full(f.shape, bound)
  k, log_decay = gates(f, given)
  bound = 0.0 if bound is None else np.float64(given[0])
  odds = np.exp(-np.asarray(f, np.float64))
  closed = (1 - bound) * odds / (1 + odds)
  np.testing.assert_allclose(k, closed, rtol=1e-6)
  # Each logarithm is exact in its half.
  expected = np.where(closed < 0.5, np.log1p(-np.minimum(closed, 0.5)), np.log(bound + (1 - bound) / (1 + odds)))
  np.testing.assert_allclose(log_decay, expected, rtol=1e-6)
  total = lambda f, bound: sum(a.sum() for a in gates(f, bound))
  gradients = jax.grad(total, argnums=0 if given is None else (0, 1))(f, given)
  assert all(np.isfinite(gradient).all() for gradient in jax.tree.leaves(gradients))


def test_bounds_are_partial_sums_of_a_softmax_over_layers():
  logits = 3 * np.asarray(jax.random.normal(jax.random.key(2), (5, 7)), np.float64)
  share = np.exp(logits) / np.exp(logits).sum(axis=0, keepdims=True)
  expected = np.stack([share[1:layer + 1].sum(axis=0) for layer in range(5)])
  np.testing.assert_allclose(lower_bounds(jnp.asarray(logits, jnp.float32)), expected, rtol=1e-5)
  np.testing.assert_allclose(lower_bounds(jnp.zeros((4, 2)))[:, 0], np.arange(4) / 4, rtol=1e-6)


def tokens():
  return jax.random.randint(jax.random.key(3), (BATCH, TIME), 0, 50)


def model(mixer=None, **fields):
  config = ModelConfig(**dict(mixer=mixer or HGRN2Config(heads=HEADS), vocab_size=50, width=WIDTH, depth=3,
                              mlp_width=48, dtype="float32") | fields)
  lm = LanguageModel(config, rngs=nnx.Rngs(0))
  for i, blocks in enumerate(blocks for run in lm.runs for blocks in run):
    if getattr(blocks.mixer, "bound_logits", None) is not None:
      logits = blocks.mixer.bound_logits
      logits[...] = 2 * jax.random.normal(jax.random.key(i), logits.shape)
  return config, lm


@pytest.mark.parametrize("hybrid, depth, layers", [
    ((), 3, [[0, 1, 2]]), ((2,), 5, [[0, 1], [3, 4]]), ((1, 4), 6, [[0, 3], [2, 5]]), ((0, 2), 4, [[1, 3]])])
def test_bounds_of_a_model_run_through_all_of_its_layers(hybrid, depth, layers):
  fields = dict(hybrid_mixer=AttentionConfig(heads=4), hybrid_layers=hybrid) if hybrid else {}
  config, lm = model(depth=depth, **fields)
  numbers = [[*own] for run in lm.layers for own in run]
  blocks = [blocks for run in lm.runs for blocks in run]
  stacks = [(block.mixer, own) for block, own in zip(blocks, numbers, strict=True) if hasattr(block.mixer, "forget")]
  assert [own for _, own in stacks] == layers
  logits = {layer: row for mixer, own in stacks for layer, row in zip(own, mixer.bound_logits[...], strict=True)}
  # Where layer 0 is another mixer, it stands for logits of zero.
  rows = {0: jnp.zeros(WIDTH)} | logits
  bounds = dict(zip(sorted(rows), lower_bounds(jnp.stack([rows[layer] for layer in sorted(rows)])), strict=True))
  placed = [block.mixer for run in lm.placed_runs() for block in run if hasattr(block.mixer, "forget")]
  for mixer, (_, own) in zip(placed, stacks, strict=True):
    np.testing.assert_array_equal(mixer.lower_bound, jnp.stack([bounds[layer] for layer in own]))
  assert all(mixer.lower_bound is None for mixer, _ in stacks)
  assert parameter_count(config) == sum(leaf.size for leaf in jax.tree.leaves(lm))


def test_model_uses_its_bounds():
  _, lm = model(HGRN2Config(heads=HEADS, implementation="reference"))

  def layer_by_layer(lm, tokens):
    stack, x = lm.runs[0][0], lm.embedding[...][tokens]
    for i, bound in enumerate(lower_bounds(stack.mixer.bound_logits[...])):
      block = jax.tree.map(lambda leaf, i=i: leaf[i], stack)
      block.mixer.lower_bound = bound
      x, _ = block(x, None, None)
    return lm.norm(x)

  loss = lambda lm: jnp.square(lm.hidden(tokens())[0] - 1).sum()
  assert_close("hidden", jit(lambda lm: lm.hidden(tokens())[0])(lm), jit(layer_by_layer)(lm, tokens()), 1e-6)
  rows = np.abs(jit(jax.grad(loss))(lm).runs[0][0].mixer.bound_logits[...])
  assert np.isfinite(rows).all() and (rows.max(axis=1) > 0).all()


def test_steps_of_a_model_equal_parallel():
  _, lm = model()
  step = jit(lambda lm, tokens, state: lm.step(tokens, state))
  parallel, state = jit(lambda lm: lm(tokens())[0])(lm), lm.init_state(BATCH, TIME)
  for t in range(TIME):
    logits, state = step(lm, tokens()[:, t], state)
    assert_close(f"step {t}", logits, parallel[:, t], 1e-5)


def test_gates_stay_float32():
  mixer = uneven(HGRN2Config(heads=HEADS, conv_width=3), dtype=jnp.bfloat16)
  (q, k, v, log_decay), _ = mixer.project(inputs(dtype=jnp.bfloat16), None, None)
  assert q.dtype == k.dtype == v.dtype == jnp.bfloat16
  assert_stays_float32(log_decay)


@pytest.mark.parametrize("config, message", [
    (HGRN2Config(heads=0), "heads=0: must be at least 1"),
    (HGRN2Config(heads=5), "heads=5: must divide the width 32"),
    (HGRN2Config(heads=2, conv_width=1), "taps=1"),
], ids=str)
def test_bad_configs(config, message):
  with pytest.raises(ValueError, match=message):
    create(config)


def test_flops_per_token():
  # Four square projections, a write and a read of 8 states of 128 x 128, and three convolutions of 4 taps.
  mixer = jax.eval_shape(lambda: create(HGRN2Config(conv_width=4), width=1024))
  assert mixer.flops_per_token(2048) == 8 * 1024**2 + 4 * 8 * 128 * 128 + 3 * 2 * 4 * 1024
