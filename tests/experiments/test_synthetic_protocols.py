"""The protocols of MQAR's, MAD's and RegBench's authors: how kernels start, heads and decoders, measures, selection."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lin_jax.layers import Linear
from synthetic import starts
from synthetic.answerer import Answerer
from synthetic.batch import Batch
from synthetic.runs import Run
from synthetic.scores import batch_class_accuracy
from synthetic.training import _selected, train

INPUTS, OUTPUTS, DEPTH = 128, 64, 2
FAN_IN, XAVIER = (3 * INPUTS) ** -0.5, 2**-2.5 * (2 / (INPUTS + OUTPUTS)) ** 0.5


class Projections(nnx.Module):
  """Two stacked layers, named like those of a mixer, beside one of an MLP."""

  def __init__(self, rngs):
    one = lambda key: Linear(INPUTS, OUTPUTS, (None, None), dtype="float32", rngs=nnx.Rngs(key),
                             init=nnx.initializers.constant(7.0))
    make = lambda: jax.vmap(one)(jax.random.split(rngs.params(), DEPTH))
    self.mixer = nnx.Dict(query=make(), output=make(), dt=make())
    self.mlp = nnx.Dict(up=make())


@pytest.mark.parametrize("start, mixer, encodes, query, output, dt, up", [
    ("layers", "gla", False, None, None, None, None),
    ("normal", "gla", False, 0.02, 0.02, 0.02, 0.02),
    ("fan_in", "gla", False, FAN_IN, FAN_IN, FAN_IN, FAN_IN),
    ("zoology", "delta_net", False, 0.02, 0.02, 0.02, 0.02),
    ("zoology", "attention", False, 0.02, 0.02 / 2, 0.02, 0.02),
    ("zoology", "mamba", False, FAN_IN, FAN_IN / 2**0.5, None, FAN_IN),
    ("mad", "delta_net", False, FAN_IN, FAN_IN, FAN_IN, FAN_IN),
    ("mad", "gla", False, XAVIER, XAVIER, XAVIER, FAN_IN),
    ("mad", "retention", False, None, None, None, FAN_IN),
    ("mad", "mamba", False, FAN_IN, FAN_IN, None, FAN_IN),
    ("mad", "mamba", True, 0.02, 0.02, 0.02, 0.02)])
def test_kernels_start_as_the_authors_have_it(start, mixer, encodes, query, output, dt, up):
  module = Projections(nnx.Rngs(0))
  starts.draw(start, module, mixer, DEPTH, encodes, nnx.Rngs(1))
  for layer, deviation in ((module.mixer["query"], query), (module.mixer["output"], output), (module.mixer["dt"], dt),
                           (module.mlp["up"], up)):
    kernel = np.asarray(layer.kernel[...])
    if deviation is None:
      assert (kernel == 7).all()  # the layer's own
      continue
    assert kernel.std() == pytest.approx(deviation, rel=0.03) and abs(kernel.mean()) < 0.03 * deviation
    assert (kernel[0] != kernel[1]).all()  # no two layers of a stack start with the same numbers
    uniform = start in ("zoology", "mad") and deviation not in (0.02, 0.01)
    assert (np.abs(kernel).max() < 1.75 * deviation) == uniform


def answerer(task, mixer, output="mad", **fields):
  run = Run(task, mixer, mixer_fields=fields, width=16, mlp_width=44, output=output, start="mad")
  decodes = getattr(run.build_task(), "decodes_last", False)
  return lambda: Answerer(run.train_config().model, decodes, run.start, output=run.output, rngs=nnx.Rngs(0))


def test_mads_model_has_a_head_of_its_own_and_its_encoder_a_decoder_in_place_of_the_last_norm():
  shapes = lambda *arguments, **fields: {".".join(map(str, path)): leaf.shape for path, leaf in nnx.to_flat_state(
      nnx.state(jax.eval_shape(answerer(*arguments, **fields))))}
  model = shapes("memorization", "gla", heads=2, expand_k=1.0)
  assert model["head.kernel"] == (16, 256) and model["head.bias"] == (256,) and model["model.norm.scale"] == (16,)
  assert model["model.runs.0.0.mixer.query.kernel"] == (2, 16, 16)
  assert model["model.runs.0.0.mlp.up.kernel"] == (2, 16, 44)
  assert not any(name.startswith(("decoder", "norms", "model.head")) for name in model)
  encoder = shapes("compression", "gla", heads=2)
  assert {name: shape for name, shape in encoder.items() if name.startswith(("decoder", "norms", "head"))} == {
      "decoder.0.kernel": (16, 16), "decoder.0.bias": (16,), "decoder.1.kernel": (16, 16), "decoder.1.bias": (16,),
      "norms.0.scale": (16,), "norms.1.scale": (16,), "norms.2.scale": (16,), "head.kernel": (16, 16),
      "head.bias": (16,)}
  assert "model.norm.scale" not in encoder and "model.norm.scale" in shapes("compression", "gla", "tied", heads=2)


def test_mads_decoder_reads_the_last_output_and_the_position_through_three_norms_and_two_gelus():
  model = answerer("compression", "attention", heads=2)()
  stream = 3 * np.random.default_rng(0).normal(size=(2, 5, 16)).astype(np.float32)
  model.model.hidden_from_embeddings = lambda x: (model.model.norm(stream), None)
  positions = np.array([[0, 1, 4], [2, 0, 3]], np.int32)
  found = np.asarray(model(jnp.zeros((2, 5), jnp.int32), jnp.asarray(positions)))
  norm = lambda x: x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6)
  gelu = lambda x: x * 0.5 * (1 + np.vectorize(math.erf)(x / 2**0.5))
  angles = positions[..., None] * np.exp(-np.log(10000) / 7 * np.arange(8))
  x = stream[:, -1:] + np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)
  for layer in model.decoder:
    x = gelu(norm(x) @ np.asarray(layer.kernel[...]))  # biases start at 0
  np.testing.assert_allclose(found, norm(x), atol=1e-4)
  logits = found @ np.asarray(model.head.kernel[...])
  np.testing.assert_allclose(model.logits(found), logits, atol=1e-6)
  targets, weights = np.array([[1, 2, 3], [4, 5, 6]], np.int32), np.array([[1, 0, 1], [0, 0, 1]], np.float32)
  losses = np.log(np.exp(logits).sum(axis=-1)) - np.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  loss = model.loss(*map(jnp.asarray, (found, targets, weights)))
  assert float(loss) == pytest.approx((losses * weights).sum() / 3, abs=1e-5)


def test_mads_protocol_trains_its_weight_decays_side_by_side():
  run = Run("compression", "attention", {"sequence_length": 8}, {"heads": 2}, width=32, depth=1, mlp_width=88,
            start="mad", output="mad", norm_eps=1e-5, learning_rate=1e-2, batch_size=64, steps=90, evaluate_every=30,
            test_examples=128, examples=256)
  plain, decayed = train([run, dataclasses.replace(run, weight_decay=0.9)])
  for result in (plain, decayed):
    assert result["curve"][-1][1] < 0.95 * result["curve"][0][1] and 0 < result["batch_class_accuracy"] < 1
  assert plain["curve"] != decayed["curve"] and plain["side_by_side"] == 2


def test_mads_measure_is_the_mean_over_batches_of_the_mean_over_classes():
  targets = np.array([[1, 1, 2], [1, 0, 0], [2, 2, 0], [2, 3, 3], [1, 1, 1]], np.int32)
  mask = np.array([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1], [1, 1, 1]], np.float32)
  said = np.array([[1, 0, 2], [1, 5, 5], [2, 3, 9], [2, 3, 1], [1, 1, 2]], np.int32)
  batch = Batch(np.zeros_like(targets), targets, mask)
  # Of the first two examples: token 0 is said but never a target; 1 is right in 2 of 3, and 2 always. Of the next two:
  # 1 is said but never a target; 2 is right in 2 of 3, and 3 in 1 of 2. Of the last: 1 in 2 of 3, and 2 never.
  expected = [(0 + 2 / 3 + 1) / 3, (0 + 2 / 3 + 1 / 2) / 3, (2 / 3 + 0) / 2]
  assert batch_class_accuracy(said, batch, 2) == pytest.approx(np.average(expected, weights=[2, 2, 1]))


def test_the_validation_loss_selects_the_test():
  tests = [{"step": 1, "validation_loss": 0.7, "accuracy": 0.1}, {"step": 2, "validation_loss": 0.5, "accuracy": 0.3},
           {"step": 3, "validation_loss": None, "accuracy": 0.9}]
  assert _selected(tests)["accuracy"] == 0.3 and _selected(tests[2:]) is None


def test_wrong_protocols_are_refused():
  for field, value, message in (("start", "best", "start='best': must be one of layers, normal, fan_in, zoology, mad"),
                                ("output", "own", "output='own': must be one of tied, mad"),
                                ("validation_examples", -1, "validation_examples=-1: must be at least 0")):
    with pytest.raises(ValueError, match=message):
      Run("mqar", "gla", **{field: value}).train_config()
