"""Whole models whose sequences are split over devices: loss and every gradient equal to one device's."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lin_jax import sharding
from lin_jax.config import MeshConfig, ModelConfig
from lin_jax.generate import Sampling, generate
from lin_jax.mixers import build
from lin_jax.mixers.attention import AttentionConfig
from lin_jax.mixers.delta_net import DeltaNetConfig
from lin_jax.mixers.gated_delta_net import GatedDeltaNetConfig
from lin_jax.mixers.gla import GLAConfig
from lin_jax.mixers.kda import KDAConfig
from lin_jax.mixers.lightning_attention import LightningAttentionConfig
from lin_jax.mixers.mamba import MambaConfig
from lin_jax.model import LanguageModel
from lin_jax.serving import Request, Server
from lin_jax.training import loss_sum
from tests.close import assert_close

B, T, VOCAB = 4, 160, 50
DOCUMENTS = [1, 2, 15, 64, 65, 13], [80, 80], [160], [81, 79]
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
# The definitions of the ops compile fastest.
REFERENCE = dict(implementation="reference")

# Two layers of two kinds, and the mesh.
MODELS = {
    "gla and mamba": (
        dict(mixer=GLAConfig(heads=2, gate_rank=4, conv_width=3, **REFERENCE),
             hybrid_mixer=MambaConfig(state_size=3, **REFERENCE)), dict(data=2, fsdp=2, context=2)),
    "delta_net and windows": (
        dict(mixer=DeltaNetConfig(heads=2, **REFERENCE), hybrid_mixer=AttentionConfig(heads=2, window=7)),
        dict(data=1, context=8)),
    "kda and attention": (
        dict(mixer=KDAConfig(heads=2, head_dim=8, **REFERENCE),
             hybrid_mixer=AttentionConfig(heads=2)), dict(data=1, context=4, tensor=2)),
    "tnl and gated_delta_net": (
        dict(mixer=LightningAttentionConfig(heads=2, lrpe=True, **REFERENCE), norm="simple_rms",
             hybrid_mixer=GatedDeltaNetConfig(heads=2, value_heads=4, head_dim=8, **REFERENCE)),
        dict(data=1, fsdp=2, context=2, tensor=2))}


def batch():
  tokens = np.random.default_rng(0).integers(0, VOCAB, (B, T + 1), np.int32)
  segment_ids = np.stack([np.repeat(np.arange(len(row)), row) for row in DOCUMENTS]).astype(np.int32)
  mask = np.pad(segment_ids[:, 1:] == segment_ids[:, :-1], ((0, 0), (0, 1)), constant_values=True)
  return dict(tokens=tokens[:, :-1], targets=tokens[:, 1:], segment_ids=segment_ids, mask=mask.astype(np.float32))


def value_and_gradients(fields):
  """Random parameters, and the function from them and a batch to the loss, its counts and the gradients."""
  config = ModelConfig(**dict(vocab_size=VOCAB, width=32, depth=2, hybrid_layers=(1,), mlp_width=0,
                              dtype="float32") | fields)
  model, rng = jax.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0))), np.random.default_rng(1)
  params = jax.tree.map(lambda leaf: rng.uniform(-0.3, 0.3, leaf.shape).astype(np.float32), nnx.state(model))
  return params, jit(jax.value_and_grad(functools.partial(loss_sum, nnx.graphdef(model)), has_aux=True))


@pytest.mark.parametrize("model", MODELS)
def test_parts_equal_one_device(model):
  fields, axes = MODELS[model]
  params, run = value_and_gradients(fields)
  expected = run(params, batch())
  mesh = sharding.make_mesh(MeshConfig(**axes), jax.devices()[:math.prod(axes.values())])
  with jax.set_mesh(mesh):
    arrays = (jax.device_put(params, sharding.param_shardings(params, mesh)),
              jax.device_put(batch(), sharding.batch_sharding(mesh)))
    program = run.lower(*arrays).compile()
  for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(program(*arrays)), jax.tree.leaves(expected),
                          strict=True):
    assert_close(jax.tree_util.keystr(path), x, y, 1e-5)
  if mesh.size == mesh.shape["context"]:
    assert_no_tokens_are_gathered(program.as_text(), mesh.size)


def assert_no_tokens_are_gathered(text, parts):
  """Where only sequences are split, devices exchange states, neighbours' tokens, and sums of gradients."""
  kinds = "all-gather|all-to-all|reduce-scatter|collective-permute"
  found = re.findall(rf" = f32\[([\d,]+)\]\S* ({kinds})(?:-start)?\(", text)
  summary = f"{B},2,16,32"  # of DeltaNet: K x (V + K) numbers per row and head
  assert set(found) == {(f"{parts},{summary}", "all-gather"), (f"1,{summary}", "reduce-scatter"),
                        (f"{B},3,32", "collective-permute"), (f"{B},6,2,16", "collective-permute")}


@pytest.mark.parametrize("window", [0, 61])  # 61 tokens lie on three of the parts of 40
def test_queries_of_a_part_attend_to_all_parts(window):
  mixer = build(AttentionConfig(heads=4, kv_heads=2, window=window), width=16, norm_eps=1e-6, dtype=jnp.float32,
                rngs=nnx.Rngs(0))
  x, do = np.random.default_rng(0).standard_normal((2, B, T, 16), np.float32)

  def run(mixer, x, ids):
    (y, _), pullback = jax.vjp(lambda mixer, x: mixer(x, None, ids), mixer, x)
    return y, pullback((do, None))

  expected = jit(run)(mixer, x, batch()["segment_ids"])
  with jax.set_mesh(sharding.make_mesh(MeshConfig(data=1, context=4, tensor=2))):
    actual = jit(run)(mixer, x, batch()["segment_ids"])
  for found, one in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
    assert_close("result", found, one, 1e-5)


def test_a_prompt_is_read_in_parts_and_continued():
  """Its 37 tokens divide by nothing: `generate` and the server pad them. The steps that follow run on every device."""
  config = ModelConfig(mixer=GLAConfig(heads=2, gate_rank=4, conv_width=3, **REFERENCE), hybrid_layers=(1,), depth=2,
                       hybrid_mixer=AttentionConfig(heads=2), vocab_size=VOCAB, width=32, mlp_width=0, dtype="float32")
  # Larger weights than at initialization, so that no two tokens are nearly as likely.
  model = jax.tree.map(lambda x: 3 * x, LanguageModel(config, rngs=nnx.Rngs(0)))
  prompt = np.random.default_rng(0).integers(0, VOCAB, (1, 37))
  expected = generate(model, prompt, 6, temperature=0.0)
  with jax.set_mesh(sharding.make_mesh(MeshConfig(data=1, context=8))):
    np.testing.assert_array_equal(generate(model, prompt, 6, temperature=0.0), expected)
    server = Server(model, rows=1, max_length=64)
    server.submit(Request(prompt[0], 6, Sampling(temperature=0.0)))
    tokens = [token for progress in server.finish() for token in progress.tokens]
  np.testing.assert_array_equal(tokens, expected[0])
