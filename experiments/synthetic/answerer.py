"""The model of a synthetic task: a language model, and what turns its outputs into answers."""

import jax
import jax.numpy as jnp
from flax import nnx

from lin_jax.config import ModelConfig
from lin_jax.layers import Linear
from lin_jax.model import LanguageModel

from .runs import STARTS


class Answerer(nnx.Module):
  """A language model that answers at given positions from its output there.

  With `decodes_last` its last output answers for all positions: sines of the position are added, and a two-layer GELU
  MLP of the same width decodes the sum (MAD, arXiv:2403.17844, compression). `start` is one of `runs.STARTS`. With a
  key, each entry of the embeddings becomes zero with probability `dropout`, and the other entries grow to keep the
  mean.
  """

  def __init__(self, config: ModelConfig, decodes_last: bool, start: str, dropout: float = 0.0, *, rngs: nnx.Rngs):
    self.dropout = dropout
    self.model = LanguageModel(config, rngs=rngs, unroll=0)
    linear = lambda: Linear(config.width, config.width, ("embed", None), dtype=config.dtype, rngs=rngs, bias=True)
    self.decoder = nnx.List([linear(), linear()]) if decodes_last else None
    deviation = STARTS[start]
    for _, layer in nnx.iter_modules(self):
      if deviation and isinstance(layer, Linear):
        shape = layer.kernel[...].shape  # the layers of a stack have one kernel
        layer.kernel[...] = deviation(shape[-2]) * jax.random.normal(rngs.params(), shape)

  def __call__(self, tokens: jax.Array, positions: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """Returns the activations before the head [B, M, D] for tokens [B, T] and positions [B, M]."""
    embedded = self.model.embed(tokens)
    if key is not None and self.dropout:
      kept = jax.random.bernoulli(key, 1 - self.dropout, embedded.shape)
      embedded = jnp.where(kept, embedded / (1 - self.dropout), 0)
    hidden, _ = self.model.hidden_from_embeddings(embedded)
    if self.decoder is None:
      return jnp.take_along_axis(hidden, positions[..., None], axis=1)
    encoding = _sines(positions, hidden.shape[-1]).astype(hidden.dtype)
    first, second = self.decoder
    return second(jax.nn.gelu(first(jnp.broadcast_to(hidden[:, -1:], encoding.shape) + encoding)))


def _sines(positions, width):
  """Returns sines and cosines [B, M, width] of positions [B, M] (Vaswani et al. 2017, section 3.5)."""
  frequencies = 10000.0 ** (-jnp.arange((width + 1) // 2, dtype=jnp.float32) / (width / 2))
  angles = positions[..., None].astype(jnp.float32) * frequencies[None, None]
  return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)[..., :width]
