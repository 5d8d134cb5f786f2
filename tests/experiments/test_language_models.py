"""The language models that are compared: sizes, and what they share."""

import jax

from language.models import COMPARED, CONVOLUTIONS, DECAYS, MODELS, WIDE
from lin_jax.model import abstract_model, parameter_count


def test_sizes_are_matched():
  counts = {name: parameter_count(MODELS[name]()) for name in (*COMPARED, *DECAYS, *CONVOLUTIONS, "deltanet_l1_elu1",
                                                                 "supra")}
  assert max(counts.values()) / min(counts.values()) <= 1.02 and 38e6 < min(counts.values())
  wide = {name: parameter_count(MODELS[name]()) for name in WIDE}
  assert max(wide.values()) / min(wide.values()) <= 1.04 and 134e6 < min(wide.values())
  assert {make().vocab_size * make().width for name, make in MODELS.items() if name not in WIDE} == {32000 * 512}
  # The state that a layer hands on is the same for those that the papers compare at one size.
  states = {name: jax.eval_shape(lambda name=name: abstract_model(MODELS[name]()).init_state(1, 1))
            for name in ("gla", "deltanet", "gated_deltanet", *DECAYS)}
  assert {name: state[0][0]["memory"].size for name, state in states.items()} == dict.fromkeys(
      states, 8 * 4 * 128 * 128)


def test_gates_differ_in_the_decay_alone():
  shapes = {name: {path: leaf.shape for path, leaf in _parameters(name).items() if "decay" not in path}
            for name in (*DECAYS, "gla")}
  assert all(value == shapes["gla"] for value in shapes.values())
  assert len({tuple(sorted(_parameters(name))) for name in shapes}) == 3  # a constant has no parameters either


def _parameters(name):
  leaves = jax.tree_util.tree_leaves_with_path(abstract_model(MODELS[name]()))
  return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}
