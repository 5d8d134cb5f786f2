"""Sampling. The model reads the prompt in its parallel form and every further token in its recurrent form.

One compiled program does both. A recurrent mixer carries a state of fixed size from token to token, and attention a
cache of the whole sequence. The program's memory is known from its shapes, so a prompt that is too long is refused
before the program runs.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from lin_jax.decoding import Decoder, in_order, stacked
from lin_jax.model import LanguageModel
from lin_jax.sharding import context_shards

SHORTEST = 32  # tokens; prompts are padded to this times a power of two
_PART = 8  # the tokens of a device's part of a prompt are a multiple of this, and enough for a short convolution
ENDLESS = 2**24  # as the length of a state, it lets attention keep all of its window
_SHORTER = "shorten the prompt or generate less"


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How a token is drawn from logits. They are divided by `temperature`, cut to the `top_k` most likely, and then to
  the smallest set with probability `top_p`. Temperature 0 takes the most likely token. With top_k 0 and top_p 1 nothing
  is cut.

  Ids from `vocab_size` on, which pad a model's vocabulary beyond its tokenizer's, are never drawn. With 0 all ids are.
  """

  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  vocab_size: int = 0

  def __post_init__(self):
    if not 0 <= self.temperature < math.inf:
      raise ValueError(f"temperature={self.temperature}: must be finite and not negative (0 is greedy)")
    if self.top_k < 0:
      raise ValueError(f"top_k={self.top_k}: must not be negative (0 keeps every token)")
    if not 0 < self.top_p <= 1:
      raise ValueError(f"top_p={self.top_p}: must lie in (0, 1]")
    if self.vocab_size < 0:
      raise ValueError(f"vocab_size={self.vocab_size}: must not be negative (0 draws from all)")


def generate(model: LanguageModel, prompt: Int[Array, "B P"] | Sequence[Sequence[int]], steps: int, *,
             temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, vocab_size: int = 0,
             key: Array | None = None) -> Int[Array, "B steps"]:
  """Generates `steps` tokens that continue each prompt (P >= 1). Equal keys give equal tokens, and None means key 0.

  The other options are the fields of `Sampling`. Raises ValueError for token ids outside the vocabulary, for sampling
  values outside their domain, and for a prompt and steps that need more memory than the device has. Every call compiles
  anew. To sample repeatedly, keep the result of `compile_generate`.
  """
  prompt = np.asarray(prompt)
  if prompt.ndim != 2:
    raise ValueError(f"prompt of shape {prompt.shape}: must be [batch, tokens]")
  sampling = Sampling(temperature, top_k, top_p, vocab_size)
  if prompt.size:
    require_ids(model, prompt)  # compiling takes longer
  run = compile_generate(model, *prompt.shape, steps, sampling)
  return run(prompt, jax.random.key(0) if key is None else key)


def compile_generate(model: LanguageModel, batch: int, prompt_length: int, steps: int,
                     sampling: Sampling) -> Callable[[Int[Array, "B P"], Array], Int[Array, "B steps"]]:
  """The compiled program of `generate` for one shape, as a function of (prompt, key). Raises as `generate` does."""
  if prompt_length < 1 or steps < 1 or batch < 1:
    raise ValueError(f"batch={batch}, prompt_length={prompt_length}, steps={steps}: each must be at least 1")
  request = f"a prompt of {prompt_length:,} and {steps:,} new tokens (batch {batch})"
  # Checked before compiling, because states and tokens (int32) that are too big exhaust the compiler's own memory.
  length = prompt_length + steps
  require_memory(request, state_bytes(model, batch, length) + 4 * batch * length, _SHORTER)
  tokens = jax.ShapeDtypeStruct((batch, prompt_length), jnp.int32)
  program = _generate.lower(model, tokens, jax.eval_shape(jax.random.key, 0), steps, sampling).compile()
  memory = program.memory_analysis()
  require_memory(request, memory.temp_size_in_bytes + memory.output_size_in_bytes, _SHORTER)

  def run(prompt, key):
    prompt = np.asarray(prompt)
    if prompt.shape != (batch, prompt_length):
      raise ValueError(f"prompt of shape {prompt.shape}: this program is for {(batch, prompt_length)}")
    require_ids(model, prompt)
    return program(model, prompt.astype(np.int32), key)

  return run


def require_ids(model: LanguageModel, ids: np.ndarray, name: str = "prompt") -> None:
  """Raises ValueError, beginning with `name`, unless `ids`, which are not empty, lie in the model's vocabulary."""
  vocabulary = model.embedding.shape[0]
  if ids.dtype.kind not in "iu":
    raise ValueError(f"{name} of {ids.dtype}: must hold integers")
  if ids.min() < 0 or ids.max() >= vocabulary:
    raise ValueError(f"{name} token {ids.min() if ids.min() < 0 else ids.max()}: ids must lie in [0, {vocabulary})")


@functools.partial(jax.jit, static_argnames=("steps", "sampling"))
def _generate(model, prompt, key, steps, sampling):
  prompt, segment_ids = _in_parts(prompt)
  batch, length = prompt.shape
  logits, state = read(model, prompt, model.init_state(batch, length + steps), segment_ids)
  return decode(model, logits, state, key, steps, sampling)[0]


def _in_parts(prompt):
  """The prompt and its segment ids, with padding on the left where the mesh in use could not split it into parts."""
  shards = context_shards()
  padding = -prompt.shape[1] % (shards * _PART) if shards > 1 else 0
  if not padding:
    return prompt, None
  segment_ids = jnp.pad(jnp.ones_like(prompt), ((0, 0), (padding, 0)))
  return jnp.pad(prompt, ((0, 0), (padding, 0))), segment_ids


