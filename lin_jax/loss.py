"""Next-token cross-entropy straight from hidden states, in chunks of time, so that the logits never exist at once.

At batch 16, length 2048 and a vocabulary of 32000, the float32 logits alone would take 4.2 GB, and their gradient as
much again. Here each chunk's logits are made once, turned into that chunk's loss *and* gradients, and dropped. Because
the loss is a plain sum, its gradients are known before the cotangent arrives, which then only scales them.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

_BATCH_AXES = ("data", "fsdp")
_TIME_AXIS = "context"
_VOCAB_AXIS = "tensor"


def next_token_loss(hidden: Float[Array, "B T D"], unembedding: Float[Array, "D V"], targets: Int[Array, "B T"],
                    mask: Float[Array, "B T"], *, chunk_tokens: int = 4096) -> tuple[Float[Array, ""], dict]:
  """Sum over tokens of mask * -log softmax(hidden @ unembedding)[target], in nats.

  Under a mesh (`jax.set_mesh`) the batch is split over ("data", "fsdp"), the tokens of each sequence over "context"
  and the vocabulary over "tensor" where they divide evenly. Gradients of `unembedding` are summed over the first three
  axes once, after the last chunk. They are not computed where `unembedding` is constant.

  Args:
    mask: weight of each target; 0 leaves the target out.
    chunk_tokens: tokens per chunk on each device. It sets the peak memory (chunk_tokens * V floats), not the result.
  Returns:
    The sum, float32, differentiable in `hidden` and `unembedding`, and a dict without gradients that holds `targets`
    (sum of the mask), `correct` (masked count of targets that have the largest logit) and `token_loss` [B, T].
  Raises:
    ValueError: shapes disagree.
  Precision: products in hidden's dtype with float32 accumulation. Logits, softmax and sums are float32.
  """
  if targets.shape != hidden.shape[:2] or mask.shape != hidden.shape[:2] or hidden.shape[2] != unembedding.shape[0]:
    raise ValueError(f"hidden {hidden.shape}, unembedding {unembedding.shape}, targets {targets.shape} and mask "
                     f"{mask.shape} must be [B, T, D], [D, V], [B, T] and [B, T]")
  with jax.named_scope("head"):
    total, metrics = _loss(hidden, unembedding, targets, mask.astype(jnp.float32), chunk_tokens)
  return total, jax.lax.stop_gradient(metrics)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _loss(hidden, unembedding, targets, mask, chunk_tokens):
  return _sharded(hidden, unembedding, targets, mask, chunk_tokens)[:2]


def _loss_forward(hidden, unembedding, targets, mask, chunk_tokens):
  arrays = (x.value for x in (hidden, unembedding, targets, mask))
  total, metrics, dhidden, dunembedding = _sharded(*arrays, chunk_tokens, gradients=True,
                                                   frozen=not unembedding.perturbed)
  return (total, metrics), (dhidden, None if dunembedding is None else dunembedding.astype(unembedding.value.dtype))


def _loss_backward(chunk_tokens, gradients, cotangents):
  scaled = lambda d: (d.astype(jnp.float32) * cotangents[0]).astype(d.dtype)
  return *(None if d is None else scaled(d) for d in gradients), None, None


_loss.defvjp(_loss_forward, _loss_backward, symbolic_zeros=True)


def _sharded(hidden, unembedding, targets, mask, chunk_tokens, gradients=False, frozen=True):
  """Runs `_chunked` on each device's part of the batch, the tokens and the vocabulary. `frozen` leaves out
  dunembedding."""
  sizes = dict(jax.sharding.get_abstract_mesh().shape)
  batch_axes = tuple(axis for axis in _BATCH_AXES if sizes.get(axis, 1) > 1)
  time_axis = _TIME_AXIS if sizes.get(_TIME_AXIS, 1) > 1 else None
  vocab_axis = _VOCAB_AXIS if sizes.get(_VOCAB_AXIS, 1) > 1 else None
  # A dimension that an axis does not divide is computed whole on each of the axis's devices.
  if hidden.shape[0] % math.prod(sizes[axis] for axis in batch_axes):
    batch_axes = ()
  if time_axis and hidden.shape[1] % sizes[time_axis]:
    time_axis = None
  if vocab_axis and unembedding.shape[1] % sizes[vocab_axis]:
    vocab_axis = None
  token_axes = (*batch_axes, time_axis) if time_axis else batch_axes
  local = functools.partial(_chunked, chunk_tokens=chunk_tokens, gradients=gradients, frozen=frozen,
                            token_axes=token_axes, vocab_axis=vocab_axis)
  if not token_axes and not vocab_axis:
    return local(hidden, unembedding, targets, mask)
  batch, vocab = P(batch_axes, time_axis), P(None, vocab_axis)
  metrics = {"targets": P(), "correct": P(), "token_loss": batch}
  return jax.shard_map(local, in_specs=(batch, vocab, batch, batch),
                       out_specs=(P(), metrics, batch if gradients else P(), P() if frozen else vocab),
                       check_vma=False)(hidden, unembedding, targets, mask)


def _chunked(hidden, unembedding, targets, mask, *, chunk_tokens, gradients, frozen, token_axes, vocab_axis):
  """Returns (loss sum, metrics, dhidden, dunembedding), where the gradients are None unless they are asked for, and the
  last one is None if the unembedding is `frozen`."""
  B, T, _ = hidden.shape
  N = math.ceil(T / max(1, chunk_tokens // B))
  weights = unembedding.astype(hidden.dtype)
  vocab = jnp.arange(weights.shape[1]) + (weights.shape[1] * jax.lax.axis_index(vocab_axis) if vocab_axis else 0)
  reduce = functools.partial(jax.lax.psum, axis_name=vocab_axis) if vocab_axis else lambda x: x

  def chunk(dweights, inputs):
    h, target, weight = inputs
    logits = jnp.einsum("bcd,dv->bcv", h, weights, preferred_element_type=jnp.float32)
    top = logits.max(axis=-1)
    top = jax.lax.pmax(top, vocab_axis) if vocab_axis else top
    log_norm = top + jnp.log(reduce(jnp.exp(logits - top[..., None]).sum(axis=-1)))
    # Comparing with the ids instead of gathering keeps a sharded vocabulary in place.
    is_target = vocab[None, None] == target[..., None]
    target_logit = reduce(jnp.where(is_target, logits, 0.0).sum(axis=-1))
    token_loss, correct = weight * (log_norm - target_logit), jnp.where(target_logit >= top, weight, 0.0)
    if not gradients:
      return dweights, (token_loss, correct, None)
    probability = jnp.exp(logits - log_norm[..., None])
    dlogits = (weight[..., None] * jnp.where(is_target, probability - 1.0, probability)).astype(h.dtype)
    dh = reduce(jnp.einsum("bcv,dv->bcd", dlogits, weights, preferred_element_type=jnp.float32))
    if not frozen:
      dweights += jnp.einsum("bcd,bcv->dv", h, dlogits, preferred_element_type=jnp.float32)
    return dweights, (token_loss, correct, dh.astype(h.dtype))

  dweights = None if frozen else jnp.zeros(weights.shape, jnp.float32)
  dweights, outputs = jax.lax.scan(chunk, dweights, tuple(_to_chunks(x, N) for x in (hidden, targets, mask)))
  token_loss, correct, dhidden = (None if x is None else _from_chunks(x, T) for x in outputs)
  metrics = {"targets": mask.sum(), "correct": correct.sum()}
  total, metrics, dweights = jax.lax.psum((token_loss.sum(), metrics, dweights), token_axes)
  return total, metrics | {"token_loss": token_loss}, dhidden, dweights


def _to_chunks(x, N):
  """[B, T, ...] to [N, B, ceil(T / N), ...]. The padding consists of zeros, so that its mask is 0."""
  padding = -x.shape[1] % N
  x = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))
  return jnp.moveaxis(x.reshape(x.shape[0], N, -1, *x.shape[2:]), 1, 0)


def _from_chunks(x, T):
  """Inverse of `_to_chunks`: [N, B, C, ...] to [B, T, ...]."""
  x = jnp.moveaxis(x, 0, 1)
  return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :T]
