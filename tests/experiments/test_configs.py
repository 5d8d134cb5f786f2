"""Every named config builds and obeys the rules; sizes and schedules are the paper's; twins differ in the mixer."""

import dataclasses
import math
import re

import jax
import pytest
from flax import nnx

from configs import CONFIGS, lookup, page
from lin_jax import mixers, sharding
from lin_jax.config import MeshConfig, from_dict, to_dict, validate
from lin_jax.hf import olmo_hybrid, qwen3_5
from lin_jax.model import abstract_model, parameter_count

# Parameters with tied embeddings. 341.6M and 1.30B are the GLA paper's (its Transformer++ has the same budget); those
# of RetNet, Gated DeltaNet, Mamba-2 and HGRN2 are flash-linear-attention's models, with an untied head 1.352B, 1.387B,
# 382M and 1.372B, and 374M. TNL's are its paper's, but for 3B, of which it says no more than that.
# Mamba's are its paper's 371.5M and 1.372B, but for the embeddings: its vocabulary has 50,280 entries.
SIZES = {"gla_tiny": 0.903e6, "transformer_tiny": 0.886e6, "gla_small": 42.1e6, "transformer_small": 42.1e6,
         "gla_340m": 341.6e6, "transformer_340m": 341.6e6, "gla_1b3": 1.30e9, "transformer_1b3": 1.30e9,
         "retnet_340m": 347.4e6, "retnet_1b3": 1.286e9, "gated_deltanet_1b3": 1.3215e9,
         "delta_product_340m": 342.2e6,
         "mamba_340m": 371.5e6 - 1024 * (50280 - 32000), "mamba_1b3": 1.372e9 - 2048 * (50280 - 32000),
         "mamba2_340m": 349.2e6, "mamba2_1b3": 1.3065e9, "hgrn2_340m": 341.6e6, "hgrn2_1b3": 1.30e9,
         "kda_340m": 340.1e6, "kda_1b3": 1.325e9, "kimi_linear_1b3": 1.319e9,
         **{name: size.released for name, size in page.SIZES.items() if size.released},
         "tnl_385m": 385e6, "tnl_1b": 1.0e9, "tnl_3b": 2.88e9, "tnl_7b": 6.8e9,
         "supra_tiny": 0.903e6, "supra_340m": 343.2e6,
         **{f"deltanet_{kind}340m": 341.6e6 for kind in ("", "swa_", "global_")},
         **{f"deltanet_{kind}1b3": 1.30e9 for kind in ("", "swa_", "global_")}}


def test_every_config_has_a_size():
  assert set(SIZES) == set(CONFIGS)


@pytest.mark.parametrize("name", CONFIGS)
def test_config_is_valid_and_has_its_size(name):
  config = validate(lookup(name))
  assert config.name == name
  assert parameter_count(config.model) == pytest.approx(SIZES[name], rel=0.01)
  assert from_dict(to_dict(config)) == config


@pytest.mark.parametrize("name", [name for name, size in page.SIZES.items() if size.released])
def test_released_models_are_described_by_their_files(name):
  family = qwen3_5 if name.startswith("qwen35") else olmo_hybrid
  model = lookup(name).model
  assert dataclasses.replace(family.from_hf(family.to_hf(model)), dtype=model.dtype) == model


@pytest.mark.parametrize("name", CONFIGS)
def test_docstring_records_the_run(name):
  text = CONFIGS[name].__doc__
  for part in ("Command:", "Expected:", "Obtained:", f"--config={name} "):
    assert part in text


@pytest.mark.parametrize("size", ["tiny", "small", "340m", "1b3"])
def test_twins_share_everything_but_the_mixer(size):
  gla, transformer = lookup(f"gla_{size}"), lookup(f"transformer_{size}")
  assert mixers.name_of(gla.model.mixer) == "gla" and mixers.name_of(transformer.model.mixer) == "attention"
  transformer.model.mixer, transformer.name = gla.model.mixer, gla.name
  assert transformer == gla


@pytest.mark.parametrize(("name", "tokens", "batch", "warmup"), [
    ("gla_340m", 15e9, 0.5e6, 0.5e9), ("gla_1b3", 100e9, 2e6, 1e9)])
def test_schedule_is_the_papers(name, tokens, batch, warmup):
  config = lookup(name)
  per_step = config.data.batch_size * config.data.sequence_length
  assert config.data.sequence_length == 2048
  # The paper rounds its batches: 0.5M is 256 x 2048 = 0.52M, 2M is 1024 x 2048 = 2.1M.
  assert per_step == pytest.approx(batch, rel=0.05)
  assert tokens - per_step < config.optim.steps * per_step <= tokens
  assert warmup - per_step < config.optim.warmup_steps * per_step <= warmup
  optim = config.optim
  assert (optim.learning_rate, optim.final_learning_rate) == (3e-4, 3e-5)
  assert (optim.weight_decay, optim.clip_norm) == (0.01, 1.0)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name.startswith("deltanet")])