def read(model: LanguageModel, tokens: Int[Array, "B T"], state: Any, segment_ids: Int[Array, "B T"] | None = None,
         ) -> tuple[Float[Array, "B V"], Any]:
  """Float32 logits after the last token of each row, and the state after it, in the parallel form.

  Prompts of different lengths are padded on the left with tokens of a segment of their own, which changes neither.
  """
  hidden, state = model.hidden(tokens, state, segment_ids)
  return jnp.dot(hidden[:, -1], model.unembedding().astype(hidden.dtype), preferred_element_type=jnp.float32), state


def decode(model: LanguageModel, logits: Float[Array, "B V"], state: Any, key: Array, steps: int,
           sampling: Sampling) -> tuple[Int[Array, "B steps"], tuple[Float[Array, "B V"], Any]]:
  """Generates `steps` tokens, the first drawn from `logits`. Returns them with the logits and the state after the last.

  It must be called under jit.
  """
  draw = lambda logits, i: sample(logits, jax.random.fold_in(key, i), sampling)
  tokens, (logits, states) = decode_layers(Decoder(model), logits, in_order(state), steps, draw)
  return tokens, (logits, stacked(states, state))


def decode_layers(decoder: Decoder, logits: Float[Array, "B V"], states: list, steps: int,
                  draw: Callable[[Array, Array], Array]) -> tuple[Int[Array, "B steps"], tuple[Array, list]]:
  """The loop of `decode` over the layers' states, where `draw(logits, i)` gives the i-th token of each row."""

  def next_token(carry, i):
    logits, states, tokens = carry
    token = draw(logits, i)
    # Stacked by the scan, the tokens would be copied on another stream of a GPU, which keeps the loop's body from being
    # one CUDA graph.
    tokens = jnp.where(jnp.arange(steps)[None] == i, token[:, None], tokens)
    return (*decoder.step(token, states), tokens), None

  tokens = jnp.zeros((logits.shape[0], steps), jnp.int32)
  (logits, states, tokens), _ = jax.lax.scan(next_token, (logits, states, tokens), jnp.arange(steps))
  return tokens, (logits, states)


def sample(logits: Float[Array, "B V"], key: Array, sampling: Sampling) -> Int[Array, "B"]:
  """Draws one token id per row."""
  if sampling.vocab_size:
    logits = jnp.where(jnp.arange(logits.shape[-1])[None] < sampling.vocab_size, logits, -jnp.inf)
  if sampling.temperature == 0:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  logits = logits / sampling.temperature
  if sampling.top_k:
    logits = keep_top_k(logits, sampling.top_k)
  if sampling.top_p < 1:
    logits = keep_top_p(logits, sampling.top_p)
  return jax.random.categorical(key, logits).astype(jnp.int32)


def keep_top_k(logits: Float[Array, "B V"], k: int) -> Float[Array, "B V"]:
  """Logits where all but the `k` largest, and any equal to the k-th, are -inf."""
  kth = jax.lax.top_k(logits, min(k, logits.shape[-1]))[0][..., -1:]
  return jnp.where(logits < kth, -jnp.inf, logits)


def keep_top_p(logits: Float[Array, "B V"], p: float | Float[Array, "B 1"]) -> Float[Array, "B V"]:
  """Logits where all tokens outside the smallest set of most likely ones whose probability reaches `p` are -inf
  (Holtzman et al. 2020, arXiv:1904.09751, section 3.1)."""
  ordered = jnp.sort(logits, axis=-1, descending=True)
  probability = jax.nn.softmax(ordered, axis=-1)
  # A token stays if the tokens before it fall short of p, so the one that crosses p stays, and the first always does.
  kept = jnp.cumsum(probability, axis=-1) - probability < p
  last = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
  return jnp.where(logits < last, -jnp.inf, logits)


def state_bytes(model: LanguageModel, batch: int, length: int) -> int:
  """Bytes of the state that decoding `length` tokens carries: constant for recurrent mixers, linear for attention."""
  return sum(map(_bytes, _layer_states(model, batch, length)))


def cache_bytes(model: LanguageModel, batch: int, length: int) -> int:
  """The part of `state_bytes` in layers that keep single tokens: all of them, or the last of a window."""
  pairs = zip(_layer_states(model, batch, length), *(_layer_states(model, 1, tokens) for tokens in (1, 2)), strict=True)
  return sum(_bytes(layer) for layer, one, two in pairs if _bytes(one) != _bytes(two))


def has_growing_state(model: LanguageModel) -> bool:
  """Whether decoding ever longer texts takes ever more memory: softmax attention without a window does."""
  return state_bytes(model, 1, 2 * ENDLESS) > state_bytes(model, 1, ENDLESS)


def padded(length: int) -> int:
  """The next larger of the lengths for which programs are compiled."""
  return SHORTEST * 2 ** max(0, (-(-length // SHORTEST) - 1).bit_length())


def _layer_states(model, batch, length):
  """The states of the layers, with shapes in place of arrays. Layers of one stack count as one."""
  return [stack for run in jax.eval_shape(lambda: model.init_state(batch, length)) for stack in run]


def _bytes(state):
  return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def require_memory(request: str, needed: int, advice: str) -> None:
  """Raises ValueError, which ends in `advice`, if `request` needs more bytes than the first device has."""
  device = jax.devices()[0]
  available = _memory(device)
  if needed > available:
    raise ValueError(f"{request} needs {needed / 2**30:,.1f} GiB beside the parameters, more than the "
                     f"{available / 2**30:,.1f} GiB of {device.device_kind}: {advice}")


def _memory(device):
  """Bytes free on an accelerator, or all bytes of a CPU's machine, whose free memory is mostly its file cache."""
  stats = device.memory_stats()
  if stats:
    return stats["bytes_limit"] - stats["bytes_in_use"]
  return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
