"""Time per token and memory of decoding against the length of the context, for linear mixers and softmax attention.

  python experiments/bench_decoding.py --out=experiments/results/decoding.jsonl --limit_seconds=540
  python experiments/bench_decoding.py --tiny                                           # proves the command on a CPU

The context is read in pieces, and the state is carried from one to the next. Then `lin_jax.generate.decode` draws
tokens greedily in one compiled program, always from the same state, and the median of its calls counts. The weights are
untrained, because training does not change the time. The cache of attention has room for exactly the context and the
decoded tokens. Like every state, it is written anew by each token, because the layers are a scan. A run that fails is
recorded with its reason. A run is skipped when --out has its record for this device, these versions and this setting.
Exit codes: 0 done, or the time is over; 1 a run failed; 2 a user's error. `report_claims.py` draws the curves.
"""

import functools
import pathlib
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx

from configs import lookup
from lin_jax.config import to_dict
from lin_jax.generate import Sampling, decode, state_bytes
from lin_jax.model import LanguageModel, parameter_count
from running import commands
from speed import sweeps, training

_MODELS_KNOWN = ("tnl_385m", "gla_340m", "deltanet_340m", "transformer_340m")
_CONTEXTS_KNOWN = tuple(2**i for i in range(10, 17))
_PIECE = 1024
_RESULTS = ("ms_per_token", "tokens_per_s", "state_mib", "memory_gib")

_MODELS = flags.DEFINE_list("models", [], f"Models, out of {', '.join(_MODELS_KNOWN)}; all if none is given.")
_CONTEXTS = flags.DEFINE_list("contexts", [], "Lengths of the context, powers of two from 1,024 to 65,536; all if "
                              "none is given.")
_BATCH = flags.DEFINE_integer("batch_size", 1, "Sequences that are decoded together.", lower_bound=1)
_TOKENS = flags.DEFINE_integer("tokens", 64, "Tokens that one call decodes.", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed calls, after one that is not timed.", lower_bound=1)
_TINY = flags.DEFINE_bool("tiny", False, "Runs models of width 32 with two layers, in float32, on a 256th of the "
                          "contexts.")
_OUT = flags.DEFINE_string("out", "", "JSON lines file to which each run's record is appended.")
_LIMIT = flags.DEFINE_float("limit_seconds", 0, "Begins no run that would probably end later; 0 for no limit.",
                            lower_bound=0)


def main(_):
  start = time.monotonic()
  path = pathlib.Path(_OUT.value) if _OUT.value else None
  common = training.provenance()
  # The contexts of a model follow one another, because its weights serve them all, as does the program of a linear one.
  every = [((name, context), common | {"setting": _setting(name, context)})
           for name in sweeps.chosen(_MODELS, _MODELS_KNOWN)
           for context in map(_scaled, sweeps.chosen(_CONTEXTS, _CONTEXTS_KNOWN))]
  runs = sweeps.missing(every, path)
  print(f"{common['device']}: {len(runs)} runs, {len(every) - len(runs)} recorded before")
  failed = sweeps.run(runs, lambda run: _measured(*run), _line, _RESULTS, path, begun=start, limit=_LIMIT.value)
  if failed:
    print("failed:", *failed, file=sys.stderr)
    sys.exit(1)


def _scaled(tokens):
  return max(1, tokens // 256) if _TINY.value else tokens


def _config(name):
  config = lookup(name)
  return training.shrunk(config) if _TINY.value else config


def _setting(name, context):
  config = _config(name)
  return {"name": name, "tiny": _TINY.value, "context": context, "batch_size": _BATCH.value, "tokens": _TOKENS.value,
          "repeats": _REPEATS.value, "parameters": parameter_count(config.model), "dtype": config.model.dtype,
          "model": to_dict(config)["model"]}


@functools.lru_cache(maxsize=1)
def _model(name):
  config = _config(name).model
  return jax.jit(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))()


@functools.partial(jax.jit, donate_argnames="state")
def _read(model, tokens, state):
  """Returns the logits after `tokens`, and the state there."""
  hidden, state = model.hidden(tokens, state)
  return jnp.dot(hidden[:, -1], model.unembedding().astype(hidden.dtype), preferred_element_type=jnp.float32), state


@functools.partial(jax.jit, static_argnames="steps")
def _decode(model, logits, state, key, steps):
  return decode(model, logits, state, key, steps, Sampling(temperature=0))[0]


def _measured(name, context):
  model, batch, steps = _model(name), _BATCH.value, _TOKENS.value
  vocabulary, piece = model.embedding.shape[0], min(context, _scaled(_PIECE))
  prompt = np.random.default_rng(0).integers(vocabulary, size=(batch, context), dtype=np.int32)
  state = jax.jit(lambda model: model.init_state(batch, context + steps))(model)
  for i in range(0, context, piece):
    logits, state = _read(model, prompt[:, i:i + piece], state)
  arguments = model, logits, state, jax.random.key(0)
  # The first context of a linear model compiles it, and the others find it again.
  program = _decode.lower(*arguments, steps=steps).compile()
  seconds = []
  for _ in range(_REPEATS.value + 1):
    begin = time.perf_counter()
    jax.block_until_ready(program(*arguments))
    seconds.append(time.perf_counter() - begin)
  a_token = statistics.median(seconds[1:]) / steps
  memory = program.memory_analysis()
  needed = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
  return {"ms_per_token": round(1000 * a_token, 4), "tokens_per_s": round(batch / a_token, 1),
          "state_mib": round(state_bytes(model, batch, context) / 2**20, 4), "memory_gib": round(needed / 2**30, 4)}


def _line(row):
  return (f"after {row['setting']['context']:>6,} tokens {row['ms_per_token']:.3f} ms per token, state "
          f"{row['state_mib']:,.2f} MiB, {row['memory_gib']:.2f} GiB in all")


if __name__ == "__main__":
  commands.run(main, cached=True)
