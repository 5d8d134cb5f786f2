"""Models of which the softmax attention became recurrent: their parameters, and what cannot be converted."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from lin_jax.config import LoraConfig, ModelConfig
from lin_jax.linearize import linearize, linearized
from lin_jax.lora import add_adapters
from lin_jax.mixers.attention import AttentionConfig
from lin_jax.mixers.gla import GLAConfig
from lin_jax.mixers.supra import SupraConfig
from lin_jax.model import LanguageModel

GLA = GLAConfig(heads=2, gate_rank=4)
ATTENTION = AttentionConfig(heads=4, kv_heads=2, rope_base=500.0)
TRANSFORMER = ModelConfig(mixer=ATTENTION, vocab_size=48, width=32, depth=2, mlp_width=32, dtype="float32")
HYBRID = dataclasses.replace(TRANSFORMER, mixer=GLA, hybrid_mixer=ATTENTION, hybrid_layers=(1,))


def parameters(model, read=lambda leaf: np.asarray(leaf[...])):
  return {path: read(leaf) for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def converted(config, seed):
  """The parameters by path before and after, and the model after."""
  softmax = jax.jit(lambda: LanguageModel(config, rngs=nnx.Rngs(1)))()
  linear_config, linear = linearize(config, softmax, seed)
  shapes = parameters(nnx.eval_shape(lambda: LanguageModel(linear_config, rngs=nnx.Rngs(0))), lambda leaf: leaf.shape)
  assert parameters(linear, lambda leaf: leaf.shape) == shapes
  return parameters(softmax), parameters(linear), linear


@pytest.mark.parametrize("config", [TRANSFORMER, HYBRID], ids=["transformer", "hybrid"])
def test_all_parameters_are_kept_and_the_feature_maps_are_new(config):
  old, new, _ = converted(config, seed=3)
  assert all(np.array_equal(new[path], value) for path, value in old.items())
  added = {path: value for path, value in new.items() if path not in old}
  assert {path[-2:] for path in added} == {("feature_map", "kernel"), ("feature_map", "bias")}
  assert all(np.unique(value).size == value.size for value in added.values())  # no two layers start alike


def test_the_result_is_a_whole_model_and_follows_the_seed():
  *_, first, linear = converted(TRANSFORMER, seed=3)
  *_, second, _ = converted(TRANSFORMER, seed=4)
  assert {path[-2] for path, value in first.items() if not np.array_equal(second[path], value)} == {"feature_map"}
  tokens = np.arange(12).reshape(1, 12)
  logits = jax.jit(lambda model, tokens: model(tokens)[0])
  changed = np.abs(logits(linear, tokens) - logits(linear, np.where(tokens == 0, 9, tokens))).max(axis=(0, 2))
  assert np.isfinite(changed).all() and (changed > 0).all()


def test_configs_name_the_layers():
  supra = SupraConfig(heads=4, kv_heads=2, rope_base=500.0)
  assert linearized(TRANSFORMER) == dataclasses.replace(TRANSFORMER, mixer=supra)
  assert linearized(HYBRID) == dataclasses.replace(HYBRID, hybrid_mixer=supra)
  both = dataclasses.replace(HYBRID, mixer=AttentionConfig(heads=2, head_dim=16))
  assert linearized(both) == dataclasses.replace(HYBRID, mixer=SupraConfig(heads=2), hybrid_mixer=supra)
  alike = dataclasses.replace(HYBRID, mixer=dataclasses.replace(ATTENTION, head_dim=8))
  with pytest.raises(ValueError, match="would become the same layer: give both the same head_dim"):
    linearized(alike)


@pytest.mark.parametrize("mixer, message", [
    (dict(window=512), "window=512: attention becomes linear only with 0"),
    (dict(rope_base=0.0), "rope_base=0.0: attention without positions does not become linear"),
    (dict(rope_fraction=0.5), "rope_fraction=0.5: attention becomes linear only with 1.0"),
    (dict(head_dim=12), "head_dim=12: attention becomes linear only with 0"),
    (dict(qk_norm="head"), "qk_norm='head': attention becomes linear only with 'none'"),
    (dict(output_gate=True), "output_gate=True: attention becomes linear only with False"),
], ids=lambda value: next(iter(value)) if isinstance(value, dict) else "")
def test_options_that_cannot_be_converted_are_named(mixer, message):
  for field, config in (("mixer", TRANSFORMER), ("hybrid_mixer", HYBRID)):
    changed = dataclasses.replace(config, **{field: dataclasses.replace(ATTENTION, **mixer)})
    with pytest.raises(ValueError, match=f"^config.model.{field}.{message}"):
      linearized(changed)


def test_without_softmax_attention_there_is_nothing_to_convert():
  with pytest.raises(ValueError, match="config.model.mixer is 'gla': only softmax attention"):
    linearized(dataclasses.replace(TRANSFORMER, mixer=GLA))


def test_adapters_are_not_lost():
  model = jax.jit(lambda: LanguageModel(TRANSFORMER, rngs=nnx.Rngs(1)))()
  model = add_adapters(model, LoraConfig(rank=2, targets="query"), rngs=nnx.Rngs(1))
  with pytest.raises(ValueError, match=r"no place for runs\.0\.0\.mixer\.query\.adapter\.a, .*: merge adapters first"):
    linearize(TRANSFORMER, model)
