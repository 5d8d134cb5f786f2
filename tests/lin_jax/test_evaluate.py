"""Held-out loss against a computation token by token, and its division into positions."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lin_jax import mixers, sharding
from lin_jax.config import MeshConfig, ModelConfig
from lin_jax.evaluate import evaluate
from lin_jax.model import LanguageModel

VOCABULARY, BATCH, TIME = 40, 3, 50


@pytest.fixture(scope="module")
def model():
  config = ModelConfig(mixer=mixers.config_class("gla")(heads=2, gate_rank=4), vocab_size=VOCABULARY, width=32, depth=2,
                       mlp_width=48, dtype="float32")
  return jax.tree.map(lambda x: 3 * x, LanguageModel(config, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def batches():
  random = np.random.default_rng(0)

  def batch():
    tokens = random.integers(VOCABULARY, size=(BATCH, TIME + 1), dtype=np.int32)
    # Documents of uneven length; the last token of each has no target.
    segments = 1 + np.cumsum(random.random((BATCH, TIME + 1)) < 0.05, axis=1, dtype=np.int32)
    return dict(tokens=tokens[:, :-1], targets=tokens[:, 1:], segment_ids=segments[:, :-1],
                mask=(segments[:, 1:] == segments[:, :-1]).astype(np.float32))

  return [batch(), batch()]


@pytest.fixture(scope="module")
def naive(model, batches):
  """(position in its document, loss) of every target, each document run through the recurrent form alone."""
  step = jax.jit(lambda model, token, state: model.step(token, state))
  losses = []
  for batch in batches:
    for row in range(BATCH):
      for segment in np.unique(batch["segment_ids"][row]):
        state = model.init_state(1, TIME)
        for position, t in enumerate(np.flatnonzero(batch["segment_ids"][row] == segment)):
          logits, state = step(model, jnp.asarray(batch["tokens"][row, t:t + 1]), state)
          if batch["mask"][row, t]:
            losses.append((position, -jax.nn.log_softmax(logits[0])[batch["targets"][row, t]]))
  return np.array([p for p, _ in losses]), np.array([loss for _, loss in losses], np.float64)


@pytest.mark.parametrize("width, piece, devices", [(0, 0, 1), (7, 0, 1), (7, 5, 1), (7, 10, 5)])
def test_equals_the_token_by_token_computation(model, batches, naive, width, piece, devices):
  """Also with the tokens of each piece split over devices."""
  position, loss = naive
  with jax.set_mesh(sharding.make_mesh(MeshConfig(data=1, context=devices), jax.devices()[:devices])):
    result = evaluate(model, batches, bytes_per_token=1.7, bucket_width=width, piece=piece)
  assert result["targets"] == len(loss) < 2 * BATCH * TIME
  np.testing.assert_allclose(result["loss"], loss.mean(), rtol=2e-6)
  np.testing.assert_allclose(result["perplexity"], math.exp(loss.mean()), rtol=1e-5)
  np.testing.assert_allclose(result["bits_per_byte"], loss.sum() / math.log(2) / (1.7 * len(loss)), rtol=2e-6)
  assert len(result["buckets"]) > 2
  for bucket in result["buckets"]:
    inside = (position >= bucket["start"]) & (position < bucket["stop"])
    assert bucket["targets"] == inside.sum()
    np.testing.assert_allclose(bucket["loss"], loss[inside].mean(), rtol=2e-6)


@pytest.mark.parametrize(("width", "edges"), [(0, [0, 16, 32, 50]), (20, [0, 20, 40, 50]), (64, [0, 50])])
def test_buckets_cover_every_position_once(model, batches, width, edges):
  whole = [batch | {"segment_ids": np.ones((BATCH, TIME), np.int32)} for batch in batches]
  result = evaluate(model, whole, bucket_width=width)
  buckets = result["buckets"]
  assert [b["start"] for b in buckets] + [TIME] == edges == [0] + [b["stop"] for b in buckets]
  assert sum(b["targets"] for b in buckets) == result["targets"]
  np.testing.assert_allclose(sum(b["targets"] * b["loss"] for b in buckets), result["targets"] * result["loss"])
  assert result["bits_per_byte"] is None


def test_positions_start_again_in_each_document(model, batches):
  alternating = [batch | {"segment_ids": np.tile(np.arange(TIME, dtype=np.int32) // 2 + 1, (BATCH, 1))}
                 for batch in batches]
  assert [(b["start"], b["stop"]) for b in evaluate(model, alternating, bucket_width=1)["buckets"]] == [(0, 1), (1, 2)]


def test_nothing_to_evaluate_and_bad_width_are_refused(model, batches):
  with pytest.raises(ValueError, match="nothing to evaluate"):
    evaluate(model, [batches[0] | {"mask": np.zeros((BATCH, TIME), np.float32)}])
  with pytest.raises(ValueError, match="nothing to evaluate"):
    evaluate(model, [])
  with pytest.raises(ValueError, match="bucket_width=-1: must not be negative"):
    evaluate(model, batches, bucket_width=-1)
  with pytest.raises(ValueError, match="piece=7: must divide the windows' 50 tokens"):
    evaluate(model, batches, piece=7)
