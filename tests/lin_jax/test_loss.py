"""The chunked cross-entropy against the plain one that holds all logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from lin_jax.loss import next_token_loss


def plain(hidden, unembedding, targets, mask):
  logits = (hidden.astype(jnp.float32) @ unembedding.astype(jnp.float32)).astype(jnp.float32)
  token_loss = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
  return (token_loss * mask).sum(), token_loss * mask, jnp.where(logits.argmax(-1) == targets, mask, 0.0).sum()


def case(B=8, T=21, D=16, V=50, dtype=jnp.float32):
  keys = jax.random.split(jax.random.key(0), 4)
  return (jax.random.normal(keys[0], (B, T, D)).astype(dtype), jax.random.normal(keys[1], (D, V)),
          jax.random.randint(keys[2], (B, T), 0, V), (jax.random.uniform(keys[3], (B, T)) < 0.8).astype(jnp.float32))


def error(actual, expected):
  actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
  return np.sqrt(np.mean((actual - expected) ** 2) / np.mean(expected**2))


# 8 x 21 tokens: one chunk, a length that the chunk divides, one that it does not, single tokens.
@pytest.mark.parametrize("chunk_tokens", [4096, 56, 40, 1])
def test_equals_full_logits(chunk_tokens):
  args = case()
  (total, metrics), gradients = jax.value_and_grad(
      lambda h, w: next_token_loss(h, w, *args[2:], chunk_tokens=chunk_tokens), argnums=(0, 1), has_aux=True)(*args[:2])
  expected, token_loss, correct = plain(*args)
  expected_gradients = jax.grad(lambda h, w: plain(h, w, *args[2:])[0], argnums=(0, 1))(*args[:2])
  assert error(total, expected) < 1e-6
  assert error(metrics["token_loss"], token_loss) < 1e-6
  assert metrics["correct"] == correct and metrics["targets"] == args[3].sum()
  for actual, reference in zip(gradients, expected_gradients):
    assert error(actual, reference) < 1e-5


def test_cotangent_scales_the_gradients_and_metrics_carry_none():
  args = case()

  def scaled(h, w):
    total, metrics = next_token_loss(h, w, *args[2:], chunk_tokens=56)
    return 0.25 * total + metrics["token_loss"].sum()

  gradients = jax.grad(scaled, argnums=(0, 1))(*args[:2])
  expected = jax.grad(lambda h, w: 0.25 * plain(h, w, *args[2:])[0], argnums=(0, 1))(*args[:2])
  for actual, reference in zip(gradients, expected):
    assert error(actual, reference) < 1e-5


def test_bfloat16_products_and_float32_sums():
  args = case(dtype=jnp.bfloat16)
  loss = jax.value_and_grad(lambda h, w: next_token_loss(h, w, *args[2:], chunk_tokens=56)[0], argnums=(0, 1))
  total, (dhidden, dunembedding) = loss(*args[:2])
  rounded = (args[0], args[1].astype(jnp.bfloat16))
  expected = jax.grad(lambda h, w: plain(h, w, *args[2:])[0], argnums=(0, 1))(*(x.astype(jnp.float32) for x in rounded))
  assert total.dtype == jnp.float32 and dhidden.dtype == jnp.bfloat16 and dunembedding.dtype == jnp.float32
  assert error(total, plain(*rounded, *args[2:])[0]) < 1e-5
  assert error(dhidden, expected[0]) < 5e-3
  assert error(dunembedding, expected[1]) < 5e-3


# 50 divides over two vocabulary shards; 51 does not and stays whole.
@pytest.mark.parametrize("vocab", [50, 51])
def test_sharded_equals_unsharded(vocab):
  args = case(V=vocab)
  loss = jax.value_and_grad(lambda *a: next_token_loss(*a, chunk_tokens=14), argnums=(0, 1), has_aux=True)
  expected = jax.jit(loss)(*args)
  with jax.set_mesh(jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)):
    actual = jax.jit(loss)(*args)
  for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
    assert error(a, e) < 1e-6


def test_memory_is_a_chunk_of_logits():
  B, T, D, V = 4, 1024, 16, 4096
  shapes = [jax.ShapeDtypeStruct(s, d) for s, d in
            [((B, T, D), jnp.float32), ((D, V), jnp.float32), ((B, T), jnp.int32), ((B, T), jnp.float32)]]

  def temporary_bytes(loss):
    return jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

  full = temporary_bytes(lambda *a: plain(*a)[0])
  chunked = temporary_bytes(lambda *a: next_token_loss(*a, chunk_tokens=256)[0])
  print(f"temporary memory: {chunked / 2**20:.1f} MiB chunked, {full / 2**20:.1f} MiB with all logits")
  assert full >= 4 * B * T * V
  assert chunked < full / 8


def test_shapes_that_disagree_are_named(unchecked_arrays):
  hidden, unembedding, targets, mask = case()
  with pytest.raises(ValueError, match=r"targets \(8, 20\)"):
    next_token_loss(hidden, unembedding, targets[:, :20], mask)
