"""Decoding: prepared weights give the logits of the plain ones, and the loop over tokens casts none of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lin_jax import mixers
from lin_jax.config import LoraConfig, ModelConfig
from lin_jax.decoding import Columns, Decoder, in_order, stacked
from lin_jax.generate import Sampling, decode
from lin_jax.layers import RMSNorm
from lin_jax.lora import add_adapters
from lin_jax.mixers.attention import AttentionConfig
from lin_jax.mixers.gla import GLAConfig
from lin_jax.model import LanguageModel
from tests.close import assert_close

VOCABULARY, BATCH, STEPS = 50, 2, 6
HYBRID = dict(mixer=GLAConfig(heads=2), hybrid_mixer=AttentionConfig(heads=4), hybrid_layers=(1,), depth=4)
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def build(**fields):
  config = ModelConfig(**dict(vocab_size=VOCABULARY, width=32, depth=2, mlp_width=48, dtype="bfloat16") | fields)
  return LanguageModel(config, rngs=nnx.Rngs(0))


def plain_step(lm, tokens, states):
  """The recurrent form with the weights as they are stored."""
  x, after = lm.embed(tokens), []
  for block, state in zip(in_order(lm.placed_runs()), states, strict=True):
    y, state = block.mixer.step(block.mixer_norm(x), state)
    x = block.mlp_branch(x + y)
    after.append(state)
  return lm.logits(lm.norm(x)), after


# A wider product may sum in another order, which moves a few of the bfloat16 values by a unit of the last place.
BOUNDS = {"float32": 1e-5, "bfloat16": 5e-3}


@pytest.mark.parametrize("mixer, batch, dtype", [
    *((mixer, BATCH, "float32") for mixer in mixers.MIXERS),
    *((mixer, batch, "bfloat16") for mixer in ("gla", "attention") for batch in (1, BATCH))])
def test_prepared_weights_give_the_same_logits(mixer, batch, dtype):
  lm = build(mixer=mixers.config_class(mixer).examples()[-1], dtype=dtype)
  plain, prepared = jit(plain_step), jit(lambda lm, tokens, states: Decoder(lm).step(tokens, states))
  states = expected = in_order(lm.init_state(batch, STEPS))
  for token in np.random.default_rng(0).integers(VOCABULARY, size=(STEPS, batch)):
    logits, states = prepared(lm, token, states)
    expected_logits, expected = plain(lm, token, expected)
    assert_close("logits", logits, expected_logits, BOUNDS[dtype])
  assert jax.tree.map(jnp.shape, states) == jax.tree.map(jnp.shape, expected)


def test_adapters_count():
  lm = add_adapters(build(mixer=AttentionConfig(heads=2), dtype="float32"), LoraConfig(rank=2), rngs=nnx.Rngs(1))
  lm = jax.tree.map(lambda x: x + 0.1, lm)  # an adapter starts with a B of zeros
  tokens, states = np.array([3, 7]), in_order(lm.init_state(BATCH, STEPS))
  logits = jit(lambda lm, tokens, states: Decoder(lm).step(tokens, states)[0])(lm, tokens, states)
  assert_close("logits", logits, jit(plain_step)(lm, tokens, states)[0], 1e-5)


def test_layers_are_taken_apart_and_stacked_again():
  lm = build(**HYBRID)
  state = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape).astype(x.dtype),
                       lm.init_state(BATCH, STEPS))
  names = [mixers.name_of(config) for config in [HYBRID["mixer"], HYBRID["hybrid_mixer"], *[HYBRID["mixer"]] * 2]]
  assert [type(block.mixer) for block in in_order(lm.runs)] == [mixers.MIXERS[name] for name in names]
  jax.tree.map(np.testing.assert_array_equal, stacked(in_order(state), state), state)


def test_projections_of_one_input_share_a_product():
  gla, attention = (in_order(build(**HYBRID).runs), Decoder(build(**HYBRID)).blocks)[1][:2]

  def joint(module):
    columns = {name: layer for name, layer in vars(module).items() if isinstance(layer, Columns)}
    shared = lambda layer: sum(layer.transposed is other.transposed for other in columns.values()) > 1
    return {name for name, layer in columns.items() if shared(layer)}

  assert joint(gla.mixer) == {"query", "key", "value", "gate", "decay_in"}
  assert joint(attention.mixer) == {"query", "key", "value"} and joint(gla.mlp) == {"gate", "up"}


def test_programs_hand_on_a_shared_matrix_once():
  decoder = jax.eval_shape(Decoder, build(**HYBRID))
  mixer = decoder.blocks[0].mixer
  assert mixer.query.transposed is mixer.key.transposed is not mixer.output.transposed
  arrays = jax.tree.leaves(decoder)
  assert len(arrays) == len(set(map(id, arrays))) < len(jax.tree.leaves((decoder.model, decoder.blocks)))
  assert not jax.tree.leaves(decoder.model.runs)


def test_norms_of_one_plus_their_scale_become_plain_ones():
  norms = lambda blocks: [m for block in blocks for _, m in nnx.iter_modules(block) if isinstance(m, RMSNorm)]
  attention = AttentionConfig(heads=4, qk_norm="head", qk_norm_offset=True)

  def prepared():
    lm = build(mixer=attention, norm="rms_offset")
    decoder = Decoder(lm)
    return in_order(lm.runs), decoder.blocks, decoder.model.norm

  plain, blocks, last = jax.eval_shape(prepared)
  assert [norm.offset for norm in norms(plain)] == [1] * 8
  assert [norm.offset for norm in norms(blocks)] == [0] * 8 and last.offset == 0


def test_the_loop_reads_weights_of_the_compute_dtype_and_casts_none():
  lm = build(mixer=GLAConfig(heads=2), vocab_size=1000)
  run = lambda lm, logits, state: decode(lm, logits, state, jax.random.key(0), STEPS, Sampling(temperature=0))
  jaxpr = jax.make_jaxpr(run)(lm, jnp.zeros((BATCH, 1000)), lm.init_state(BATCH, STEPS)).jaxpr
  loop, = (eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan")
  # Nothing is stacked, because a copy into a stack is no part of the CUDA graph of the loop's body.
  assert [var.aval.shape for var in loop.outvars] == [var.aval.shape for var in loop.params["jaxpr"].outvars]
  matrices = [var.aval for var in loop.invars if var.aval.ndim == 2 and var.aval.shape[0] != BATCH]
  wide = [x.shape for x in matrices if x.dtype == jnp.float32]
  assert len(matrices) > 8 and wide == [(64, 16)] * 2  # the second factor of GLA's gates stays float32
  casts = [eqn.invars[0].aval for eqn in loop.params["jaxpr"].eqns if eqn.primitive.name == "convert_element_type"]
  # The norm over two heads has its activations as rows.
  assert casts and all(x.ndim < 2 or x.shape[0] in (BATCH, 2 * BATCH) for x in casts), casts
