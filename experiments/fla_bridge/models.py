"""Randomly initialised models of flash-linear-attention for comparison. Only this module imports that library's models.

Every parameter is drawn so that it matters: norms, biases and decays leave their defaults, and logits are of order one.
The recurrent kernels run, because they compute float32 products without TF32. Nothing is timed, so Triton's autotuner
takes the first configuration that fits. The attention layers ask for `flash_attn`, in whose place PyTorch's attention
runs under the same masks.

Without a GPU the same kernels run in Triton's interpreter (`interpret()`), which is slow.
"""

import os
import pathlib
import sys
import types
from typing import Any

import numpy as np

_SMALL = dict(hidden_size=128, num_hidden_layers=3, vocab_size=256, intermediate_size=192)
_TINY = dict(hidden_size=32, num_hidden_layers=2, vocab_size=48, intermediate_size=16)
_WINDOW = {"attn": {"layers": [1], "num_heads": 2, "window_size": 8}}

# By name: model class, options of both sizes, options of the small model, options of the fixture.
MODELS: dict[str, tuple[str, dict, dict, dict]] = {
    "gla": ("GLA", dict(num_heads=2), {}, {}),
    "gla_convolution": ("GLA", dict(
        num_heads=2, use_short_conv=True, fuse_norm=False, tie_word_embeddings=True), {}, {}),
    "delta_net": ("DeltaNet", dict(num_heads=2), {}, {}),
    "delta_net_window": ("DeltaNet", dict(num_heads=2, use_gate=True, **_WINDOW), {}, {}),
    "gated_deltanet": ("GatedDeltaNet", dict(num_heads=2), dict(head_dim=32), dict(head_dim=16)),
    "gated_deltanet_global": ("GatedDeltaNet", dict(
        num_heads=2, num_v_heads=4, expand_v=1.0, attn={"layers": [0], "num_heads": 4, "num_kv_heads": 2}),
        dict(head_dim=32), dict(head_dim=16)),
    "retnet": ("RetNet", dict(num_heads=2), {}, {}),
    "hgrn2": ("HGRN2", {}, dict(expand_ratio=64), dict(expand_ratio=16)),
    "hgrn2_window": ("HGRN2", dict(num_hidden_layers=3, use_short_conv=True, **_WINDOW),
                     dict(expand_ratio=64), dict(expand_ratio=16)),
    "mamba2": ("Mamba2", dict(n_groups=1), dict(head_dim=32, state_size=64), dict(head_dim=16, state_size=16)),
    "transformer": ("Transformer", dict(num_heads=4, num_kv_heads=2, window_size=16), {}, {}),
}


def interpret() -> None:
  """Runs Triton's kernels on the CPU. Must be called before anything imports Triton."""
  if "triton" in sys.modules:
    raise ValueError("Triton is imported already: too late for its interpreter")
  os.environ["TRITON_INTERPRET"] = "1"


def build(name: str, device: str, *, tiny: bool = False, seed: int = 0) -> Any:
  """Builds the float32 model called `name`, with parameters drawn from `seed`."""
  import torch

  fla = _fla()
  kind, common, small, least = MODELS[name]
  sizes = dict(_TINY if tiny else _SMALL)
  if kind == "Mamba2":
    sizes.pop("intermediate_size")
    sizes["chunk_size"] = 32
  elif kind != "Transformer":
    sizes["attn_mode"] = "fused_recurrent"
  config = getattr(fla, f"{kind}Config")(**(sizes | common | (least if tiny else small)))
  model = getattr(fla, f"{kind}ForCausalLM")(config).eval()
  random = np.random.default_rng(seed)
  with torch.no_grad():
    for key, value in model.named_parameters():
      value.copy_(torch.from_numpy(_draw(key, tuple(value.shape), random)))
  return model.to(device)


