"""Samples text from a trained model.

  python experiments/generate.py --workdir=runs/gla_tiny --prompt="KING:" --tokens=200 --temperature=0.8 --top_p=0.95
  python experiments/generate.py --workdir=runs/gla_tiny --requests=prompts.jsonl --rows=16 --out=answers.jsonl
  python experiments/generate.py --workdir=runs/qwen --interactive --chat

Every line of --requests is a JSON object with a `prompt`, and, if it is to have others than the flags, `max_tokens`,
`temperature`, `top_k`, `top_p` and `seed`. It may have an `id` and texts that end its answer (`stop`). All lines are
checked before the first is answered. The requests share --rows rows, and a row whose answer has ended takes the next
request while the others go on. Each answer is printed when it ends, as a JSON object with the fields `id`, `text`,
`tokens` and `ended` ("stop" or "length"); --out receives all of them in the order of the requests. With --interactive,
each line of standard input is a prompt of its own, and its answer is printed as it is drawn. Both end with the rate and
the bytes of the state, which do not grow while they run.
"""

import dataclasses
import json
import pathlib
import sys
import time

import jax
import numpy as np
from absl import flags

from lin_jax import files
from lin_jax.chat import ChatTemplate
from lin_jax.checkpoint import load_model
from lin_jax.generate import Sampling, compile_generate, state_bytes
from lin_jax.serving import Server
from lin_jax.tokenizer import load_tokenizer, require_vocabulary, stream_decode
from running import commands, meshes
from serving import answers, requests

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of a training run.", required=True)
_CHECKPOINT = commands.define_checkpoint()
_MESH = meshes.define()
_DATA = flags.DEFINE_string("data", "", "Dataset directory with the tokenizer, or a tokenizer's file; by default the "
                           "run's own.")
_PROMPT = flags.DEFINE_string("prompt", "", "Text to continue; if empty, the model starts a document.")
_CHAT = flags.DEFINE_bool("chat", False, "Makes each prompt the message of a user in the tokenizer's chat template, "
                          "and prints the answer alone.")
_TOKENS = flags.DEFINE_integer("tokens", 200, "Tokens to generate at most. The sample ends where the model ends a "
                               "document, or its answer.")
_TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "Divides the logits; 0 is greedy.")
_TOP_K = flags.DEFINE_integer("top_k", 0, "Draws from the k most likely tokens; 0 draws from all.")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Draws from the smallest set of tokens that has this probability.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the sample.")
_OUT = flags.DEFINE_string("out", "", "File that receives the prompt and the sample, or the answers, too.")
_REQUESTS = flags.DEFINE_string("requests", "", "File of JSON lines with prompts to answer.")
_INTERACTIVE = flags.DEFINE_bool("interactive", False, "Answers the lines of standard input.")
_ROWS = flags.DEFINE_integer("rows", 8, "Requests that are answered at the same time.")
_MAX_LENGTH = flags.DEFINE_integer("max_length", 4096, "Tokens of a prompt and its answer at most, if the model has "
                                   "attention without a window; no other model has such a bound.")


def main(_):
  with meshes.using(_MESH.value) as mesh:
    _generate(mesh)


def _generate(mesh):
  sampling = Sampling(_TEMPERATURE.value, _TOP_K.value, _TOP_P.value)
  if _TOKENS.value < 1:
    raise ValueError(f"--tokens={_TOKENS.value}: must be at least 1")
  if _REQUESTS.value and _INTERACTIVE.value:
    raise ValueError("--requests and --interactive: only one of them can be given")
  if _PROMPT.value and (_REQUESTS.value or _INTERACTIVE.value):
    raise ValueError(f"--prompt={commands.text(_PROMPT)}: prompts come from --requests or --interactive")
  if _OUT.value and _INTERACTIVE.value:
    raise ValueError(f"--out={_OUT.value}: --interactive writes to standard output only")
  config, model = load_model(pathlib.Path(_WORKDIR.value), commands.checkpoint_step(_CHECKPOINT.value), mesh)
  tokenizer = load_tokenizer(_DATA.value or config.data.path)
  require_vocabulary(tokenizer, config.model.vocab_size)
  chat = ChatTemplate(tokenizer) if _CHAT.value else None
  if _REQUESTS.value or _INTERACTIVE.value:
    _serve(model, tokenizer, chat)
  else:
    _sample(model, tokenizer, chat, dataclasses.replace(sampling, vocab_size=tokenizer.vocab_size))


def _sample(model, tokenizer, chat, sampling):
  prompt_text = commands.text(_PROMPT)
  prompt, stop_ids = requests.read_prompt(prompt_text, tokenizer, chat)
  shown = "" if chat else prompt_text
  run = compile_generate(model, 1, len(prompt), _TOKENS.value, sampling)

  start = time.perf_counter()
  tokens = np.asarray(run([prompt], jax.random.key(_SEED.value)))[0]
  seconds = time.perf_counter() - start

  ends = np.flatnonzero(np.isin(tokens, stop_ids))
  sample = stream_decode(tokenizer, tokens[:ends[0]] if ends.size else tokens, first=not shown)
  text = shown + "".join(sample)
  print(text)
  if _OUT.value:
    files.write(_OUT.value, text + "\n")
  print(f"\n{len(prompt)} tokens read and {len(tokens)} generated in {seconds:.2f} s "
        f"({len(tokens) / seconds:,.0f} tokens/s); decoding state {state_bytes(model, 1, len(prompt) + len(tokens)):,} "
        "bytes", file=sys.stderr)


def _serve(model, tokenizer, chat):
  server = Server(model, rows=1 if _INTERACTIVE.value else _ROWS.value, max_length=_MAX_LENGTH.value)
  defaults = requests.TextRequest("", _TOKENS.value, _TEMPERATURE.value, _TOP_K.value, _TOP_P.value, _SEED.value)
  counts = answers.Counts()
  if _INTERACTIVE.value:
    if sys.stdin.isatty():
      print("Every line is a prompt of its own; Ctrl-D ends.", file=sys.stderr)
    answers.converse(server, tokenizer, defaults, sys.stdin.buffer, counts, chat)
  else:
    asked = requests.load(pathlib.Path(_REQUESTS.value), defaults, server, tokenizer, chat)
    lines = {}
    for result in answers.answer(server, tokenizer, asked, counts, chat):
      lines[result["id"]] = json.dumps(result)
      print(lines[result["id"]], flush=True)
    if _OUT.value:
      files.write(_OUT.value, "".join(lines[text.id] + "\n" for text, _ in asked))
  print(f"\n{counts.line(server)}", file=sys.stderr)


if __name__ == "__main__":
  commands.run(main, cached=True)
