"""flash-linear-attention's models in a training step of PyTorch, at the sizes of our configs. Runs in a process of its
own.

The library tunes each kernel at its first call, which takes minutes for some models. `prepare` compiles the candidates
of all kernels in a process that takes one sequence forward and backward; their times, which other processes disturb,
are not kept. The process that trains finds the compiled candidates on disk and tunes alone on the device.
"""

import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable

import fla.layers.attn
import torch
from fla.models import DeltaNetConfig, GatedDeltaNetConfig, GLAConfig, RetNetConfig, TransformerConfig
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM

from . import training

# Depth, width of the MLP, class and options.
_MODELS = {
    "gla_1b3": (24, 5632, GLAConfig, {"num_heads": 4, "expand_k": 0.5, "expand_v": 1}),
    "deltanet_1b3": (24, 5632, DeltaNetConfig, {"num_heads": 16}),
    "gated_deltanet_1b3": (21, 5632, GatedDeltaNetConfig, {"num_heads": 6, "head_dim": 256, "expand_v": 2}),
    "retnet_1b3": (24, 2816, RetNetConfig, {"num_heads": 8}),
    "transformer_1b3": (24, 5632, TransformerConfig, {"num_heads": 32})}
_BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]


def model_config(name: str, tiny: bool):
  """The library's config of the size of our config `name`, or with `tiny` of width 64 with two layers."""
  depth, mlp_width, config, options = _MODELS[name]
  if tiny:
    options = {**options, "num_heads": 2} | ({"head_dim": 16} if "head_dim" in options else {})
  width, mlp_width, depth, vocabulary = (64, 64, 2, 257) if tiny else (2048, mlp_width, depth, 32000)
  return config(hidden_size=width, intermediate_size=mlp_width, num_hidden_layers=depth, vocab_size=vocabulary,
                tie_word_embeddings=True, use_cache=False, fuse_cross_entropy=True, **options)


def prepare(setting: dict) -> Callable[[], tuple[dict, float]]:
  """Compiles all kernels, and returns the function that creates the model and trains."""
  # A failure shows again when the model trains, and is recorded then.
  subprocess.run([sys.executable, "-m", "speed.peer_fla", json.dumps(setting)], check=False,
                 env=os.environ | {"FLA_CACHE_RESULTS": "0"})
  return lambda: _train(setting)


def _compile(setting):
  step, _, _ = _step(setting | {"batch_size": 1}, update=False)
  step(_tokens(setting | {"batch_size": 1, "steps": 1})[0])
  torch.cuda.synchronize()


def _train(setting):
  step, parameters, peak = _step(setting)
  batches, losses = _tokens(setting), []
  for i, tokens in enumerate(batches):
    if i == setting["steps"] - setting["timed_steps"]:
      torch.cuda.synchronize()
      start = time.perf_counter()
    losses.append(step(tokens))
    if i == 0:
      torch.cuda.synchronize()
      first = time.monotonic()
  torch.cuda.synchronize()
  found = training.speed(setting, time.perf_counter() - start, losses)
  return found | {"parameters": parameters, "kernels": None, "memory_gib": round(peak() / 2**30, 3)}, first


def _step(setting, update=True):
  """Returns the step from tokens to the loss, the number of parameters, and a function for the peak of memory."""
  warnings.filterwarnings("ignore")
  torch.manual_seed(0)
  torch.set_float32_matmul_precision("high")  # as the library's own benchmarks do
  fla.layers.attn.flash_attn_func = _attention
  mixed = setting["variant"] == "amp"
  with torch.device("cuda"):
    model = AutoModelForCausalLM.from_config(model_config(setting["name"], setting["tiny"]), dtype=torch.float32)
  model = model.to(torch.float32 if mixed else torch.bfloat16).train()
  groups = [{"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.01},
            {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}]
  optimizer = torch.optim.AdamW(groups, lr=3e-4, betas=(0.9, 0.95), fused=True)

  def step(tokens):
    with torch.autocast("cuda", torch.bfloat16, enabled=mixed):
      loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    if update:
      torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
      optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()

  return step, sum(p.numel() for p in model.parameters()), torch.cuda.max_memory_allocated


def _tokens(setting):
  vocabulary = model_config(setting["name"], setting["tiny"]).vocab_size
  drawn = training.drawn_tokens(vocabulary, setting["batch_size"], setting["sequence_length"], setting["steps"])
  return [torch.from_numpy(ids[:, :-1].copy()).long().cuda() for ids in drawn]  # the model shifts the labels


def _attention(q, k, v, causal=True, window_size=(-1, -1), **_):
  """PyTorch's attention in the place of flash_attn_func, for the calls without a window."""
  if not causal or tuple(window_size) != (-1, -1):
    raise NotImplementedError(f"attention with causal={causal} and window_size={window_size}")
  with sdpa_kernel(_BACKENDS, set_priority=True):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


if __name__ == "__main__":
  _compile(json.loads(sys.argv[1]))
