"""Blocks of released models: norms with one plus their scale, and post-norm blocks beside pre-norm ones."""

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from lin_jax.config import ModelConfig, TrainConfig, validate
from lin_jax.decoding import in_order
from lin_jax.mixers.attention import AttentionConfig
from lin_jax.model import LanguageModel
from tests.close import assert_close

BATCH, TIME = 2, 6
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def config(**fields):
  mixers = dict(mixer=AttentionConfig(heads=4), hybrid_mixer=AttentionConfig(heads=2), hybrid_layers=(1,))
  return ModelConfig(**mixers | dict(vocab_size=50, width=32, depth=2, mlp_width=48, dtype="float32") | fields)


def build(config):
  """A model whose vectors, the scales of norms among them, are all moved from their start."""
  lm = jit(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))()
  noise = lambda x: 0.3 * jax.random.normal(jax.random.key(x.size), x.shape)
  return jax.tree.map(lambda x: 10 * x if min(x.shape) > 2 else x + noise(x), lm)


def by_hand(lm, config, ids):
  """The logits by the formulas of both kinds of blocks."""

  def norm(x, layer):
    scale = layer.scale[...] + (1.0 if config.norm == "rms_offset" else 0.0)
    return x / jnp.sqrt(jnp.square(x).mean(axis=-1, keepdims=True) + config.norm_eps) * scale[None, None]

  x = lm.embed(ids)
  for number, block in enumerate(in_order(lm.runs)):
    if config.post_norm == "all" or (config.post_norm == "hybrid" and number in config.hybrid_layers):
      x = x + norm(block.mixer(x)[0], block.mixer_norm)
      x = x + norm(block.mlp(x), block.mlp_norm)
    else:
      x = x + block.mixer(norm(x, block.mixer_norm))[0]
      x = x + block.mlp(norm(x, block.mlp_norm))
  return norm(x, lm.norm) @ lm.unembedding()


@pytest.mark.parametrize("fields", [
    dict(post_norm="hybrid", norm="rms_offset", norm_eps=1e-2), dict(post_norm="all", tie_embeddings=False)], ids=str)
def test_blocks_are_their_formulas_in_both_forms(fields):
  small = config(**fields)
  lm, ids = build(small), jax.random.randint(jax.random.key(1), (BATCH, TIME), 0, 50)
  expected, logits = jit(lambda lm, ids: (by_hand(lm, small, ids), lm(ids)[0]))(lm, ids)
  assert_close("parallel", logits, expected, 1e-5)
  step, state = jit(lambda lm, *args: lm.step(*args)), lm.init_state(BATCH, TIME)
  for t in range(TIME):
    logits, state = step(lm, ids[:, t], state)
    assert_close("step", logits, expected[:, t], 1e-5)


@pytest.mark.parametrize("fields, message", [
    (dict(post_norm="some"), "config.model.post_norm='some': must be one of none, hybrid, all"),
    (dict(post_norm="hybrid", hybrid_mixer=None, hybrid_layers=()),
     "config.model.post_norm='hybrid': needs a config.model.hybrid_mixer that differs"),
    (dict(post_norm="hybrid", mixer=AttentionConfig(), hybrid_mixer=AttentionConfig()),
     "config.model.post_norm='hybrid': needs a config.model.hybrid_mixer that differs")], ids=str)
def test_unknown_or_ambiguous_blocks_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    validate(TrainConfig(model=config(**fields)))
