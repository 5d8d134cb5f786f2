"""The model of a synthetic task: a language model, and what turns its outputs into answers."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from lin_jax import mixers
from lin_jax.config import ModelConfig
from lin_jax.layers import Linear, RMSNorm
from lin_jax.loss import next_token_loss
from lin_jax.model import LanguageModel

from . import starts


class Answerer(nnx.Module):
  """A language model that answers at given positions from its output there.

  With `decodes_last` its last output answers for all positions: sines of the position are added, and a decoder of two
  layers of the same width reads the sum (MAD, arXiv:2403.17844, compression). `start` is one of `starts.STARTS`.

  With the output "tied", the transposed embedding gives the logits, and the decoder is linear, GELU, linear. With the
  output "mad", as in athms/mad-lab, a matrix of its own with a bias gives the logits. The decoder then reads the last
  position of the residual stream before the final norm, and is norm, linear, GELU, norm, linear, GELU, norm.

  With a key, each entry of the embeddings becomes zero with probability `dropout`, and the other entries grow to keep
  the mean.
  """

  def __init__(self, config: ModelConfig, decodes_last: bool, start: str, dropout: float = 0.0, output: str = "tied", *,
               rngs: nnx.Rngs):
    self.dropout = dropout
    self.model = LanguageModel(config, rngs=rngs, unroll=0)
    linear = lambda: Linear(config.width, config.width, ("embed", None), dtype=config.dtype, rngs=rngs, bias=True)
    self.decoder = nnx.List([linear(), linear()]) if decodes_last else None
    own = output == "mad"
    self.head = Linear(config.width, config.vocab_size, ("embed", "vocab"), dtype=config.dtype, rngs=rngs, bias=True,
                       output_dtype=jnp.float32) if own else None
    norm = lambda: RMSNorm(config.width, eps=config.norm_eps, rngs=rngs)
    self.norms = nnx.List([norm(), norm(), norm()]) if own and decodes_last else None
    if self.norms is not None:
      self.model.norm = _Unchanged()
    starts.draw(start, self, mixers.name_of(config.mixer), config.depth, decodes_last, rngs)

  def __call__(self, tokens: jax.Array, positions: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """Returns the activations before the logits [B, M, D] for tokens [B, T] and positions [B, M]."""
    embedded = self.model.embed(tokens)
    if key is not None and self.dropout:
      kept = jax.random.bernoulli(key, 1 - self.dropout, embedded.shape)
      embedded = jnp.where(kept, embedded / (1 - self.dropout), 0)
    hidden, _ = self.model.hidden_from_embeddings(embedded)
    if self.decoder is None:
      return jnp.take_along_axis(hidden, positions[..., None], axis=1)
    encoding = (_sines if self.norms is None else _fairseq_sines)(positions, hidden.shape[-1]).astype(hidden.dtype)
    x = jnp.broadcast_to(hidden[:, -1:], encoding.shape) + encoding
    first, second = self.decoder
    if self.norms is None:
      return second(jax.nn.gelu(first(x)))
    before, between, after = self.norms
    x = jax.nn.gelu(first(before(x)), approximate=False)
    return after(jax.nn.gelu(second(between(x)), approximate=False))

  def logits(self, hidden: jax.Array) -> jax.Array:
    """Returns the float32 logits [B, M, V] for the result of a call."""
    return self.model.logits(hidden) if self.head is None else self.head(hidden)

  def loss(self, hidden: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
    """Returns the mean of -log softmax(logits)[target] over positions by their weights [B, M], in nats."""
    if self.head is None:
      total, _ = next_token_loss(hidden, self.model.unembedding(), targets, weights)
    else:
      total = (optax.softmax_cross_entropy_with_integer_labels(self.logits(hidden), targets) * weights).sum()
    return total / weights.sum()


class _Unchanged(nnx.Module):
  """In the place of a final norm: the decoder has norms of its own."""

  def __call__(self, x: jax.Array) -> jax.Array:
    return x


def _sines(positions, width):
  """Returns sines and cosines [B, M, width] of positions [B, M] (Vaswani et al. 2017, section 3.5)."""
  frequencies = 10000.0 ** (-jnp.arange((width + 1) // 2, dtype=jnp.float32) / (width / 2))
  return _waves(positions, frequencies)[..., :width]


def _fairseq_sines(positions, width):
  """The same with fairseq's frequencies, from 1 to exactly 1 / 10000. With an odd width the last channel is 0."""
  half = width // 2
  waves = _waves(positions, 10000.0 ** (-jnp.arange(half, dtype=jnp.float32) / max(1, half - 1)))
  return jnp.pad(waves, ((0, 0), (0, 0), (0, width % 2)))


def _waves(positions, frequencies):
  angles = positions[..., None].astype(jnp.float32) * frequencies[None, None]
  return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
