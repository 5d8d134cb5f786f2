"""Placement on 8 fake devices: rules, shardings of every leaf, and 1 device = 8 devices."""

import contextlib
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lin_jax import mixers, sharding
from lin_jax.config import DataConfig, MeshConfig, ModelConfig, OptimConfig, TrainConfig
from lin_jax.mixers.attention import AttentionConfig
from lin_jax.mixers.gated_delta_net import GatedDeltaNetConfig
from lin_jax.mixers.gla import GLAConfig
from lin_jax.model import LanguageModel
from tests.close import assert_close, relative_error

VOCAB, TIME = 50, 16
MIXERS = [pytest.param(mixers.config_class(name).examples()[-1], id=name) for name in mixers.MIXERS]
BATCH = ("data", "fsdp")
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture(scope="module")
def mesh():
  return sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))


def initializer(mixer):
  config = ModelConfig(mixer=mixer, vocab_size=VOCAB, width=32, depth=2, mlp_width=48, tie_embeddings=False,
                       dtype="float32")
  return lambda: LanguageModel(config, rngs=nnx.Rngs(0), remat="dots")


def batch():
  tokens = jax.random.randint(jax.random.key(1), (4, TIME), 0, VOCAB)
  segment_ids = jnp.cumsum(jnp.arange(TIME)[None] % jnp.array([[5], [6], [7], [99]]) == 0, axis=1)
  return tokens, segment_ids


def gradients(lm, tokens, segment_ids):
  def loss(lm):
    logits, _ = lm(tokens, segment_ids=segment_ids)
    return jax.nn.log_softmax(logits)[:, :, 3].mean(), logits

  return jax.grad(loss, has_aux=True)(lm)


@pytest.mark.parametrize("mixer", MIXERS)
def test_eight_devices_equal_one(mesh, mixer):
  init = initializer(mixer)
  expected_gradients, expected = jit(gradients)(init(), *batch())
  with jax.set_mesh(mesh):
    placement = sharding.param_shardings(jax.eval_shape(init), mesh)
    lm = jit(init, out_shardings=placement)()
    rows = sharding.batch_sharding(mesh)
    run = jit(gradients, out_shardings=(placement, rows))
    actual_gradients, actual = run(lm, *jax.device_put(batch(), rows))
  assert_close("logits", actual, expected, 1e-6)
  leaves = jax.tree_util.tree_leaves_with_path(actual_gradients)
  for (path, leaf), expected in zip(leaves, jax.tree.leaves(expected_gradients), strict=True):
    assert_close(jax.tree_util.keystr(path), leaf, expected, 1e-5)


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_single_row_runs_on_eight_devices(mesh, mixer):
  init, ids = initializer(mixer), batch()[0][:1]
  lm = init()

  def decode(lm, ids):
    logits, state = lm(ids, lm.init_state(1, 2 * TIME))
    # Collectives of the step that wait for nothing would hold the threads that those of the prefill need: with as many
    # threads as devices, XLA's CPU backend then hangs.
    ids, state = jax.lax.optimization_barrier((ids, state))
    return logits, lm.step(ids[:, 0], state)[0]

  run = jit(decode)
  expected, rounded = run(lm, ids), run(moved_by_rounding(lm), ids)
  with jax.set_mesh(mesh):
    lm = jax.device_put(lm, sharding.param_shardings(lm, mesh))
    actual = jit(decode)(lm, ids)
  for name, found, one, near in zip(("prefill", "step"), actual, expected, rounded, strict=True):
    assert_close(name, found, one, max(1e-6, relative_error(near, one)))


def moved_by_rounding(lm):
  """The model with each parameter left, or moved up or down by 2^-23 of it, a unit of float32's last place.

  Two orders of the same sums need agree no better than its outputs with those of `lm`. With several Householder
  matrices a token and no decay, Gated DeltaProduct's outputs differ by more than 1e-6.
  """
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda leaf: leaf * (1 + np.float32(2**-23) * rng.integers(-1, 2, leaf.shape, np.int8)), lm)


