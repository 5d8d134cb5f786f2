"""What each remat policy saves, computes again and costs: gradients, bytes, products and GPU kernels."""

import collections
import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.experimental import pallas
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from kernels import dispatch
from lin_jax import mixers, model
from lin_jax.config import REMAT_POLICIES, ModelConfig
from lin_jax.mixers.gla import GLAConfig
from lin_jax.model import LanguageModel
from tests.close import assert_close

BATCH, TIME, VOCAB = 2, 32, 50


def config(mixer, **fields):
  return ModelConfig(**dict(mixer=mixer, vocab_size=VOCAB, width=32, depth=2, mlp_width=48, dtype="float32") | fields)


def build(config, **kwargs):
  return LanguageModel(config, rngs=nnx.Rngs(0), **kwargs)


def under(policy, graph, params):
  """A model that was built once for all policies."""
  lm = nnx.merge(graph, params)
  lm.remat = policy
  return lm


def test_remat_table_covers_the_config():
  assert tuple(model.REMAT) == REMAT_POLICIES
  for policy in REMAT_POLICIES:
    assert jax.eval_shape(lambda policy=policy: build(config(GLAConfig()), remat=policy)).remat == policy
  with pytest.raises(ValueError, match="remat='some'"):
    build(config(GLAConfig()), remat="some")


@functools.cache
def remat(name):
  """For each policy: the program of a model's gradients and saved arrays, traced, and the bytes of the latter."""
  small, results = config(mixers.config_class(name).examples()[0]), {}
  ids = jax.random.randint(jax.random.key(1), (BATCH, TIME), 0, VOCAB)
  graph, shapes = nnx.split(model.abstract_model(small))
  for policy in REMAT_POLICIES:
    def loss(params, policy=policy):
      # The sum of squares of normed activations is nearly constant, so its gradient would be little but rounding.
      return jnp.sin(under(policy, graph, params).hidden(ids)[0]).sum()

    def run(params, loss=loss):
      value, pullback = jax.vjp(loss, params)
      return pullback(jnp.ones_like(value)), pullback

    traced = jax.jit(run).trace(shapes)
    results[policy] = traced, sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(traced.out_info[1]))
  return results


def test_remat_gradients_are_equal():
  params = nnx.state(build(config(GLAConfig.examples()[0])))
  gradients = {policy: jax.tree.leaves(traced.lower().compile()(params)[0])
               for policy, (traced, _) in remat("gla").items()}
  for policy in REMAT_POLICIES[1:]:
    for actual, expected in zip(gradients[policy], gradients["none"], strict=True):
      assert_close(policy, actual, expected, 1e-5)


@pytest.mark.parametrize("name", list(mixers.MIXERS))
def test_remat_trades_memory_for_products(name):
  results = remat(name)
  saved = [results[policy][1] for policy in ("none", "mixer", "dots", "full")]
  print("bytes", saved)
  assert saved == sorted(saved, reverse=True) and len(set(saved)) == 4
  products = {policy: sum(eqn.primitive.name == "dot_general" for eqn in equations(traced.jaxpr))
              for policy, (traced, _) in results.items()}
  print("products", products)
  assert products["none"] <= products["mixer"] <= products["dots"] < products["full"]


H100 = AbstractMesh((), (), abstract_device=AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu"))

# Kernels that remat runs again on purpose, because their results cost less time than memory.
ELEMENTWISE = "rms_norm", "short_convolution", "skip_gate_norm", "swiglu"


@pytest.mark.parametrize("name", list(mixers.MIXERS))
def test_remat_runs_no_kernel_twice(name, monkeypatch):
  # The forward and backward kernels of one layer for a GPU, whose cuDNN nobody asks for its version here.
  monkeypatch.setattr(dispatch, "platform", lambda: "cuda")
  monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)
  monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_compute_capability", lambda capability: True)
  monkeypatch.setattr("lin_jax.mixers.packed_attention.check_compute_capability", lambda capability: True)
  monkeypatch.setattr(pallas, "pallas_call", functools.partial(without_body, pallas.pallas_call))
  small = config(mixers.config_class(name).examples()[0], dtype="bfloat16", width=64)
  (graph, params), ids = nnx.split(model.abstract_model(small)), jax.ShapeDtypeStruct((BATCH, 64), jnp.int32)

  def kernels(remat):
    loss = lambda params, ids: jnp.square(under(remat, graph, params).hidden(ids, segment_ids=ids)[0]).sum()
    with use_abstract_mesh(H100):
      jaxpr = jax.make_jaxpr(jax.grad(loss))(params, ids).jaxpr
    return collections.Counter(name for name in launches(jaxpr) if not name.startswith(ELEMENTWISE))

  plain, full = kernels("none"), kernels("full")
  assert plain == kernels("dots") == kernels("mixer"), plain
  assert full.total() > plain.total() > 0, (plain, full)


def without_body(pallas_call, body, **options):
  """The launch of a kernel that does nothing: what a kernel computes decides nothing here, and takes long to trace."""
  return pallas_call(lambda *refs: None, **options)


def launches(jaxpr):
  """The names of all kernels that a program launches, from this library and from cuDNN."""
  for eqn in equations(jaxpr):
    if eqn.primitive.name == "pallas_call" and not eqn.params["interpret"]:
      yield eqn.params["name"]
    elif eqn.primitive.name.startswith("dot_product_attention"):
      yield eqn.primitive.name


def equations(jaxpr):
  """All equations of a program and of the programs inside of it, but for those inside of a kernel."""
  for eqn in jaxpr.eqns:
    yield eqn
    if eqn.primitive.name != "pallas_call" and not eqn.primitive.name.startswith("dot_product_attention"):
      for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
        inner = getattr(inner, "jaxpr", inner)
        if hasattr(inner, "eqns"):
          yield from equations(inner)
