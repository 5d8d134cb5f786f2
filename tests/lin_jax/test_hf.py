"""Checkpoints of flash-linear-attention: what they compute, the way back of all families, and what is refused.

Each fixture is a random model that the library made, saved and ran, with its logits and greedy continuation
(`experiments/compare_fla.py --fixtures`, and for other libraries `experiments/make_hf_fixtures.py`).
"""

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from lin_jax import hf, mixers
from lin_jax.config import ModelConfig
from lin_jax.generate import generate
from lin_jax.hf import families, fla
from lin_jax.hf.families import writing
from lin_jax.hf.fla.configs import from_hf
from lin_jax.mixers.attention import AttentionConfig
from lin_jax.mixers.hgrn2 import lower_bounds
from lin_jax.model import abstract_model, parameter_count
from tests.close import assert_close

FIXTURES = pathlib.Path(__file__).resolve().parents[1] / "fixtures" / "hf"
NAMES = sorted(path.name for path in FIXTURES.iterdir())


def kind(name):
  """The family of a fixture."""
  return families.of(json.loads((FIXTURES / name / "config.json").read_text()))


def test_every_family_has_a_fixture():
  assert set(map(kind, NAMES)) == set(hf.FAMILIES) - {"mamba_ssm"}  # whose library does not run without a GPU
  assert sum(path.stat().st_size for path in FIXTURES.glob("*/*")) <= 1_000_000


@pytest.mark.parametrize("name", [name for name in NAMES if kind(name) in fla.FAMILIES])
def test_logits_and_generation_are_the_librarys(name):
  config, model = hf.load(FIXTURES / name)
  known = np.load(FIXTURES / name / "logits.npz")
  forward = jax.jit(lambda model, tokens: model(tokens)[0], compiler_options={"xla_backend_optimization_level": 0})
  logits = forward(model, jnp.asarray(known["tokens"]))
  assert_close("logits", logits, known["logits"], 1e-5)
  steps = known["continuation"].shape[1]
  np.testing.assert_array_equal(generate(model, known["tokens"], steps, temperature=0.0), known["continuation"])


@pytest.mark.parametrize("name", NAMES)
def test_the_way_back_is_exact(name, tmp_path):
  config, model = hf.load(FIXTURES / name)
  written = "qwen3_5_text" if name == "qwen3_5" else kind(name)  # without the images' model
  hf.save(tmp_path / "back", config, model, written)
  assert hf.load_config(tmp_path / "back") == config
  back, original = load_file(tmp_path / "back" / hf.WEIGHTS), load_file(FIXTURES / name / hf.WEIGHTS)
  if name == "qwen3_5":
    original = {key.replace(".language_model", ""): value for key, value in original.items() if "visual" not in key}
  if name == "gla_convolution":  # made with `fuse_norm` false; written with its default
    original = {key.replace("g_norm", "g_norm_swish_gate"): value for key, value in original.items()}
  assert back.keys() == original.keys()
  if name == "hgrn2_window":  # the attention layer's logits are in those of its neighbour
    old, new = (np.asarray(lower_bounds(tensors.pop("model.lower_bounds"))) for tensors in (original, back))
    np.testing.assert_allclose(new[[0, 2]], old[[0, 2]], rtol=1e-5)
  for key, value in original.items():
    np.testing.assert_array_equal(back[key], value.astype(np.float32), err_msg=key)


def edited(name, path, tensors=None, options=None):
  """A copy of a fixture with a function applied to its tensors, or with other options; an option of ... is dropped."""
  shutil.copytree(FIXTURES / name, path)
  if tensors:
    save_file(tensors(load_file(path / hf.WEIGHTS)), path / hf.WEIGHTS)
  config = json.loads((path / hf.CONFIG).read_text()) | (options or {})
  (path / hf.CONFIG).write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
  return path


def test_incomplete_and_foreign_tensors_are_named(tmp_path):
  def change(tensors):
    del tensors["model.layers.1.attn.b_proj.weight"]
    tensors["model.layers.0.attn.b_proj.bias"] = np.zeros(2, np.float32)
    tensors["model.norm.weight"] = np.zeros(31, np.float32)
    return tensors

  with pytest.raises(ValueError) as error:
    hf.load(edited("delta_net", tmp_path / "copy", change))
  assert "missing: model.layers.1.attn.b_proj.weight;" in str(error.value)
  assert "left over: model.layers.0.attn.b_proj.bias;" in str(error.value)
  assert "of another shape: model.norm.weight (31,) in place of (32,)" in str(error.value)