def test_every_parameter_and_moment_is_placed(mesh):
  init = initializer(GLAConfig(heads=4, gate_rank=4, conv_width=2))
  optimizer = optax.adamw(1e-3)

  def init_all():
    params = nnx.state(init())
    return params, optimizer.init(params)

  shardings = sharding.param_shardings(jax.eval_shape(init_all), mesh)
  params, opt_state = jit(init_all, out_shardings=shardings)()
  columns, rows, whole = P(None, "fsdp", "tensor"), P(None, "tensor", "fsdp"), P(None, None)
  expected = {
      "embedding": P("tensor", "fsdp"), "head": P("fsdp", "tensor"), "norm.scale": P(None),
      "mixer.query.kernel": columns, "mixer.key.kernel": columns, "mixer.value.kernel": columns,
      "mixer.gate.kernel": columns, "mixer.output.kernel": rows, "mixer.norm.scale": whole,
      "mixer.decay_in.kernel": P(None, "fsdp", None), "mixer.decay_out.kernel": P(None, None, "tensor"),
      "mixer.decay_out.bias": P(None, "tensor"), "mixer.convolutions.0.kernel": P(None, None, "tensor"),
      "mixer.convolutions.1.kernel": P(None, None, "tensor"), "mixer.convolutions.2.kernel": P(None, None, "tensor"),
      "mixer_norm.scale": whole, "mlp_norm.scale": whole, "mlp.gate.kernel": columns, "mlp.up.kernel": columns,
      "mlp.down.kernel": rows,
  }

  def specs(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    names = [".".join(str(getattr(key, "key", getattr(key, "name", ""))) for key in path) for path, _ in leaves]
    names = [name.removesuffix(".value").removeprefix("runs.0.0.") for name in names]
    return {name: leaf.sharding for name, (_, leaf) in zip(names, leaves, strict=True)}, leaves

  moments = opt_state[0]
  for tree in (params, moments.mu, moments.nu):
    placed, leaves = specs(tree)
    assert placed.keys() == expected.keys()
    for (name, actual), (_, leaf) in zip(placed.items(), leaves, strict=True):
      assert actual.is_equivalent_to(NamedSharding(mesh, expected[name]), leaf.ndim), name
  assert moments.count.sharding.is_fully_replicated
  # A quarter of a matrix on each device.
  assert params["head"][...].addressable_shards[0].data.shape == (16, 25)


def test_an_indivisible_dimension_stays_whole(mesh):
  leaf = nnx.Param(jnp.zeros((51, 32)), out_sharding=("vocab", "embed"), eager_sharding=False)
  assert sharding.param_shardings({"x": leaf}, mesh)["x"].get_value().spec == P(None, "fsdp")


def test_ops_see_local_blocks_without_communication(mesh):
  from kernels import gla
  shapes = []

  def op(q, k, v, log_decay, state, segment_ids):
    shapes.append((q.shape, segment_ids.shape))
    return gla(q, k, v, log_decay, initial_state=state, segment_ids=segment_ids)

  op = sharding.map_over_heads(op, "bthk,bthk,bthv,bthk,bhkv,bt->bthv,bhkv")
  with jax.set_mesh(mesh):
    def place(shape, *spec):
      return jax.device_put(jnp.ones(shape), NamedSharding(mesh, P(BATCH, *spec)))
    q, k, v = (place((8, 16, 4, 8), None, "tensor") for _ in range(3))
    state, segment_ids = place((8, 4, 8, 8), "tensor"), place((8, 16)).astype(jnp.int32)
    text = jit(op).lower(q, k, v, -q, state, segment_ids).compile().as_text()
  assert shapes == [((2, 16, 2, 8), (2, 16))]
  assert not any(word in text for word in ("all-gather", "all-reduce", "all-to-all", "collective-permute"))


@pytest.mark.parametrize("tensor, key_heads, local", [(2, 4, 2), (2, 1, 1), (4, 2, 1), (4, 6, 3), (8, 6, 3)])
def test_key_heads_are_split_where_the_mesh_divides_them_and_repeated_where_not(tensor, key_heads, local):
  """`local` key heads reach each device, and each of its heads reads the key head that it reads on one device."""
  mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=1, tensor=tensor), jax.devices()[:tensor])
  keys, heads = np.arange(2.0 * key_heads).reshape(1, 2, key_heads), np.arange(48.0).reshape(1, 2, 24)
  shapes = []

  def op(keys, heads):
    shapes.append((keys.shape[2], heads.shape[2]))
    return jnp.repeat(keys, heads.shape[2] // keys.shape[2], axis=2) * heads

  run = jax.value_and_grad(lambda keys: jnp.sum(jnp.sin(sharding.map_over_heads(op, "btg,bth->bth")(keys, heads))))
  expected = run(keys)
  with jax.set_mesh(mesh):
    actual = jit(run)(keys)
  assert shapes == [(key_heads, 24), (local, 24 // tensor)]
  for x, y in zip(actual, expected, strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def test_map_over_heads_without_a_mesh_is_the_function():
  assert sharding.map_over_heads(lambda x, y: (x.shape, y), "bth,b->b")(jnp.ones((3, 5, 7)), None) == ((3, 5, 7), None)


def test_heads_must_divide(mesh):
  with jax.set_mesh(mesh), pytest.raises(ValueError, match="3 heads: not divisible by the mesh axis tensor=2"):
    sharding.map_over_heads(lambda x: x, "bthk->bthk")(jnp.ones((8, 1, 3, 1)))


def test_tokens_must_divide():
  mesh = sharding.make_mesh(MeshConfig(data=2, context=4))
  with jax.set_mesh(mesh), pytest.raises(ValueError, match="6 tokens: not divisible by the mesh axis context=4"):
    sharding.map_over_heads(lambda x: x, "bt->bt")(jnp.ones((8, 6)))


def test_a_single_token_is_no_part():
  seen = []
  op = sharding.map_over_heads(lambda x: seen.append((x.shape, sharding.time_parts())) or x, "bt->bt")
  with jax.set_mesh(sharding.make_mesh(MeshConfig(data=2, context=4))):
    for time in (1, 8):
      jax.eval_shape(op, jnp.ones((8, time)))
  assert seen == [((4, 1), 1), ((4, 2), 4)]


@pytest.mark.parametrize("axes, devices, shape", [
    ((-1, 1, 1), 8, (8, 1, 1, 1)), ((2, -1, 2), 8, (2, 2, 1, 2)), ((1, 1, 1), 1, (1, 1, 1, 1)),
    ((2, 4, -1), 8, (2, 4, 1, 1)), ((1, 1, 2, -1), 8, (1, 1, 4, 2))])
def test_mesh_shape(axes, devices, shape):
  assert sharding.mesh_shape(MeshConfig(*axes), devices) == shape


def test_make_mesh_takes_the_given_devices():
  mesh = sharding.make_mesh(MeshConfig(fsdp=2), jax.devices()[:4])
  assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "context": 1, "tensor": 1}
  assert mesh.axis_types == (jax.sharding.AxisType.Auto,) * 4


@pytest.mark.parametrize("mesh_axes, mixer, batch_size, accumulation, message", [
    ((2, 2, 1), GLAConfig(), 8, 1, "data=2 x fsdp=2 x context=1 x tensor=1 does not fit 8 devices"),
    ((3, -1, 1), GLAConfig(), 8, 1, "data=3 x fsdp=-1 x context=1 x tensor=1 does not fit 8 devices"),
    ((-1, -1, 1), GLAConfig(), 8, 1, "at most one axis may be -1"),
    ((4, 2, 1), GLAConfig(), 12, 1, r"batch_size=12 .* not divisible by data \* fsdp = 4 \* 2"),
    ((4, 2, 1), GLAConfig(), 16, 4, r"batch_size=16 .*accumulation=4 leaves 4 sequences"),
    ((1, 1, 8), GLAConfig(heads=4), 8, 1, "heads=4: not divisible by config.mesh.tensor=8"),
    ((1, 1, 1, 8), GLAConfig(), 8, 1, "sequence_length=2052: not divisible by config.mesh.context=8"),
    ((1, 2, 4), AttentionConfig(heads=8, kv_heads=2), 8, 1, "kv_heads=2: not divisible by config.mesh.tensor=4"),
])
def test_validate_mesh(mesh_axes, mixer, batch_size, accumulation, message):
  config = TrainConfig(model=ModelConfig(mixer=mixer), data=DataConfig(batch_size=batch_size, sequence_length=2052),
                       optim=OptimConfig(accumulation=accumulation), mesh=MeshConfig(*mesh_axes))
  with pytest.raises(ValueError, match=message):
    sharding.validate_mesh(config, 8)


@pytest.mark.parametrize("axes, processes, parts", [
    ((4, 2), 4, [(0, 4), (1, 4), (2, 4), (3, 4)]), ((2, 1, 2, 2), 2, [(0, 2), (1, 2)]),
    ((1, 2, 4), 4, [(0, 2), (0, 2), (1, 2), (1, 2)]), ((1, 1, 2, 4), 2, [(0, 1), (0, 1)])])
def test_processes_read_the_rows_that_their_devices_hold(monkeypatch, axes, processes, parts):
  owners = np.repeat(np.arange(processes), 8 // processes)
  shape = dict(zip(sharding.AXES, sharding.mesh_shape(MeshConfig(*axes), 8), strict=True))
  devices = np.array([types.SimpleNamespace(process_index=owner) for owner in owners]).reshape(*shape.values())
  for index, part in enumerate(parts):
    monkeypatch.setattr(jax, "process_index", lambda index=index: index)
    assert sharding.batch_part(types.SimpleNamespace(devices=devices, shape=shape)) == part


@pytest.mark.parametrize("axes, processes, carried, accepted", [
    ((2, 2, 2), 4, 1, True), ((2, 2, 2), 8, 1, True), ((2, 2, 2), 8, 2, False), ((2, 3, 1), 4, 1, False)])
def test_processes_must_read_equally_many_rows(monkeypatch, axes, processes, carried, accepted):
  config = TrainConfig(model=ModelConfig(mixer=GLAConfig()), mesh=MeshConfig(*axes),
                       data=DataConfig(batch_size=24, carried_windows=carried))
  monkeypatch.setattr(jax, "process_count", lambda: processes)
  with contextlib.nullcontext() if accepted else pytest.raises(ValueError, match=rf"by the {processes} processes, or"):
    sharding.validate_mesh(config, np.prod(axes))


def test_validate_mesh_accepts_fewer_key_heads_than_devices():
  mixer = GatedDeltaNetConfig(heads=2, value_heads=8)
  config = TrainConfig(model=ModelConfig(mixer=mixer), data=DataConfig(batch_size=8), mesh=MeshConfig(1, 2, 4))
  sharding.validate_mesh(config, 8)


def test_validate_mesh_accepts():
  config = TrainConfig(model=ModelConfig(mixer=AttentionConfig(heads=8)), data=DataConfig(batch_size=8),
                       mesh=MeshConfig(2, 2, 2))
  sharding.validate_mesh(config, 8)
  np.testing.assert_equal(sharding.mesh_shape(config.mesh, 8), (2, 2, 1, 2))
