"""Makes the tests' fixtures of transformers' models, and checks with transformers the folders that `lin_jax.hf` writes.

  cd /tmp && python $REPOSITORY/experiments/make_hf_fixtures.py --out=$REPOSITORY/tests/fixtures/hf
  cd /tmp && python $REPOSITORY/experiments/make_hf_fixtures.py --check=FOLDER --fixture=FIXTURES/NAME

It needs PyTorch and transformers (5.24 made the fixtures), no JAX, and another working directory than the repository,
because transformers would import our `kernels` there. A fixture is a tiny random model with its tokens, its float32
logits at some of them and its greedy continuation. `--check` loads a folder, which must hold exactly the tensors of its
model, and ends with exit code 1 if the logits are not the fixture's within 1e-4.
"""

import argparse
import json
import pathlib
import sys

import numpy as np
import torch
import transformers

VOCABULARY, TOKENS, STEPS, EVERY = 24, 70, 12, 6  # logits of every sixth token are kept
BAR = 1e-4
_SIZES = dict(vocab_size=VOCABULARY, hidden_size=12, intermediate_size=10)
_LLAMA = _SIZES | dict(num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
_QWEN = _SIZES | dict(
    num_attention_heads=2, num_key_value_heads=1, head_dim=8, linear_key_head_dim=4, linear_value_head_dim=3,
    linear_num_key_heads=2, linear_num_value_heads=4,
    rope_parameters={"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.25})
_PATTERN = ["linear_attention", "full_attention"]
_VISION = dict(depth=1, hidden_size=8, intermediate_size=8, num_heads=2, patch_size=2, out_hidden_size=12,
               num_position_embeddings=4, temporal_patch_size=1, spatial_merge_size=1)

# Name -> (class, options). The options are at least what makes each part of the mathematics matter.
MODELS = {
    "llama": ("Llama", _LLAMA | dict(tie_word_embeddings=True, rms_norm_eps=1e-5)),
    "mistral": ("Mistral", _LLAMA | dict(sliding_window=8)),
    "qwen3": ("Qwen3", _LLAMA | dict(head_dim=8, rope_parameters={"rope_type": "default", "rope_theta": 1e6})),
    "qwen3_5_text": ("Qwen3_5Text", _QWEN | dict(num_hidden_layers=4, layer_types=_PATTERN * 2,
                                                tie_word_embeddings=True)),
    "qwen3_5": ("Qwen3_5", dict(vision_config=_VISION, text_config=_QWEN | dict(
        num_hidden_layers=2, layer_types=_PATTERN, linear_num_value_heads=2))),
    "olmo_hybrid": ("OlmoHybrid", _SIZES | dict(
        num_hidden_layers=3, layer_types=["linear_attention", *_PATTERN], num_attention_heads=2, linear_key_head_dim=4,
        linear_value_head_dim=5, linear_num_value_heads=4, pad_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": None})),
    "mamba2_transformers": ("Mamba2", dict(
        vocab_size=VOCABULARY, hidden_size=12, num_hidden_layers=2, num_heads=4, head_dim=6, state_size=6, n_groups=2,
        chunk_size=32)),
}
_CAUSAL = {"Qwen3_5Text": "Qwen3_5ForCausalLM", "Qwen3_5": "Qwen3_5ForConditionalGeneration"}


def build(name: str) -> torch.nn.Module:
  """The model called `name`, with every parameter redrawn so that it matters and exact in bfloat16."""
  kind, options = MODELS[name]
  torch.manual_seed(0)
  config = getattr(transformers, f"{kind}Config")(**options)
  model = getattr(transformers, _CAUSAL.get(kind, f"{kind}ForCausalLM"))(config).eval()
  random = np.random.default_rng(0)
  with torch.no_grad():
    for key, value in model.named_parameters():
      noise = torch.from_numpy(random.standard_normal(tuple(value.shape)).astype(np.float32))
      if "embed" in key:
        value.copy_(noise)
      elif value.ndim > 1:
        value.copy_(noise / np.sqrt(np.prod(value.shape[1:])))
      else:
        value.add_(0.3 * noise)  # norms, decays and biases leave their starting values
      value.copy_(value.bfloat16().float())
  model.generation_config.eos_token_id = None
  return model


def logits(model: torch.nn.Module, tokens: np.ndarray) -> np.ndarray:
  """Float32 logits of tokens [B, T] at every `EVERY`-th of them."""
  with torch.no_grad():
    return model(torch.from_numpy(tokens).long(), use_cache=False).logits.float().numpy()[:, EVERY - 1::EVERY]


def make(name: str, path: pathlib.Path) -> None:
  """Writes the fixture, with tensors in bfloat16 as in released files, and activations in float32 by its config."""
  model = build(name)
  tokens = np.random.default_rng(1).integers(1, VOCABULARY, (1, TOKENS)).astype(np.int32)
  known = {"tokens": tokens, "logits": logits(model, tokens)}
  with torch.no_grad():
    out = model.generate(torch.from_numpy(tokens).long(), max_new_tokens=STEPS, do_sample=False)
  known["continuation"] = out[:, TOKENS:].numpy().astype(np.int32)
  model.bfloat16().save_pretrained(path)
  (path / "generation_config.json").unlink(missing_ok=True)
  config = json.loads((path / "config.json").read_text())
  for part in (config, config.get("text_config", {})):
    part["dtype"] = "float32"
  config.pop("vision_config", None)
  (path / "config.json").write_text(json.dumps(config, indent=1) + "\n")
  np.savez_compressed(path / "logits.npz", **known)


def check(folder: pathlib.Path, fixture: pathlib.Path) -> float:
  """The largest difference of the folder's logits from the fixture's. Raises ValueError for missing and extra tensors.
  """
  model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
  wrong = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
  if wrong:
    raise ValueError(f"{folder}: {wrong}")
  known = np.load(fixture / "logits.npz")
  return float(np.abs(logits(model.eval(), known["tokens"]) - known["logits"]).max())


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--out", type=pathlib.Path, help="Directory that receives the fixtures.")
  parser.add_argument("--models", default=",".join(MODELS), help="Fixtures to make; all by default.")
  parser.add_argument("--check", type=pathlib.Path, help="Folder to load and compare.")
  parser.add_argument("--fixture", type=pathlib.Path, help="Fixture that --check compares with.")
  arguments = parser.parse_args()
  if bool(arguments.out) == bool(arguments.check) or bool(arguments.check) != bool(arguments.fixture):
    parser.error("give either --out, or --check with --fixture")
  if arguments.check:
    error = check(arguments.check, arguments.fixture)
    print(json.dumps({"folder": str(arguments.check), "largest_difference": error}), flush=True)
    sys.exit(error > BAR)
  unknown = sorted(set(arguments.models.split(",")) - set(MODELS))
  if unknown:
    parser.error(f"--models={','.join(unknown)}: must be among {', '.join(MODELS)}")
  for name in arguments.models.split(","):
    make(name, arguments.out / name)
    print(json.dumps({"made": name, "transformers": transformers.__version__, "torch": torch.__version__}), flush=True)


if __name__ == "__main__":
  main()
