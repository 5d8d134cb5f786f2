"""Samples text from a trained model.

  python experiments/generate.py --workdir=runs/gla_tiny --prompt="KING:" --tokens=200 --temperature=0.8 --top_p=0.95
"""

import dataclasses
import pathlib
import sys
import time

import jax
import numpy as np
from absl import flags

from lin_jax import files
from lin_jax.checkpoint import load_model
from lin_jax.generate import Sampling, compile_generate, state_bytes
from lin_jax.tokenizer import load_tokenizer, require_vocabulary, stream_decode
from running import commands, meshes

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of a training run.", required=True)
_CHECKPOINT = commands.define_checkpoint()
_MESH = meshes.define()
_DATA = flags.DEFINE_string("data", "", "Dataset directory with the tokenizer; by default the run's own.")
_PROMPT = flags.DEFINE_string("prompt", "", "Text to continue; if empty, the model starts a document.")
_TOKENS = flags.DEFINE_integer("tokens", 200, "Tokens to generate at most. The sample ends where the model ends a "
                               "document.")
_TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "Divides the logits; 0 is greedy.")
_TOP_K = flags.DEFINE_integer("top_k", 0, "Draws from the k most likely tokens; 0 draws from all.")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Draws from the smallest set of tokens that has this probability.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the sample.")
_OUT = flags.DEFINE_string("out", "", "File that receives the prompt and the sample too.")


def main(_):
  with meshes.using(_MESH.value) as mesh:
    _generate(mesh)


def _generate(mesh):
  sampling = Sampling(_TEMPERATURE.value, _TOP_K.value, _TOP_P.value)
  if _TOKENS.value < 1:
    raise ValueError(f"--tokens={_TOKENS.value}: must be at least 1")
  config, model = load_model(pathlib.Path(_WORKDIR.value), commands.checkpoint_step(_CHECKPOINT.value), mesh)
  tokenizer = load_tokenizer(_DATA.value or config.data.path)
  require_vocabulary(tokenizer, config.model.vocab_size)
  sampling = dataclasses.replace(sampling, vocab_size=tokenizer.vocab_size)
  prompt_text = commands.text(_PROMPT)
  prompt = tokenizer.encode(prompt_text) or [tokenizer.eos_id]
  run = compile_generate(model, 1, len(prompt), _TOKENS.value, sampling)

  start = time.perf_counter()
  tokens = np.asarray(run([prompt], jax.random.key(_SEED.value)))[0]
  seconds = time.perf_counter() - start

  ends = np.flatnonzero(tokens == tokenizer.eos_id)
  sample = stream_decode(tokenizer, tokens[:ends[0]] if ends.size else tokens, first=not prompt_text)
  text = prompt_text + "".join(sample)
  print(text)
  if _OUT.value:
    files.write(_OUT.value, text + "\n")
  print(f"\n{len(prompt)} tokens read and {len(tokens)} generated in {seconds:.2f} s "
        f"({len(tokens) / seconds:,.0f} tokens/s); decoding state {state_bytes(model, 1, len(prompt) + len(tokens)):,} "
        "bytes", file=sys.stderr)


if __name__ == "__main__":
  commands.run(main, cached=True)
