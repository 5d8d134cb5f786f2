"""The collectives of compiled training steps, counted from their programs and by hand."""

import math

import jax
import jax.numpy as jnp
import pytest

from lin_jax import sharding, training
from lin_jax.config import DataConfig, MeshConfig, ModelConfig, TrainConfig
from lin_jax.mixers.gated_delta_net import GatedDeltaNetConfig
from lin_jax.mixers.gla import GLAConfig
from speed.collectives import collectives, totals

B, T, LAYERS, PARTS = 2, 32, 2, 4
HEADS, K, V, TAPS = 2, 8, 16, 4


def compiled_step(mixer, **axes):
  """The compiled training step of a tiny model on a mesh, and the bytes of its parameters by name."""
  config = TrainConfig(
      model=ModelConfig(mixer=mixer, vocab_size=96, width=32, depth=LAYERS, mlp_width=0, tie_embeddings=False,
                        dtype="float32"),
      data=DataConfig(sequence_length=T, batch_size=B), mesh=MeshConfig(**axes))
  mesh = sharding.make_mesh(config.mesh, jax.devices()[:math.prod(axes.values())])
  graph, optimizer, state, _ = training.make_state(config, mesh)
  fields = dict(tokens=jnp.int32, targets=jnp.int32, segment_ids=jnp.int32, mask=jnp.float32)
  batch = {field: jax.ShapeDtypeStruct((B, T), dtype, sharding=sharding.batch_sharding(mesh))
           for field, dtype in fields.items()}
  with jax.set_mesh(mesh):
    program = training.make_train_step(config, graph, optimizer, state).lower(state, batch).compile()
  leaves = jax.tree_util.tree_leaves_with_path(state.params)
  return program.as_text(), {jax.tree_util.keystr(path): 4 * leaf.size for path, leaf in leaves}


def test_gated_delta_net_over_four_parts():
  """States and neighbours' inputs cross in both passes of a layer, segment ids once, the gradients once per layer."""
  text, sizes = compiled_step(
      GatedDeltaNetConfig(heads=HEADS, head_dim=K, conv_width=TAPS, implementation="reference"), data=1, context=PARTS)
  states = 4 * B * HEADS * K * (V + K)  # of one part: U, and D as a matrix
  inputs = 4 * B * (TAPS - 1) * HEADS * (2 * K + V)  # of the convolutions of queries, keys and values
  assert totals(collectives(text)) == {
      "all-gather": (LAYERS + 1, LAYERS * PARTS * states + PARTS * 12 * B),
      "reduce-scatter": (LAYERS, LAYERS * states),
      "collective-permute": (2 * 3 * LAYERS + 1, 2 * LAYERS * inputs + 4 * B * (TAPS - 1)),
      "all-reduce": (LAYERS + 1, sum(sizes.values()))}


def test_gla_over_data_and_parts():
  """Half of the rows halve what parts exchange. For a CPU, XLA sums a product's gradient over one axis at a time."""
  text, sizes = compiled_step(GLAConfig(heads=HEADS, gate_rank=4, implementation="reference"), data=2, context=PARTS)
  states = 4 * B // 2 * HEADS * K * (V + 1)
  once = sum(size for name, size in sizes.items() if "head" in name or ("'mixer'" in name and "scale" in name))
  assert totals(collectives(text)) == {
      "all-gather": (LAYERS + 1, LAYERS * PARTS * states + PARTS * 12 * B // 2),
      "reduce-scatter": (LAYERS, LAYERS * states),
      "all-reduce": (3 * (LAYERS + 1), 2 * sum(sizes.values()) - once)}


@pytest.mark.parametrize("result, expected", [
    ("((bf16[3,5]{1,0}), bf16[3,5]{1,0}) all-reduce-start(", (1, 30)),
    ("(f32[2]{0}, f32[], s8[7]{0}) all-reduce(", (1, 15)), ("f32[] all-reduce(", None)])
def test_forms_of_results(result, expected):
  text = f"ENTRY %main (x: f32[]) -> f32[] {{\n  %a = {result}%x), replica_groups={{{{0,1}}}}"
  assert totals(collectives(text)) == ({} if expected is None else {"all-reduce": expected})


def test_loops_within_loops_multiply():
  text = "\n".join([
      "%inner (x: f32[4]) -> f32[4] {", "  %a = f32[4]{0} all-gather(%x), replica_groups={{0,1}}", "}",
      "%outer (x: f32[4]) -> f32[4] {",
      '  %w = f32[4] while(%x), body=%inner, backend_config={"known_trip_count":{"n":"3"}}', "}",
      "ENTRY %main (x: f32[4]) -> f32[4] {",
      '  %v = f32[4] while(%x), body=%outer, backend_config={"known_trip_count":{"n":"5"}}', "}"])
  assert totals(collectives(text)) == {"all-gather": (15, 240)}
