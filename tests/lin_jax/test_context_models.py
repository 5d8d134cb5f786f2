"""Whole models whose sequences are split over devices: loss and every gradient equal to one device's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lin_jax import sharding
from lin_jax.config import MeshConfig, ModelConfig
from lin_jax.mixers.attention import AttentionConfig
from lin_jax.mixers.delta_net import DeltaNetConfig
from lin_jax.mixers.gated_delta_net import GatedDeltaNetConfig
from lin_jax.mixers.gla import GLAConfig
from lin_jax.mixers.lightning_attention import LightningAttentionConfig
from lin_jax.mixers.mamba import MambaConfig
from lin_jax.model import LanguageModel
from lin_jax.training import loss_sum
from tests.close import assert_close

B, T, VOCAB = 4, 160, 50
DOCUMENTS = [1, 2, 15, 64, 65, 13], [80, 80], [160], [81, 79]
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
# The definitions of the ops compile fastest.
REFERENCE = dict(implementation="reference")

MODELS = {
    "gla": (dict(mixer=GLAConfig(heads=2, gate_rank=4, conv_width=3, **REFERENCE)),
            dict(data=2, fsdp=2, context=2)),
    "delta_net with windows": (dict(mixer=DeltaNetConfig(heads=2, **REFERENCE), depth=2, hybrid_layers=(1,),
                                    hybrid_mixer=AttentionConfig(heads=2, window=7)), dict(data=1, context=2)),
    "tnl": (dict(mixer=LightningAttentionConfig(heads=2, lrpe=True, **REFERENCE), mlp="sglu", norm="simple_rms"),
            dict(data=2, context=2, tensor=2)),
    "mamba": (dict(mixer=MambaConfig(state_size=3, **REFERENCE)), dict(data=1, fsdp=2, context=4)),
    "gated_delta_net": (dict(mixer=GatedDeltaNetConfig(heads=2, value_heads=4, head_dim=8, **REFERENCE)),
                        dict(data=1, fsdp=2, context=2, tensor=2)),
    "attention": (dict(mixer=AttentionConfig(heads=4, kv_heads=2)), dict(data=1, context=4, tensor=2))}


def batch():
  tokens = jax.random.randint(jax.random.key(1), (B, T + 1), 0, VOCAB)
  segment_ids = jnp.asarray(np.stack([np.repeat(np.arange(len(row)), row) for row in DOCUMENTS]), jnp.int32)
  mask = jnp.pad(segment_ids[:, 1:] == segment_ids[:, :-1], ((0, 0), (0, 1)), constant_values=True)
  return dict(tokens=tokens[:, :-1], targets=tokens[:, 1:], segment_ids=segment_ids, mask=mask.astype(jnp.float32))


def value_and_gradients(fields):
  """The parameters' initializer, and the function from them and a batch to the loss, its counts and the gradients."""
  config = ModelConfig(**dict(vocab_size=VOCAB, width=32, depth=1, mlp_width=48, dtype="float32") | fields)
  init = lambda: LanguageModel(config, rngs=nnx.Rngs(0))
  graph = nnx.graphdef(jax.eval_shape(init))
  return lambda: nnx.state(init()), jax.value_and_grad(functools.partial(loss_sum, graph), has_aux=True)


@pytest.mark.parametrize("model", MODELS)
def test_parts_equal_one_device(model):
  fields, axes = MODELS[model]
  init, run = value_and_gradients(fields)
  params = init()
  expected = jit(run)(params, batch())
  mesh = sharding.make_mesh(MeshConfig(**axes), jax.devices()[:int(np.prod(list(axes.values())))])
  with jax.set_mesh(mesh):
    placed = jax.device_put(params, sharding.param_shardings(params, mesh))
    actual = jit(run)(placed, jax.device_put(batch(), sharding.batch_sharding(mesh)))
  for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
    assert_close(jax.tree_util.keystr(path), x, y, 1e-5)
