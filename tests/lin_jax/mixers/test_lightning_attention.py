"""Lightning attention against its recurrence in float64, the decays of every layer, and TransNormerLLM as a model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lin_jax import sharding
from lin_jax.config import MeshConfig, ModelConfig
from lin_jax.mixers.lightning_attention import LightningAttentionConfig, alibi_slopes
from lin_jax.model import LanguageModel, parameter_count
from lin_jax.optim import matrices
from tests.close import assert_close
from tests.lin_jax.mixers.formulas import by_heads, rms_norm, silu, weights
from tests.lin_jax.mixers.small import BATCH, TIME, WIDTH, call, create, inputs, jit

HEADS, DEPTH = 4, 3
LAYERS = ("query", "key", "value", "gate", "output")


def layer(x, weight, decay, theta=None, eps=1e-3):
  """The equations in float64; `theta` [H,K] turns scores as complex numbers, not as the mixer's doubled channels."""
  x = np.asarray(x, np.float64)
  q, k = silu(x @ weight["query"]), silu(x @ weight["key"])
  q, k, v = (by_heads(a, HEADS) for a in (q, k, x @ weight["value"]))
  if theta is not None:
    turn = np.exp(1j * np.arange(x.shape[1])[:, None, None] * theta)[None]
    q, k = q * turn, k * turn.conj()
  memory, outputs = np.zeros((len(x), HEADS, q.shape[-1], v.shape[-1])), []
  for t in range(x.shape[1]):
    memory = decay[None, :, None, None] * memory + k[:, t, :, :, None] * v[:, t, :, None, :]
    outputs.append(np.einsum("bhk,bhkv->bhv", q[:, t], memory).real.reshape(len(x), -1))
  return (rms_norm(np.stack(outputs, axis=1), eps) * (x @ weight["gate"])) @ weight["output"]


@pytest.mark.parametrize("lrpe", [False, True])
@pytest.mark.parametrize("rule", ["alibi", "paper"])
def test_is_the_papers_layer(rule, lrpe):
  mixer = create(LightningAttentionConfig(heads=HEADS, lrpe=lrpe, decay=rule), norm_eps=1e-3)
  theta = None
  if lrpe:
    np.testing.assert_allclose(mixer.theta[...], 10000.0 ** (-2 * np.arange(WIDTH) / WIDTH), rtol=1e-5)
    mixer.theta[...] = jnp.linspace(0, 2, WIDTH)
    theta = np.linspace(0, 2, WIDTH).reshape(HEADS, -1)
  slopes = {"alibi": (1 + 1e-5) * np.array([1 / 4, 1 / 16, 1 / 64, 1 / 256]), "paper": np.array([0, 2, 4, 6])}[rule]
  actual, _ = call(mixer, inputs())
  assert_close("output", actual, layer(inputs(), weights(mixer, *LAYERS), np.exp(-slopes), theta), 1e-5)


def test_alibi_slopes():
  np.testing.assert_allclose(alibi_slopes(8), 0.5 ** np.arange(1, 9))
  np.testing.assert_allclose(alibi_slopes(1), 2.0**-8)
  # The slopes of 4 heads, then the first and third of those of 8.
  np.testing.assert_allclose(alibi_slopes(6), [1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 2, 1 / 8])


def transnormer(rule="alibi", **fields):
  """A tiny "Mix": angles in the first layer alone."""
  config = ModelConfig(**dict(
      mixer=LightningAttentionConfig(heads=HEADS, decay=rule), hybrid_layers=(0,), vocab_size=50, width=WIDTH,
      hybrid_mixer=LightningAttentionConfig(heads=HEADS, lrpe=True, decay=rule), depth=DEPTH, mlp="sglu", mlp_width=48,
      norm="simple_rms", norm_eps=1e-3, scale_embeddings=True, dtype="float32") | fields)
  return config, lambda: jax.tree.map(lambda x: 4 * x, LanguageModel(config, rngs=nnx.Rngs(0)))


def ids(time=TIME, batch=BATCH):
  return jax.random.randint(jax.random.key(3), (batch, time), 0, 50)


def log_decays(rule):
  slopes, layers = np.array([1 / 4, 1 / 16, 1 / 64, 1 / 256]), np.arange(DEPTH)[:, None]
  return {"alibi": -slopes * (1 - layers / (DEPTH - 1) + 1e-5), "paper": -2 * np.arange(4) * (1 - layers / DEPTH)}[rule]


