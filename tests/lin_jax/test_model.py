"""The whole model: parallel = recurrent, packing, parameter counts, equal structures."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lin_jax import flops, mixers, model
from lin_jax.config import ModelConfig, TrainConfig, from_dict, to_dict
from lin_jax.mixers.attention import AttentionConfig
from lin_jax.mixers.gla import GLAConfig
from lin_jax.mixers.mamba import MambaConfig
from lin_jax.model import LanguageModel, parameter_count
from tests.close import assert_close

VOCAB, BATCH, TIME = 50, 2, 12
# Compilation is most of the time here, optimised code none of it.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

call = jit(lambda lm, tokens, state=None, segment_ids=None: lm(tokens, state, segment_ids))
step = jit(lambda lm, tokens, state: lm.step(tokens, state))


def config(mixer, **fields):
  return ModelConfig(**dict(mixer=mixer, vocab_size=VOCAB, width=32, depth=2, mlp_width=48, dtype="float32") | fields)


def build(config, **kwargs):
  return LanguageModel(config, rngs=nnx.Rngs(0), **kwargs)


def tokens(time=TIME):
  return jax.random.randint(jax.random.key(1), (BATCH, time), 0, VOCAB)


# Each kind of state, and of mixers that depend on their place in the stack; the contract's tests take every mixer.
@pytest.fixture(params=["attention", "gla", "hgrn2", "lightning_attention", "mamba"], scope="module")
def lm(request):
  return build(config(mixers.config_class(request.param).examples()[-1]))


def check_recurrence(lm, prompt):
  ids = tokens()
  whole, none = call(lm, ids)
  assert none is None and whole.dtype == jnp.float32 and whole.shape == (BATCH, TIME, VOCAB)
  empty = lm.init_state(BATCH, 2 * TIME)
  logits, state = call(lm, ids[:, :prompt], empty)
  assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, empty)
  logits = [logits]
  for t in range(prompt, TIME):
    next_logits, state = step(lm, ids[:, t], state)
    logits.append(next_logits[:, None])
  assert_close("logits", jnp.concatenate(logits, axis=1), whole, 1e-5)


def test_prefill_then_steps_equal_parallel(lm):
  check_recurrence(lm, prompt=5)


@pytest.mark.parametrize("layers, counts", [((2,), [[2], [1], [1]]), ((1, 3), [[2, 2]])])
def test_hybrids(layers, counts):
  hybrid = config(GLAConfig(heads=2), hybrid_mixer=AttentionConfig(heads=4), hybrid_layers=layers, depth=4)
  lm = build(hybrid)
  assert [[blocks.mixer_norm.scale.shape[0] for blocks in run] for run in lm.runs] == counts
  check_recurrence(lm, prompt=1)
  alone = [parameter_count(config(mixer, depth=4)) for mixer in (hybrid.mixer, hybrid.hybrid_mixer)]
  assert 4 * parameter_count(hybrid) == (4 - len(layers)) * alone[0] + len(layers) * alone[1]


HYBRIDS = {"alone": {}, "runs": dict(hybrid_layers=(2,)), "pattern": dict(hybrid_layers=(1, 3))}


@pytest.mark.parametrize("layers", HYBRIDS)
def test_unrolled_layers_compute_the_same(layers):
  attention = dict(hybrid_mixer=AttentionConfig(heads=4)) if HYBRIDS[layers] else {}
  four = config(GLAConfig(heads=2), depth=4, **HYBRIDS[layers], **attention)
  loss = lambda lm: jnp.square(lm(tokens())[0]).sum()
  expected, gradients = jit(jax.value_and_grad(loss))(build(four))
  # Every pair of layers, unroll and remat in half of the combinations.
  for unroll, remat in zip((0, 2), ("dots", "none") if layers == "runs" else ("none", "dots")):
    actual, found = jit(jax.value_and_grad(loss))(build(four, unroll=unroll, remat=remat))
    assert_close("loss", actual, expected, 1e-6)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(gradients), strict=True):
      assert_close("gradient", a, b, 1e-5)


@pytest.mark.parametrize("depth, unroll", [(3, 1), (3, 0), (3, 2), (1, 1)])
def test_the_compiler_keeps_what_remat_recomputes(depth, unroll):
  def exponentials(remat):
    small = config(GLAConfig(heads=2), depth=depth)
    graph, params = nnx.split(jax.eval_shape(lambda: build(small, remat=remat, unroll=unroll)))
    loss = lambda params: jnp.square(nnx.merge(graph, params).hidden(tokens())[0]).sum()
    return jit(jax.grad(loss)).lower(params).compile().as_text().count(" exponential(")

  # With "dots", a block's two activations are computed again: in the body of a loop or in every layer. Decays are kept.
  bodies = 1 if unroll == 1 else depth
  assert exponentials("dots") >= exponentials("none") + 2 * bodies


def test_layers_are_applied_in_their_order():
  a, b, c = GLAConfig(heads=1), GLAConfig(heads=2), AttentionConfig(heads=4)
  for layers in ([a], [a] * 3, [a, b] * 2, [a, b, b] * 2, [a, b, b, a], [a, a, b, c, c, c], [a, b, c]):
    runs = model.layer_runs(layers)
    assert [mixer for pattern, count in runs for mixer in pattern * count] == layers
    numbers = model.layer_numbers(runs)
    assert sorted(i for run in numbers for own in run for i in own) == [*range(len(layers))]
    for (pattern, _), run in zip(runs, numbers, strict=True):
      assert all(layers[i] is mixer for mixer, own in zip(pattern, run, strict=True) for i in own)
  assert model.layer_runs([a] * 3) == [([a], 3)] and model.layer_runs([a, b] * 2) == [([a, b], 2)]


def test_layers_start_different(lm):
  first, second = lm.runs[0][0].mlp.up.kernel[...]
  assert first.shape == (32, 48) and np.abs(first - second).max() > 1e-2


def test_kernels_that_start_normal():
  model = build(config(GLAConfig(heads=2, conv_width=4), start="normal"))
  block, plain = model.runs[0][0], build(config(GLAConfig(heads=2, conv_width=4), start="layers")).runs[0][0]
  kernels = [layer.kernel[...] for layer in (block.mixer.gate, block.mixer.convolutions[0], block.mlp.up)]
  np.testing.assert_allclose([kernel.std() for kernel in kernels], 0.02, rtol=0.2)
  assert plain.mixer.convolutions[0].kernel[...].std() > 0.2
  assert np.abs(np.diff(kernels[0], axis=0)).max() > 0  # layers differ
  mamba, kept = (build(config(MambaConfig(), start=start, mlp_width=0)).runs[0][0] for start in ("normal", "layers"))
  np.testing.assert_array_equal(mamba.mixer.dt.kernel[...], kept.mixer.dt.kernel[...])


def test_a_saved_config_without_a_start_had_each_layers_own():
  values = to_dict(TrainConfig(model=config(GLAConfig(heads=2))))
  assert values["model"].pop("start") == "normal" and from_dict(values).model.start == "layers"


def test_a_block_without_mlp():
  alone, mixer = config(GLAConfig(heads=2), mlp_width=0), config(GLAConfig(heads=2))
  check_recurrence(build(alone), prompt=5)
  assert parameter_count(mixer) - parameter_count(alone) == 2 * (3 * 32 * 48 + 32)
  flops_of = [flops.forward_flops_per_token(c, TIME) for c in (mixer, alone)]
  assert flops_of[0] - flops_of[1] == 2 * 2 * 3 * 32 * 48


def test_causal(lm):
  embedded = lm.embedding[...][tokens()]

  def output(embedding, t):
    changed = nnx.merge(*nnx.split(lm))
    changed.embedding = nnx.Param(embedding.reshape(-1, 32))
    return jnp.take(changed.hidden(jnp.arange(BATCH * TIME).reshape(BATCH, TIME))[0], t, axis=1).sum()

  gradient = jit(jax.grad(output))
  for t in (0, 5, TIME - 1):
    d = np.abs(gradient(embedded, t)).max(axis=(0, 2))
    assert (d[t + 1:] == 0).all() and d[t] > 0


def test_packed_documents_equal_separate_ones(lm):
  ids = tokens()
  segment_ids = jnp.repeat(jnp.array([1, 2]), np.array([5, 7]), total_repeat_length=TIME)[None].repeat(BATCH, axis=0)
  # What comes later changes nothing, so that one shape serves both documents.
  alone = [call(lm, ids)[0][:, :5], call(lm, np.roll(ids, -5, axis=1))[0][:, :7]]
  assert_close("logits", call(lm, ids, None, segment_ids)[0], jnp.concatenate(alone, axis=1), 1e-5)


def test_bfloat16_is_close_to_float32():
  mixer = GLAConfig(heads=2)
  high, low = (build(config(mixer, dtype=dtype)) for dtype in ("float32", "bfloat16"))
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(low))
  assert jax.eval_shape(lambda lm: lm.hidden(tokens())[0], low).dtype == jnp.bfloat16
  logits = call(low, tokens())[0]
  assert logits.dtype == jnp.float32
  assert_close("logits", logits, call(high, tokens())[0], 3e-2)


def test_embedding_gradient_sums_in_float32():
  # 4096 times the same token: a bfloat16 sum would stop growing at 256 of them.
  lm = build(config(GLAConfig(heads=2), depth=1, dtype="bfloat16"))
  gradient = jit(jax.grad(lambda lm: lm.embed(jnp.zeros((1, 4096), jnp.int32)).sum(dtype=jnp.float32)))(lm)
  np.testing.assert_array_equal(gradient.embedding[...][0], 4096)


@pytest.mark.parametrize("tie", [True, False])
def test_unembedding(tie):
  lm = build(config(GLAConfig(heads=2), depth=1, tie_embeddings=tie))
  assert lm.unembedding().shape == (32, VOCAB)
  assert (np.asarray(lm.unembedding()) == np.asarray(lm.embedding[...].T)).all() == tie
  hidden, logits = jit(lambda lm: (lm.hidden(tokens())[0], lm(tokens())[0]))(lm)
  assert_close("logits", logits, hidden @ lm.unembedding(), 1e-5)
  assert parameter_count(config(GLAConfig(heads=2), depth=1, tie_embeddings=tie)) == sum(
      leaf.size for leaf in jax.tree.leaves(lm))


# arXiv:2312.06635 trains 340M and 1.3B models with tied embeddings of 32000 Mistral tokens.
@pytest.mark.parametrize("mixer, width, mlp_width, count", [
    (GLAConfig(), 1024, 2816, 341.6e6),
    (GLAConfig(), 2048, 5632, 1.30e9),
    (AttentionConfig(heads=16), 1024, 2816, 341e6),
    (AttentionConfig(heads=32), 2048, 5632, 1.30e9),
], ids=["gla_340m", "gla_1b3", "transformer_340m", "transformer_1b3"])
def test_parameter_counts_are_the_papers(mixer, width, mlp_width, count):
  paper = ModelConfig(mixer=mixer, vocab_size=32000, width=width, depth=24, mlp_width=mlp_width)
  actual = parameter_count(paper)
  print(f"{actual / 1e6:.1f}M")
  assert abs(actual / count - 1) < 0.01
  # Two FLOPs a weight, and the mixing, which at this length is below a sixth of it.
  assert 2 * actual < flops.forward_flops_per_token(paper, 2048) < 2 * actual * 7 / 6


def test_training_flops_and_peaks():
  assert flops.training_flops_per_token(config(GLAConfig()), 8) == 3 * flops.forward_flops_per_token(
      config(GLAConfig()), 8)
  assert flops.peak_flops("NVIDIA H100 80GB HBM3") == 989e12
  assert flops.peak_flops("NVIDIA H100 PCIe") == 756e12
  assert flops.peak_flops("NVIDIA GeForce RTX 4090") == 165e12
  assert flops.peak_flops("cpu") is None


@pytest.mark.parametrize("name", list(mixers.MIXERS))
def test_structure_hashes(name):
  """As jit asks of its arguments: equal configs give equal keys of the compilation cache."""
  first, second = (model.abstract_model(config(mixers.config_class(name).examples()[0])) for _ in range(2))
  assert nnx.graphdef(first) == nnx.graphdef(second) and hash(nnx.graphdef(first)) == hash(nnx.graphdef(second))
