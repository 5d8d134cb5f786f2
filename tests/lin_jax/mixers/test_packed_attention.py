"""Attention within packed documents: cuDNN's arguments, and the masked form for more documents than they hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import dispatch
from lin_jax.mixers import packed_attention
from lin_jax.mixers.attention import AttentionConfig
from tests.close import assert_close
from tests.lin_jax.mixers.small import create, inputs

LENGTHS = {"one": [(48,), (48,)], "few": [(5, 30, 13), (48,)], "most": [(1,) * 15 + (33,), (20, 28)],
           "many": [(3,) * 16, (2,) * 24]}


def ids(lengths):
  return jnp.asarray([np.repeat(np.arange(len(row)) + 7, row) for row in lengths], jnp.int32)


def runs_of(lengths):
  return ids(lengths) - 7


def emulated(q, k, v, *, q_seqlen, kv_seqlen, q_offsets, kv_offsets, scale, mask_type):
  """What cuDNN computes for sequences of these lengths and starts, of which a length of -1 is none."""
  assert mask_type == packed_attention.MaskType.PADDING_CAUSAL
  t = jnp.arange(q.shape[1])[None, None]
  member = (t >= q_offsets[:, :-1, None]) & (t < (q_offsets[:, :-1] + q_seqlen)[..., None]) & (q_seqlen >= 0)[..., None]
  seen = jnp.einsum("bmt,bms->bts", member.astype(jnp.int32), member.astype(jnp.int32)) > 0
  seen &= jnp.tril(jnp.ones_like(seen))
  k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
  scores = jnp.where(seen[:, None], scale * jnp.einsum("bthk,bshk->bhts", q, k), -1e30)
  return jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(scores, axis=-1), v)


@pytest.mark.parametrize("name", LENGTHS)
def test_cudnn_gets_every_document(name, monkeypatch):
  """On a device that pretends to have cuDNN's packed layout, output and gradients are those of the mask."""
  mixer, x, segment_ids = create(AttentionConfig(heads=4, kv_heads=2)), inputs(48), ids(LENGTHS[name])
  run = lambda: jax.jit(jax.value_and_grad(lambda x: jnp.sum(jnp.sin(mixer(x, None, segment_ids)[0]))))(x)
  expected, called = run(), []
  kernel = lambda *args, **options: called.append(True) or emulated(*args, **options)
  monkeypatch.setattr(packed_attention, "dot_product_attention", kernel)
  monkeypatch.setattr(packed_attention, "supported", lambda q: True)
  monkeypatch.setattr(dispatch, "platform", lambda: "cuda")
  actual = run()
  assert called
  assert_close("loss", actual[0], expected[0], 1e-5)
  assert_close("dx", actual[1], expected[1], 1e-5)


def test_without_jax_s_private_function_the_mask_is_used(monkeypatch):
  monkeypatch.setattr(packed_attention, "dot_product_attention", None)
  assert not packed_attention.supported(jnp.zeros((1, 8, 1, 64), jnp.bfloat16))


def test_lengths_and_starts():
  lengths, starts = packed_attention.documents(runs_of(LENGTHS["few"]))
  assert lengths[:, :4].tolist() == [[5, 30, 13, -1], [48, -1, -1, -1]] and lengths.shape == (2, packed_attention.MOST)
  assert starts[:, :4].tolist() == [[0, 5, 35, -1], [0, -1, -1, -1]] and starts.shape == (2, packed_attention.MOST + 1)
  assert (lengths[:, 4:] == -1).all() and (starts[:, 4:] == -1).all()


@pytest.mark.gpu
@pytest.mark.parametrize("name", LENGTHS)
def test_cudnn_equals_xla_within_documents(name):
  x, segment_ids = inputs(48, width=256).astype(jnp.bfloat16), ids(LENGTHS[name])

  def run(dtype):
    mixer = create(AttentionConfig(heads=4, kv_heads=2), width=256, dtype=dtype)
    loss = lambda x: jnp.square(mixer(x, None, segment_ids)[0].astype(jnp.float32)).sum()
    with jax.default_matmul_precision("highest"):
      return jax.jit(jax.value_and_grad(loss))(x.astype(dtype))

  actual, expected = run(jnp.bfloat16), run(jnp.float32)
  assert_close("loss", actual[0], expected[0], 1e-2)
  assert_close("dx", actual[1].astype(jnp.float32), expected[1], 3e-2)