@pytest.mark.parametrize("rule", ["alibi", "paper"])
def test_model_is_the_papers(rule):
  _, init = transnormer(rule)
  lm = init()
  norm = functools.partial(rms_norm, eps=1e-3)
  embedding = np.asarray(lm.embedding[...], np.float64)
  x = np.sqrt(WIDTH) * embedding[np.asarray(ids())]
  blocks = [jax.tree.map(lambda leaf, i=i: leaf[i], stack) for stack, i in (
      (lm.runs[0][0], 0), (lm.runs[1][0], 0), (lm.runs[1][0], 1))]
  theta = np.asarray(blocks[0].mixer.theta[...], np.float64).reshape(HEADS, -1)
  for i, block in enumerate(blocks):
    x = x + layer(norm(x), weights(block.mixer, *LAYERS), np.exp(log_decays(rule)[i]), None if i else theta)
    gate, up, down = (np.asarray(linear.kernel[...], np.float64)
                      for linear in (block.mlp.gate, block.mlp.up, block.mlp.down))
    x = x + ((norm(x) @ gate) * (norm(x) @ up)) @ down
  assert_close("logits", call(lm, ids())[0], norm(x) @ embedding.T, 1e-5)


def test_prefill_then_steps_equal_parallel():
  prompt = 6
  _, init = transnormer()
  lm = init()
  parallel, _ = call(lm, ids())
  logits, state = call(lm, ids()[:, :prompt], lm.init_state(BATCH, TIME))
  assert_close("prefill", logits, parallel[:, :prompt], 1e-5)
  step = jit(lambda lm, tokens, state: lm.step(tokens, state))
  for t in range(prompt, TIME):
    logits, state = step(lm, ids()[:, t], state)
    assert_close(f"step {t}", logits, parallel[:, t], 1e-5)


def test_decays_are_constants_that_nobody_stores():
  config, init = transnormer()
  lm = init()
  before = jax.tree.structure(lm)
  placed = np.concatenate([stack.mixer.log_decay for run in lm.placed_runs() for stack in run])
  np.testing.assert_allclose([*map(float, placed.ravel())], log_decays("alibi").ravel(), rtol=1e-6)
  call(lm, ids())
  lm(ids())
  assert jax.tree.structure(lm) == before and all(stack.mixer.log_decay is None for run in lm.runs for stack in run)
  # Five square projections and three of the MLP a layer, the angles of one layer, one table of embeddings.
  weights = 3 * (5 * WIDTH**2 + 3 * WIDTH * 48) + WIDTH + 50 * WIDTH
  assert parameter_count(config) == sum(leaf.size for leaf in jax.tree.leaves(lm)) == weights
  # Angles are no matrix: weight decay would pull them to zero.
  assert not jax.tree.leaves(matrices(nnx.state(lm, nnx.Param)["runs"][0][0]["mixer"]["theta"]))[0]


def test_eight_devices_equal_one():
  config, _ = transnormer(tie_embeddings=False)
  init = lambda: LanguageModel(config, rngs=nnx.Rngs(0), remat="full")

  def gradients(lm, tokens):
    return jax.grad(lambda lm: jax.nn.log_softmax(lm(tokens)[0])[:, :, 3].mean())(lm)

  expected = jit(gradients)(init(), ids(16, 4))
  mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
  with jax.set_mesh(mesh):
    placement = sharding.param_shardings(jax.eval_shape(init), mesh)
    lm = jit(init, out_shardings=placement)()
    actual = jit(gradients, out_shardings=placement)(lm, jax.device_put(ids(16, 4), sharding.batch_sharding(mesh)))
  for (path, leaf), other in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
    assert_close(jax.tree_util.keystr(path), leaf, other, 1e-5)


def test_angles_stay_float32():
  # Turned by bfloat16 positions, scores at one distance would differ by where they are.
  mixer = create(LightningAttentionConfig(heads=HEADS, lrpe=True), dtype=jnp.bfloat16, norm_eps=1e-3)
  state = mixer.init_state(1, 0)
  x = jnp.ones((1, 2, WIDTH), jnp.bfloat16)
  near, _ = mixer(x, state)
  far, after = mixer(x, state | {"length": jnp.array([1000])})
  assert near.dtype == jnp.bfloat16 and after["length"].tolist() == [1002] and after["memory"].dtype == jnp.float32
  assert_close("output", far.astype(jnp.float32), near.astype(jnp.float32), 1e-2)


@pytest.mark.parametrize("config, message", [
    (LightningAttentionConfig(heads=0), "heads=0: must be at least 1"),
    (LightningAttentionConfig(heads=5), "heads=5: must divide the width 32"),
    (LightningAttentionConfig(heads=4, decay="none"), "decay='none': must be one of alibi, paper"),
], ids=str)
def test_bad_configs(config, message):
  with pytest.raises(ValueError, match=message):
    create(config)


@pytest.mark.parametrize("lrpe", [False, True])
def test_flops_per_token(lrpe):
  # Five square projections, and a write and a read of 8 states of 128 (with angles 256) x 128.
  mixer = jax.eval_shape(lambda: create(LightningAttentionConfig(lrpe=lrpe), width=1024))
  assert mixer.flops_per_token(2048) == 10 * 1024**2 + 4 * 8 * 128 * 128 * (1 + lrpe)