def load(path: pathlib.Path, device: str) -> Any:
  """Loads the model of a checkpoint directory. Raises ValueError unless its tensors are exactly the model's."""
  import torch
  from transformers import AutoConfig, AutoModelForCausalLM

  _fla()
  config = AutoConfig.from_pretrained(path)
  if hasattr(config, "attn_mode"):
    config.attn_mode = "fused_recurrent"
  model, info = AutoModelForCausalLM.from_pretrained(path, config=config, dtype=torch.float32,
                                                     output_loading_info=True)
  wrong = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
  if wrong:
    raise ValueError(f"{path}: {wrong}")
  return model.eval().to(device)


def logits(model: Any, tokens: np.ndarray) -> np.ndarray:
  """Returns float32 logits [B,T,V] of tokens [B,T]."""
  import torch

  with torch.no_grad():
    return model(torch.from_numpy(tokens).to(model.device), use_cache=False).logits.float().cpu().numpy()


def greedy(model: Any, prompt: np.ndarray, steps: int) -> np.ndarray:
  """Generates the `steps` most likely tokens after each prompt [B,T], one at a time through the model's cache."""
  import torch

  tokens, cache, chosen = torch.from_numpy(prompt).to(model.device), None, []
  with torch.no_grad():
    for _ in range(steps):
      out = model(tokens, past_key_values=cache, use_cache=True)
      cache, tokens = out.past_key_values, out.logits[:, -1:].argmax(-1)
      chosen.append(tokens)
  return torch.cat(chosen, dim=1).cpu().numpy()


def save(model: Any, path: pathlib.Path) -> None:
  model.save_pretrained(path)
  (path / "generation_config.json").unlink(missing_ok=True)


def write_fixture(name: str, path: pathlib.Path, device: str) -> None:
  """Writes a tiny checkpoint, and tokens, logits and the greedy continuation as `logits.npz`."""
  model = build(name, device, tiny=True)
  tokens = np.random.default_rng(1).integers(0, model.config.vocab_size, (2, 20))
  save(model, path)
  np.savez_compressed(path / "logits.npz", tokens=tokens.astype(np.int32), logits=logits(model, tokens),
                      continuation=greedy(model, tokens, 8).astype(np.int32))


def _draw(name: str, shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
  """Draws a parameter by its name: norms near 1, decays and biases off their defaults, matrices that keep variances."""
  noise = random.standard_normal(shape).astype(np.float32)
  last = name.rsplit(".", 1)[-1]
  if last == "D" or len(shape) == 1 and last == "weight":
    return 1 + 0.3 * noise
  if len(shape) == 1:  # biases, A_log
    return 0.5 * noise - (1 if last == "dt_bias" else 0)
  if "embeddings" in name or "lower_bounds" in name:
    return noise
  return noise / np.sqrt(np.prod(shape[1:])).astype(np.float32)


def _fla() -> types.ModuleType:
  """Imports flash-linear-attention's models and prepares them for comparisons."""
  import torch
  from triton.runtime.autotuner import Autotuner

  # cuDNN computes convolutions in TF32 by default.
  torch.backends.cudnn.allow_tf32 = False

  Autotuner.run = _first_configuration
  import fla.layers.attn
  import fla.models

  fla.layers.attn.flash_attn_func = _attention
  return fla.models


def _first_configuration(autotuner, *arguments, **options):
  from triton.runtime.errors import OutOfResources

  for config in autotuner.configs:
    try:
      return autotuner.fn.run(*arguments, **(options | config.all_kwargs()))
    except OutOfResources as e:
      error = e
  raise error


def _attention(q, k, v, causal, window_size):
  """Replaces flash_attn_func on [B,T,H,K]. The last query sees the last key, and a window counts earlier keys."""
  import torch

  queries, keys = torch.arange(q.shape[1], device=q.device), torch.arange(k.shape[1], device=q.device)
  distance = (queries[:, None] + k.shape[1] - q.shape[1]) - keys[None]
  visible = (distance >= 0) & ((distance <= window_size[0]) | (window_size[0] < 0))
  q, k, v = (x.transpose(1, 2) for x in (q, k, v))
  attend = torch.nn.functional.scaled_dot_product_attention
  return attend(q, k, v, attn_mask=visible, enable_gqa=True).transpose(1, 2)