def test_long_lists_of_names_are_cut(tmp_path):
  with pytest.raises(ValueError, match=r"missing: lm_head.weight, .* and \d+ more$"):
    hf.load(edited("delta_net", tmp_path / "copy", lambda tensors: {}))


@pytest.mark.parametrize("name, options, message", [
    ("gla", {"model_type": "rwkv7"}, "model_type='rwkv7': must be one of gla, "),
    ("gla", {"feature_map": "relu", "clamp_min": -3.0}, "clamp_min=-3.0 .*; feature_map='relu' "),
    ("gla", {"num_kv_heads": 1}, "num_kv_heads=1"),
    ("gla", {"use_output_gate": False}, "use_output_gate=False"),
    ("gla", {"hidden_act": "powlu"}, "hidden_act='powlu'"),
    ("gla", {"attnres_block_size": 2}, "attnres_block_size=2"),
    ("gla", {"norm_first": True}, r"norm_first=True \(not known\)"),
    ("gla", {"dtype": "float64"}, "dtype='float64'"),
    ("delta_net", {"use_beta": False}, "use_beta=False"),
    ("delta_net", {"qk_norm": "none"}, r"qk_norm='none' \(served: 'l2', 'sum'\)"),
    ("gated_deltanet", {"output_gate_activation": "sigmoid"}, "output_gate_activation='sigmoid'"),
    ("retnet", {"use_short_conv": True}, "use_short_conv=True"),
    ("transformer", {"qk_norm": True, "qkv_bias": True}, "qk_norm=True .*; qkv_bias=True "),
    ("delta_net_window", {"attn": {"layers": [1], "num_heads": 2, "qkv_bias": True}}, "attn.qkv_bias=True"),
    ("hgrn2", {"attn": {"layers": [0], "num_heads": 2}}, "attn.layers with 0 "),
    ("hgrn2", {"expand_ratio": 24}, r"expand_ratio=24 \(must divide"),
    ("mamba2", {"D_has_hdim": True}, "D_has_hdim=True"),
    ("mamba2", {"dt_limit": [0.0, 0.5]}, r"dt_limit=\[0.0, 0.5\]"),
    ("mamba2", {"head_dim": 24}, "head_dim=24"),
])
def test_options_without_equivalent_are_named(name, options, message, tmp_path):
  with pytest.raises(ValueError, match=message):
    hf.load(edited(name, tmp_path / "copy", options=options))


@pytest.mark.parametrize("options", [
    {"num_kv_heads": 2, "output_gate_unknown": False, "use_gk": ..., "expand_v": ..., "attn": ...},
    {"torch_dtype": "float32", "dtype": ..., "hidden_ratio": None, "feature_map": ...},
])
def test_harmless_options_are_read_as_their_defaults(options, tmp_path):
  assert hf.load_config(edited("gla", tmp_path / "copy", options=options)) == hf.load_config(FIXTURES / "gla")


# Parameters of the library's models of default configs, the 1.3B ones, counted in PyTorch.
@pytest.mark.parametrize("kind, count", [
    ("gla", 1_365_514_240), ("delta_net", 1_365_677_056), ("gated_deltanet", 1_387_348_732), ("retnet", 1_351_727_104),
    ("hgrn2", 1_364_396_032), ("mamba2", 1_371_839_488), ("transformer", 1_364_297_728),
])
def test_defaults_are_the_librarys(kind, count):
  assert parameter_count(from_hf({"model_type": kind})) == count


def small(mixer, **options):
  return ModelConfig(**(dict(mixer=mixer, vocab_size=16, width=16, depth=2, mlp_width=8, dtype="float32") | options))


