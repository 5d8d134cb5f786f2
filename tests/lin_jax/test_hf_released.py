"""Checkpoints of transformers' models and of mamba_ssm: what they compute, other spellings, and what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from lin_jax import hf
from lin_jax.config import LoraConfig, ModelConfig
from lin_jax.generate import generate
from lin_jax.hf import families, fla
from lin_jax.lora import add_adapters
from lin_jax.mixers import config_class
from lin_jax.mixers.attention import AttentionConfig
from lin_jax.model import parameter_count
from tests.lin_jax.test_hf import FIXTURES, NAMES, edited, kind

RELEASED = [name for name in NAMES if kind(name) not in fla.FAMILIES]


@pytest.mark.parametrize("name", RELEASED)
def test_logits_and_chosen_tokens_are_the_librarys(name):
  model = hf.load(FIXTURES / name)[1]
  known = np.load(FIXTURES / name / "logits.npz")
  length, steps = known["tokens"].shape[1], known["continuation"].shape[1]
  tokens = np.concatenate([known["tokens"], known["continuation"]], axis=1)
  forward = jax.jit(lambda model, tokens: model(tokens)[0], compiler_options={"xla_backend_optimization_level": 0})
  logits = np.asarray(forward(model, jnp.asarray(tokens)))
  every = length // known["logits"].shape[1]
  assert np.abs(logits[:, every - 1:length:every] - known["logits"]).max() < 1e-4
  np.testing.assert_array_equal(logits[:, length - 1:-1].argmax(-1), known["continuation"])
  if name == "qwen3_5_text":  # token by token too, as `test_blocks.py` has it for the other kinds of blocks
    np.testing.assert_array_equal(generate(model, known["tokens"], steps, temperature=0.0), known["continuation"])


def load_equal(path, name):
  """The folder holds the same model as a fixture."""
  (config, model), (expected_config, expected) = hf.load(path), hf.load(FIXTURES / name)
  assert config == expected_config
  jax.tree.map(np.testing.assert_array_equal, nnx.state(model, nnx.Param), nnx.state(expected, nnx.Param))


def renamed(*pairs):
  """A function of tensors that replaces texts in their names."""

  def change(tensors):
    for pair in pairs:
      tensors = {name.replace(*pair): value for name, value in tensors.items()}
    return tensors

  return change


def test_the_text_model_is_found_among_others(tmp_path, caplog):
  """A released Qwen3.5: its options within others, its tensors under another prefix, and those of other models."""
  values = json.loads((FIXTURES / "qwen3_5_text" / hf.CONFIG).read_text())
  options = dict.fromkeys(values, ...) | {
      "model_type": "qwen3_5", "text_config": values | {"mtp_num_hidden_layers": 1, "mamba_ssm_dtype": "float32"},
      "vision_config": {"depth": 1}, "image_token_id": 7}
  others = {name: np.ones((2, 2), np.float32) for name in ("model.visual.merger.norm.weight", "mtp.fc.weight")}
  change = renamed(("model.", "model.language_model."))
  load_equal(edited("qwen3_5_text", tmp_path / "copy", lambda tensors: change(tensors) | others, options),
             "qwen3_5_text")
  assert caplog.messages == [f"{tmp_path / 'copy'}: 2 tensors are no part of the model and are not read: "
                             "model.visual.merger.norm.weight, mtp.fc.weight"]


def test_other_spellings_and_lengths_of_tensors_are_read(tmp_path):
  """Olmo Hybrid with the names that transformers has in memory, and with convolutions cut as the projections are."""
  spelled = renamed(("attention_layer_norm", "input_layernorm"), ("feedforward_layer_norm", "post_attention_layernorm"))

  def change(tensors):
    for layer in (0, 1):
      names = [f"model.layers.{layer}.linear_attn.{name}_conv1d.weight" for name in "qkv"]
      sizes = [tensors[name.replace("_conv1d", "_proj")].shape[0] for name in names]
      parts = np.split(np.concatenate([tensors[name] for name in names]), np.cumsum(sizes)[:-1])
      tensors |= {name: np.ascontiguousarray(part) for name, part in zip(names, parts, strict=True)}
    assert len(set(sizes)) > 1
    return spelled(tensors)

  load_equal(edited("olmo_hybrid", tmp_path / "copy", change), "olmo_hybrid")


def test_the_authors_mamba2_is_read_and_written(tmp_path):
  options = dict.fromkeys(json.loads((FIXTURES / "mamba2" / hf.CONFIG).read_text()), ...) | {
      "d_model": 32, "n_layer": 2, "vocab_size": 41, "pad_vocab_size_multiple": 16, "tie_embeddings": False,
      "ssm_cfg": {"layer": "Mamba2", "d_state": 16, "headdim": 16, "chunk_size": 64}, "fused_add_norm": True}
  load_equal(edited("mamba2", tmp_path / "copy", renamed((".embeddings.", ".embedding.")), options), "mamba2")
  hf.save(tmp_path / "back", *hf.load(tmp_path / "copy"), "mamba_ssm")
  load_equal(tmp_path / "back", "mamba2")
  assert load_file(tmp_path / "back" / hf.WEIGHTS).keys() == load_file(tmp_path / "copy" / hf.WEIGHTS).keys()


NONE = {"rope_parameters": {"rope_type": "default", "rope_theta": None}}


@pytest.mark.parametrize("options, base", [
    (NONE, 0.0), ({"rope_parameters": None, "rope_theta": None}, 0.0),
    ({"rope_parameters": ..., "rope_theta": 500.0}, 500.0)])
def test_positions_that_may_be_absent_are_explicit(options, base, tmp_path):
  path = edited("olmo_hybrid", tmp_path / "copy", options=options)
  assert hf.load_config(path).hybrid_mixer.rope_base == base


@pytest.mark.parametrize("name, options, message", [
    ("olmo_hybrid", {"rope_parameters": None}, "rope_parameters=None: must give rope_theta, as null"),
    ("olmo_hybrid", {"rope_parameters": ...}, "rope_parameters=None: must give rope_theta"),
    ("olmo_hybrid", {"layer_types": ["full_attention"] * 3}, "must have a layer of 'linear_attention'"),
    ("olmo_hybrid", {"attention_bias": True}, r"attention_bias=True \(served: False\)"),
    ("qwen3_5_text", {"attn_output_gate": False}, "attn_output_gate=False"),
    ("qwen3_5_text", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ("qwen3_5_text", {"layer_types": ["sliding_attention"] * 4}, "layer_types=.*: must be linear_attention or full_at"),
    ("qwen3_5_text", {"layer_types": ["full_attention"]}, "for each of num_hidden_layers=4"),
    ("qwen3_5_text", {"linear_num_value_heads": 3}, "value_heads=3: must be a multiple of heads=2"),
    ("qwen3_5_text", {"num_experts": 8}, r"num_experts=8 \(not known\)"),
    ("qwen3_5_text", {"model_type": "qwen3_5"}, "text_config=None: must be an object"),
    ("qwen3_5", {"quantization_config": {"bits": 8}}, "quantization_config={'bits': 8}"),
    ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope_parameters.rope_type='llama3': scale"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.rope_type='linear'"),
    ("llama", {"rope_parameters": {"full_attention": {}}}, "rope_parameters with 'full_attention'={}"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5: models of this type rotate all"),
    ("llama", {"rope_parameters": {"rope_theta": 0}}, "rope_theta=0: must be positive"),
    ("llama", {"attention_bias": True, "mlp_bias": True}, "attention_bias=True .*; mlp_bias=True"),
    ("llama", {"attention_multiplier": 0.5}, r"attention_multiplier=0.5 \(not known\)"),
    ("llama", {"num_attention_heads": 5, "head_dim": None}, "num_attention_heads=5: must divide hidden_size=12"),
    ("mistral", {"layer_types": ["sliding_attention", "full_attention"]}, "layer_types="),
    ("qwen3", {"use_sliding_window": True}, "use_sliding_window=True"),
    ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "'full_attention' for each of 2"),
    ("qwen3_5_text", {"layer_types": ..., "full_attention_interval": 0}, "full_attention_interval=0: must be positive"),
    ("mamba2_transformers", {"time_step_limit": [0.0, 0.5]}, r"time_step_limit=\[0.0, 0.5\]"),
    ("mamba2_transformers", {"use_bias": True}, "use_bias=True"),
    ("mamba2_transformers", {"head_dim": 5}, "num_heads=4 of head_dim=5: must be expand \\* hidden_size = 24"),
    ("mamba2_transformers", {"model_type": ..., "ssm_cfg": {"layer": "Mamba1"}}, "with the layer 'Mamba2'"),
    ("mamba2_transformers", {"model_type": ..., "ssm_cfg": {"layer": "Mamba2", "D_has_hdim": True}}, "D_has_hdim=True"),
])
def test_options_without_equivalent_are_named(name, options, message, tmp_path):
  with pytest.raises(ValueError, match=f"config.json: .*{message}"):
    hf.load_config(edited(name, tmp_path / "copy", options=options))


@pytest.mark.parametrize("name, options, message", [
    ("qwen3_5_text", {"vocab_size": 25}, r"embed_tokens.weight \(24, 12\) in place of \(25, 12\) "
     r"\(set by vocab_size and hidden_size\)"),
    ("qwen3_5_text", {"linear_num_value_heads": 2}, r"in_proj_qkv.weight \(28, 12\) in place of \(22, 12\) \(set by "),
    ("qwen3_5_text", {"head_dim": 16}, "q_proj.weight .* twice for the gate"),
    ("llama", {"intermediate_size": 11}, "up_proj.weight .*set by intermediate_size"),
])
def test_options_that_set_a_wrong_shape_are_named(name, options, message, tmp_path):
  with pytest.raises(ValueError, match=f"of another shape: .*{message}"):
    hf.load(edited(name, tmp_path / "copy", options=options))


def test_missing_tensors_are_named(tmp_path):
  def change(tensors):
    return {name: value for name, value in tensors.items() if "q_norm" not in name and "q_conv1d" not in name}

  with pytest.raises(ValueError, match="missing: model.layers.1.self_attn.q_norm.weight$"):
    hf.load(edited("qwen3_5", tmp_path / "qwen", change))
  with pytest.raises(ValueError, match="missing: model.layers.0.linear_attn.q_conv1d.weight, "):
    hf.load(edited("olmo_hybrid", tmp_path / "olmo", change))


@pytest.mark.parametrize("options, count", [
    ({"model_type": "qwen3_5_text"}, 8_953_803_264), ({"model_type": "olmo_hybrid"} | NONE, 7_430_870_688),
    ({"model_type": "llama"}, 6_738_415_616), ({"model_type": "mistral"}, 7_241_732_096),
    ({"ssm_cfg": {"layer": "Mamba2"}, "d_model": 768, "n_layer": 24, "pad_vocab_size_multiple": 16}, 128_989_632),
])
def test_defaults_are_the_librarys(options, count):
  assert parameter_count(families.FAMILIES[families.of(options)].from_hf(options)) == count


DELTA = config_class("gated_delta_net")(heads=2, head_dim=4)
PLAIN = dict(vocab_size=16, width=16, depth=2, mlp_width=8)


@pytest.mark.parametrize("kind, config, message", [
    ("qwen3_5", ModelConfig(mixer=DELTA, **PLAIN), "the text model is written as qwen3_5_text"),
    ("qwen3_5_text", ModelConfig(mixer=DELTA, **PLAIN), r"norm='rms' \(only 'rms_offset'\)"),
    ("qwen3_5_text", ModelConfig(mixer=DELTA, hybrid_mixer=AttentionConfig(heads=2, rope_base=0.0), hybrid_layers=(1,),
                                 **PLAIN | {"mlp_width": 0}), r"mlp_width=0 \(must be .*rope_base=0.0 \(must be"),
    ("olmo_hybrid", ModelConfig(mixer=DELTA, hybrid_mixer=DELTA, hybrid_layers=(1,), **PLAIN), "post_norm='none' .*"
     "norm_eps=1e-06 .*hybrid_mixer of 'gated_delta_net'"),
    ("llama", ModelConfig(mixer=AttentionConfig(heads=2, window=4), **PLAIN), r"window=4 \(only 0\)"),
    ("qwen3", ModelConfig(mixer=AttentionConfig(heads=2, rope_base=0.0), **PLAIN), "qk_norm='none' .*rope_base=0.0"),
    ("llama", ModelConfig(mixer=DELTA, **PLAIN), "mixer 'gated_delta_net': a llama checkpoint has 'attention'"),
    ("gpt2", ModelConfig(mixer=DELTA, **PLAIN), "model_type='gpt2': must be one of gla, .*, llama, "),
])
def test_models_without_equivalent_are_not_written(kind, config, message):
  with pytest.raises(ValueError, match=message):
    families.writing(config, kind)


def test_adapters_are_not_left_out(tmp_path):
  config, model = hf.load(FIXTURES / "llama")
  add_adapters(model, LoraConfig(rank=1, targets="query"), rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match="a llama checkpoint has no tensors for runs.0.0.mixer.query.adapter.a, "):
    hf.save(tmp_path / "copy", config, model)


@pytest.mark.parametrize("fraction", [1.0, 0.5, 0.25])
def test_the_part_of_the_channels_that_is_rotated_is_written(fraction):
  attention = AttentionConfig(heads=2, kv_heads=1, head_dim=8, rope_fraction=fraction, qk_norm="head",
                              qk_norm_offset=True, output_gate=True)
  config = ModelConfig(mixer=DELTA, hybrid_mixer=attention, hybrid_layers=(1,), norm="rms_offset", **PLAIN)
  kind, values = families.writing(config)
  assert families.FAMILIES[kind].from_hf(values).hybrid_mixer == attention


def test_a_model_is_written_as_the_first_family_that_has_it():
  kinds = {name: families.writing(hf.load_config(FIXTURES / name))[0] for name in RELEASED}
  assert kinds == {name: name for name in RELEASED} | {"qwen3_5": "qwen3_5_text", "mamba2_transformers": "mamba2",
                                                       "mistral": "mistral"}
