"""Speed of generation on the first device: the time of a decoded token, and the time to a prompt's first token.

Both run what `lin_jax.generate` runs. The weights are untrained, because training does not change the time.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import numpy as np
from flax import nnx

from configs import lookup
from lin_jax.config import TrainConfig, to_dict
from lin_jax.generate import Sampling, decode, state_bytes
from lin_jax.model import LanguageModel, parameter_count

from . import training

_PIECE = 1024


@dataclasses.dataclass(frozen=True)
class Decoding:
  """The time of a token after `context` others, drawn greedily in a call of `tokens` tokens.

  The call prepares the weights once, as every call of `generate` does, so the time holds a share of that.
  """

  name: str
  tiny: bool
  context: int
  batch_size: int
  tokens: int
  repeats: int
  results: ClassVar[tuple[str, ...]] = "ms_per_token", "tokens_per_s", "state_mib", "memory_gib"

  def measure(self) -> dict:
    model, batch = untrained_model(self.name, self.tiny), self.batch_size
    prompt, length = _prompt(model, batch, self.context), self.context + self.tokens
    logits, state = _read_in_pieces(_read, model, prompt, min(self.context, scaled(_PIECE, self.tiny)), length)
    arguments = model, logits, state, jax.random.key(0)
    # The first context of a linear model compiles it, and the others find it again.
    program = _decode.lower(*arguments, steps=self.tokens).compile()
    per_token = _median_seconds(lambda: program(*arguments), self.repeats) / self.tokens
    return {"ms_per_token": round(1000 * per_token, 4), "tokens_per_s": round(batch / per_token, 1),
            "state_mib": round(state_bytes(model, batch, self.context) / 2**20, 4), "memory_gib": _gib(program)}


@dataclasses.dataclass(frozen=True)
class Prefill:
  """The time to the first token after a prompt of `prompt` tokens, which is read in pieces of `piece`.

  With a piece of 0 the prompt is read at once and no state is kept. For softmax attention this is a lower bound: it
  takes the causal kernel, and writes no cache.
  """

  name: str
  tiny: bool
  prompt: int
  piece: int
  repeats: int
  results: ClassVar[tuple[str, ...]] = "first_token_ms", "tokens_per_s", "memory_gib"

  def measure(self) -> dict:
    model = untrained_model(self.name, self.tiny)
    prompt = jax.device_put(_prompt(model, 1, self.prompt))
    if self.piece:
      program = _read.lower(model, prompt[:, :self.piece], _empty(model, 1, self.prompt)).compile()
      read = lambda: _read_in_pieces(program, model, prompt, self.piece, self.prompt)[0].argmax()
    else:
      program = _read_whole.lower(model, prompt).compile()
      read = lambda: program(model, prompt).argmax()
    seconds = _median_seconds(read, self.repeats)
    return {"first_token_ms": round(1000 * seconds, 3), "tokens_per_s": round(self.prompt / seconds, 1),
            "memory_gib": _gib(program)}


def setting(run: Any) -> dict:
  """Returns the fields of a run and of its model that determine the result."""
  config = _config(run.name, run.tiny)
  return dataclasses.asdict(run) | {"parameters": parameter_count(config.model), "dtype": config.model.dtype,
                                    "model": to_dict(config)["model"]}


def line(row: dict) -> str:
  """Formats a record of either kind."""
  made, memory = row["setting"], f"{row['memory_gib']:.2f} GiB in all"
  if "prompt" in made:
    read = f"in pieces of {made['piece']:,}" if made["piece"] else "at once"
    return f"first token after {made['prompt']:>7,} read {read}: {row['first_token_ms']:,.1f} ms, {memory}"
  return (f"batch {made['batch_size']:>3} after {made['context']:>6,} tokens {row['ms_per_token']:.3f} ms per token, "
          f"state {row['state_mib']:,.2f} MiB, {memory}")


def _config(name: str, tiny: bool) -> TrainConfig:
  config = lookup(name)
  return training.shrunk(config) if tiny else config


def scaled(tokens: int, tiny: bool) -> int:
  """Returns a 256th of `tokens` if `tiny`."""
  return max(1, tokens // 256) if tiny else tokens


@functools.lru_cache(maxsize=1)
def untrained_model(name: str, tiny: bool) -> LanguageModel:
  """Returns the model of a config, with the weights of an initialization."""
  config = _config(name, tiny).model
  return jax.jit(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))()


def _prompt(model, batch, tokens):
  return np.random.default_rng(0).integers(model.embedding.shape[0], size=(batch, tokens), dtype=np.int32)


def _read_in_pieces(read, model, prompt, piece, length):
  """Returns the logits after the prompt by `_read`, and the state there, with room for `length` tokens."""
  state = _empty(model, prompt.shape[0], length)
  for i in range(0, prompt.shape[1], piece):
    logits, state = read(model, prompt[:, i:i + piece], state)
  return logits, state


@functools.partial(jax.jit, static_argnums=(1, 2))
def _empty(model, batch, length):
  return model.init_state(batch, length)


@functools.partial(jax.jit, donate_argnames="state")
def _read(model, tokens, state):
  hidden, state = model.hidden(tokens, state)
  return model.logits(hidden[:, -1]), state


@jax.jit
def _read_whole(model, tokens):
  return model.logits(model.hidden(tokens)[0][:, -1])


@functools.partial(jax.jit, static_argnames="steps")
def _decode(model, logits, state, key, steps):
  return decode(model, logits, state, key, steps, Sampling(temperature=0))[0]


def _median_seconds(call: Callable, repeats: int) -> float:
  seconds = []
  for _ in range(repeats + 1):
    begin = time.perf_counter()
    jax.block_until_ready(call())
    seconds.append(time.perf_counter() - begin)
  return statistics.median(seconds[1:])


def _gib(program):
  memory = program.memory_analysis()
  needed = (memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
            - memory.alias_size_in_bytes)
  return round(needed / 2**30, 4)
