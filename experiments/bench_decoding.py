"""Time per token and memory of decoding, time to a prompt's first token, and throughput of a server, for linear mixers
and softmax attention.

  python experiments/bench_decoding.py --out=experiments/results/decoding.jsonl --limit_seconds=540
  python experiments/bench_decoding.py --models=tnl_385m,gla_1b3 --batch_sizes=1,64 --contexts=2048 --prompts=32768
  python experiments/bench_decoding.py --models=gla_1b3,transformer_1b3 --servers=1,16,64 --out=serving.jsonl
  python experiments/bench_decoding.py --tiny                                           # proves the command on a CPU

A context is read in pieces, and the state is carried from one to the next. Then `lin_jax.generate.decode` draws tokens
greedily in one compiled program, always from the same state, and the median of its calls counts. The cache of attention
has room for exactly the context and the decoded tokens. A prompt of --prompts is read by one sequence, in pieces and at
once, up to its first token. With --servers, a server with that many rows answers --requests requests of mixed lengths,
and contexts are read only if --contexts names them. A run that fails is recorded with its reason. A run is skipped when
--out has its record for this device, these versions and this setting. Exit codes: 0 done, or the time is over; 1 a run
failed; 2 a user's error. `report_claims.py` draws the curves.
"""

import pathlib
import sys
import time

from absl import flags

from running import commands
from speed import decoding, serving, sweeps, training

_MODELS_KNOWN = ("tnl_385m", "gla_340m", "deltanet_340m", "transformer_340m", "gla_1b3", "deltanet_1b3",
                 "gated_deltanet_1b3", "transformer_1b3")
_CONTEXTS_KNOWN = tuple(2**i for i in range(10, 17))
_PROMPTS_KNOWN = tuple(2**i for i in range(12, 18))
_PIECE = 4096

_MODELS = flags.DEFINE_list("models", list(_MODELS_KNOWN[:4]), f"Models, out of {', '.join(_MODELS_KNOWN)}.")
_CONTEXTS = flags.DEFINE_list("contexts", [], "Lengths of the context, powers of two from 1,024 to 65,536; all if "
                              "none is given.")
_PROMPTS = flags.DEFINE_list("prompts", [], "Lengths of prompts whose time to the first token is measured, powers of "
                             "two from 4,096 to 131,072.")
_BATCHES = flags.DEFINE_list("batch_sizes", ["1"], "Numbers of sequences that are decoded together.")
_TOKENS = flags.DEFINE_integer("tokens", 64, "Tokens that one call decodes.", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed calls, after one that is not timed.", lower_bound=1)
_SERVERS = flags.DEFINE_list("servers", [], "Numbers of rows of servers whose throughput is measured.")
_REQUESTS = flags.DEFINE_integer("requests", 128, "Requests that a server answers.", lower_bound=1)
_STRIDE = flags.DEFINE_integer("stride", 8, "Tokens that a server draws per row and call.", lower_bound=1)
_TINY = flags.DEFINE_bool("tiny", False, "Runs models of width 32 with two layers, in float32, on a 256th of the "
                          "contexts and prompts.")
_OUT = flags.DEFINE_string("out", "", "JSON lines file to which each run's record is appended.")
_LIMIT = flags.DEFINE_float("limit_seconds", 0, "Begins no run that would probably end later; 0 for no limit.",
                            lower_bound=0)


def main(_):
  start = time.monotonic()
  path = pathlib.Path(_OUT.value) if _OUT.value else None
  common = training.provenance()
  failed = []
  for runs, line in ((_decodings(), decoding.line), (_prefills(), decoding.line), (_servings(), serving.line)):
    every = [(run, common | {"setting": decoding.setting(run)}) for run in runs]
    missing = sweeps.missing(every, path)
    if every:
      print(f"{common['device']}: {len(missing)} runs, {len(every) - len(missing)} recorded before", flush=True)
      failed += sweeps.run(missing, lambda run: run.measure(), line, runs[0].results, path, begun=start,
                           limit=_LIMIT.value)
  if failed:
    print("failed:", *failed, file=sys.stderr)
    sys.exit(1)


def _decodings():
  contexts = [] if _SERVERS.value and not _CONTEXTS.value else sweeps.chosen(_CONTEXTS, _CONTEXTS_KNOWN)
  # The contexts of a model follow one another, because its weights serve them all, as does the program of a linear one.
  return [decoding.Decoding(name, _TINY.value, context, batch, _TOKENS.value, _REPEATS.value)
          for name in sweeps.chosen(_MODELS, _MODELS_KNOWN) for batch in _numbers(_BATCHES)
          for context in map(_scaled, contexts)]


def _prefills():
  prompts = sweeps.chosen(_PROMPTS, _PROMPTS_KNOWN) if _PROMPTS.value else []
  return [decoding.Prefill(name, _TINY.value, prompt, piece, _REPEATS.value)
          for name in sweeps.chosen(_MODELS, _MODELS_KNOWN) for prompt in map(_scaled, prompts)
          for piece in (_scaled(_PIECE), 0)]


def _servings():
  prompt, answer, piece = (64, 16, 32) if _TINY.value else (2048, 512, 512)
  return [serving.Serving(name, _TINY.value, rows, _REQUESTS.value, prompt, answer, piece, _STRIDE.value,
                          _REPEATS.value)
          for name in sweeps.chosen(_MODELS, _MODELS_KNOWN) for rows in _numbers(_SERVERS)]


def _numbers(flag):
  if bad := [text for text in flag.value if not text.isdecimal() or int(text) < 1]:
    raise ValueError(f"--{flag.name}={bad[0]}: must be whole numbers of at least 1")
  return [int(text) for text in flag.value]


def _scaled(tokens):
  return decoding.scaled(tokens, _TINY.value)


if __name__ == "__main__":
  commands.run(main, cached=True)
