"""The rows of a server on its device, and the compiled programs that read prompts, fill rows and decode them. `B` rows,
`V` ids."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int, Key

from lin_jax import generate
from lin_jax.decoding import Decoder, in_order
from lin_jax.model import LanguageModel


class Settings(NamedTuple):
  """How rows draw, each field with an axis of rows: the key of a row's request, how many tokens it has drawn, and its
  `Sampling`, where V stands for a `top_k` or `vocab_size` that cuts nothing."""

  key: Array
  drawn: Array
  temperature: Array
  top_k: Array
  top_p: Array
  vocab_size: Array


class Rows(NamedTuple):
  """The layers' states, in the order of the layers, the logits of the next token and the settings of the rows."""

  layers: list
  logits: Array
  settings: Settings


def settings(sampling: generate.Sampling, seed: int, vocabulary: int) -> Settings:
  """The settings of one row, for a model of `vocabulary` ids."""
  vocab_size = min(sampling.vocab_size or vocabulary, vocabulary)
  top_k = min(sampling.top_k or vocabulary, vocabulary)
  drawn, top_k, vocab_size = (np.array([value], np.int32) for value in (0, top_k, vocab_size))
  temperature, top_p = (np.array([value], np.float32) for value in (sampling.temperature, sampling.top_p))
  return Settings(jax.random.key(seed)[None], drawn, temperature, top_k, top_p, vocab_size)


prepare = jax.jit(Decoder)


@functools.partial(jax.jit, static_argnums=1)
def empty_state(model: LanguageModel, length: int) -> Any:
  """The state of one row before its prompt, in stacks of layers."""
  return model.init_state(1, length)


@functools.partial(jax.jit, static_argnums=(1, 2))
def empty_rows(model: LanguageModel, rows: int, length: int) -> Rows:
  """Rows without requests. They decode as the others do, but nobody reads their tokens."""
  vocabulary = model.embedding.shape[0]
  one = settings(generate.Sampling(temperature=0), 0, vocabulary)
  every = jax.tree.map(lambda x: jnp.broadcast_to(x, (rows,)), one)
  return Rows(in_order(model.init_state(rows, length)), jnp.zeros((rows, vocabulary)), every)


@functools.partial(jax.jit, donate_argnums=3)
def read(model: LanguageModel, tokens: Int[Array, "1 T"], segment_ids: Int[Array, "1 T"], state: Any,
         ) -> tuple[Float[Array, "1 V"], Any]:
  """`generate.read` for the next piece of one prompt."""
  return generate.read(model, tokens, state, segment_ids)


@functools.partial(jax.jit, donate_argnums=0)
def place(rows: Rows, row: int, state: Any, logits: Float[Array, "1 V"], settings: Settings) -> Rows:
  """The rows with another request in `row`, whose prompt left `state`, in stacks of layers, and `logits`."""
  new = Rows(in_order(state), logits, settings)
  return jax.tree.map(lambda every, one: every.at[row].set(one[0]), rows, new)


@functools.partial(jax.jit, static_argnums=2, donate_argnums=1)
def decode(decoder: Decoder, rows: Rows, steps: int) -> tuple[Rows, Int[Array, "B steps"]]:
  """The rows after `steps` more tokens each, and these tokens."""
  layers, logits, settings = rows

  def draw(logits, i):
    keys = jax.vmap(jax.random.fold_in)(settings.key, settings.drawn + i)
    return sample_rows(logits, keys, *settings[2:])

  tokens, (logits, layers) = generate.decode_layers(decoder, logits, layers, steps, draw)
  return Rows(layers, logits, settings._replace(drawn=settings.drawn + steps)), tokens


def sample_rows(logits: Float[Array, "B V"], keys: Key[Array, "B"], temperature: Float[Array, "B"],
                top_k: Int[Array, "B"], top_p: Float[Array, "B"], vocab_size: Int[Array, "B"]) -> Int[Array, "B"]:
  """`generate.sample` for rows that differ in all that it takes, so that one program serves every `Sampling`.

  Random numbers are drawn only if a row's temperature is not 0, and logits sorted only if such a row cuts some.
  """
  vocabulary = logits.shape[1]
  logits = jnp.where(jnp.arange(vocabulary)[None] < vocab_size[:, None], logits, -jnp.inf)
  best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
  random = temperature > 0
  scaled = logits / jnp.where(random, temperature, 1)[:, None]

  def cut(logits):
    kth = jnp.take_along_axis(jnp.sort(logits, axis=-1, descending=True), top_k[:, None] - 1, axis=1)
    logits = jnp.where(logits < kth, -jnp.inf, logits)
    return jnp.where(top_p[:, None] < 1, generate.keep_top_p(logits, top_p[:, None]), logits)

  def draw(logits):
    return jnp.where(random, jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32), best)

  cuts = random & ((top_k < vocabulary) | (top_p < 1))
  kind = jnp.where(jnp.any(cuts), 2, jnp.any(random).astype(jnp.int32))
  return jax.lax.switch(kind, [lambda logits: best, draw, lambda logits: draw(cut(logits))], scaled)