def test_deltanet_has_the_recipe_of_gla(name):
  config, gla = lookup(name), lookup(f"gla_{name.rsplit('_', 1)[1]}")
  hybrid = {"swa": tuple(range(1, 24, 2)), "global": (1, 12)}.get(name.split("_")[1], ())
  assert config.model.hybrid_layers == hybrid and (config.model.hybrid_mixer is None) == (not hybrid)
  config.model, config.name = gla.model, gla.name
  assert config == gla


@pytest.mark.parametrize(("field", "value", "message"), [
    ("mlp_width", -1, "config.model.mlp_width=-1: must not be negative"),
    ("mlp", "geglu", "config.model.mlp='geglu': must be one of swiglu, sglu"),
    ("norm", "layer", "config.model.norm='layer': must be one of rms, rms_offset, simple_rms")])
def test_bad_layouts_are_refused(field, value, message):
  config = lookup("gla_tiny")
  setattr(config.model, field, value)
  with pytest.raises(ValueError, match=re.escape(message)):
    validate(config)


def test_models_saved_before_a_layout_had_a_name_load():
  config = lookup("gla_tiny")
  values = to_dict(config)
  for field in ("mlp", "norm", "scale_embeddings"):
    del values["model"][field]
  assert from_dict(values) == config


@pytest.mark.parametrize("name", [name for name in CONFIGS if name.startswith("tnl")])
def test_tnl_has_the_papers_layout(name):
  model = lookup(name).model
  assert (model.mlp, model.norm, model.scale_embeddings, model.tie_embeddings) == ("sglu", "simple_rms", True, True)
  assert model.width == 128 * model.mixer.heads and not model.mixer.lrpe
  assert model.hybrid_layers == (0,) and model.hybrid_mixer == dataclasses.replace(model.mixer, lrpe=True)


@pytest.mark.parametrize("size", ["tiny", "340m"])
def test_supra_is_uptrained_on_a_twentieth_of_the_transformers_steps(size):
  supra, transformer = lookup(f"supra_{size}"), lookup(f"transformer_{size}")
  assert supra.optim.steps / transformer.optim.steps == pytest.approx(0.05, rel=1e-3)
  supra.model.mixer = transformer.model.mixer
  assert (supra.model, supra.data) == (transformer.model, transformer.data)


@pytest.fixture(scope="module")
def mesh():
  return sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))


@pytest.mark.parametrize("config_name", CONFIGS)
def test_config_is_sharded_over_eight_devices(config_name, mesh):
  config = lookup(config_name)
  config.mesh = MeshConfig(data=2, fsdp=2, tensor=2)
  # The configs' microbatches are one GPU's; four times as many sequences fit a batch that is split four ways.
  config.optim.accumulation = max(1, config.optim.accumulation // 4)
  sharding.validate_mesh(config, mesh.size)
  params = nnx.state(abstract_model(config.model), nnx.Param)
  whole, local = 0, 0
  for (path, leaf), place in zip(jax.tree_util.tree_leaves_with_path(params),
                                 jax.tree.leaves(sharding.param_shardings(params, mesh)), strict=True):
    shard = math.prod(place.shard_shape(leaf.shape))  # raises where the mesh does not divide the shape
    whole, local = whole + leaf.size, local + shard
    name = jax.tree_util.keystr(path)
    matrix = math.prod(leaf.shape[1:] if "runs" in name else leaf.shape)  # of one layer
    # Keys and queries that all heads share are whole on every `tensor` device; they have under a million parameters.
    parts = 4 if matrix >= 2**20 else 2 if matrix >= 2**16 else 1
    assert shard <= leaf.size // parts, (name, leaf.shape, place.spec)
  # `data` replicates; vectors, and an odd vocabulary, are all that the other two axes leave whole.
  assert local <= (0.26 if config.model.vocab_size % 2 == 0 else 0.27) * whole


def test_unknown_name_lists_the_known():
  with pytest.raises(ValueError, match=re.escape("unknown config 'gla_2b'; known: gla_tiny, gla_small, gla_340m")):
    lookup("gla_2b")


def test_lookup_returns_a_fresh_config():
  changed = lookup("gla_tiny")
  changed.optim.steps, changed.model.mixer.heads = 1, 1
  assert lookup("gla_tiny").optim.steps != 1 and lookup("gla_tiny").model.mixer.heads != 1