@pytest.mark.parametrize("config, message", [
    (small(mixers.config_class("gla")(heads=2, gate_rank=4)), r"gate_rank=4 \(only 16\)"),
    (small(mixers.config_class("retention")(heads=2, conv_width=4)), r"conv_width=4 \(only 0\)"),
    (small(mixers.config_class("retention")(heads=2)), r"decays='spread' \(only 'consecutive'\)"),
    (small(mixers.config_class("linear_attention")(heads=2)), "mixer 'linear_attention': must be one of gla, "),
    (small(mixers.config_class("hgrn2")(heads=2)), r"norm_eps=1e-06 \(only 1e-05\)"),
    (small(mixers.config_class("mamba2")(heads=2)), r"mlp_width=8 \(every block is a mixer alone\)"),
    (small(AttentionConfig(heads=2), hybrid_mixer=AttentionConfig(heads=1), hybrid_layers=(0,)), "hybrid_mixer=Atten"),
    (small(mixers.config_class("gla")(heads=2), hybrid_mixer=mixers.config_class("retention")(heads=2),
           hybrid_layers=(0,)), "hybrid_mixer=Retention"),
    (small(AttentionConfig(heads=2, rope_base=0.0)), "rope_base=0.0"),
    (small(mixers.config_class("gla")(heads=2), hybrid_mixer=AttentionConfig(heads=2, output_gate=True),
           hybrid_layers=(0,), post_norm="hybrid"), r"post_norm='hybrid'; output_gate=True \(only False\)"),
    (small(mixers.config_class("gated_delta_net")(heads=2, norm_eps=1e-5)), r"norm_eps=1e-05 \(only 0.0\)"),
])
def test_models_without_equivalent_are_not_written(config, message, tmp_path):
  with pytest.raises(ValueError, match=message):
    writing(config)


@pytest.mark.parametrize("mixer", [
    mixers.config_class("delta_net")(heads=2, qk_activation="elu1", qk_norm="l1", conv_width=0, allow_neg_eigval=True),
    mixers.config_class("gated_delta_net")(heads=2, value_heads=4, head_dim=4, conv_width=0, output_gate=False),
    mixers.config_class("gla")(heads=2, expand_k=1.0, expand_v=2.0, conv_width=3),
    mixers.config_class("hgrn2")(heads=2, norm_eps=1e-5),
])
def test_a_model_of_ours_survives_both_ways(mixer, tmp_path):
  """A pattern of two mixers that repeats: stacks with a leading axis of two."""
  config = small(mixer, depth=4, hybrid_mixer=AttentionConfig(heads=2, window=3, rope_base=500.0), hybrid_layers=(1, 3),
                 tie_embeddings=True)
  random = np.random.default_rng(0)
  model = jax.tree.map(lambda x: random.standard_normal(x.shape).astype(x.dtype), abstract_model(config))
  hf.save(tmp_path / "out", config, model)
  again, loaded = hf.load(tmp_path / "out")
  assert again == config
  jax.tree.map(np.testing.assert_array_equal, nnx.state(loaded, nnx.Param), nnx.state(model, nnx.Param))


def test_shards_and_bfloat16_tensors_are_read(tmp_path):
  path = edited("gla", tmp_path / "copy")
  tensors = {key: value.astype(ml_dtypes.bfloat16) for key, value in load_file(path / hf.WEIGHTS).items()}
  (path / hf.WEIGHTS).unlink()
  where = {key: f"part-{i % 2}.safetensors" for i, key in enumerate(tensors)}
  for part in set(where.values()):
    save_file({key: value for key, value in tensors.items() if where[key] == part}, path / part)
  (path / hf.INDEX).write_text(json.dumps({"weight_map": where}))
  _, model = hf.load(path)
  assert model.embedding[...].dtype == jnp.float32
  expected = tensors["model.embeddings.weight"].astype(np.float32)
  np.testing.assert_array_equal(model.embedding[...], expected)


def test_a_tied_head_may_be_stored_as_well(tmp_path):
  path = edited("gla_convolution", tmp_path / "copy", lambda t: t | {"lm_head.weight": t["model.embeddings.weight"]})
  assert hf.load(path)[0] == hf.load_config(FIXTURES / "gla_convolution")


def test_directories_that_hold_no_checkpoint_are_named(tmp_path):
  with pytest.raises(ValueError, match="config.json: not a readable JSON file"):
    hf.load(tmp_path)
  shutil.copyfile(FIXTURES / "gla" / hf.CONFIG, tmp_path / hf.CONFIG)
  with pytest.raises(ValueError, match="model.safetensors: not a readable safetensors file"):
    hf.load(tmp_path)
  config, model = hf.load(FIXTURES / "gla")
  with pytest.raises(ValueError, match="holds a checkpoint already"):
    hf.save(tmp_path, config, model)
  warmer = dataclasses.replace(config, mixer=dataclasses.replace(config.mixer, gate_temperature=8.0))
  with pytest.raises(ValueError, match="gate_temperature=8.0"):
    hf.save(tmp_path / "new", warmer, model)
