"""Olmo Hybrid: three layers of Gated DeltaNet to one of attention, whose blocks norm the outputs of their branches.

Attention norms the queries and keys of all heads jointly and has no positions in the released model. The options say so
by a `rope_theta` of null. Where they say nothing, readers disagree, and the file is refused. The head norm of Gated
DeltaNet has its own epsilon. Transformers 5.24 writes the channels of the three convolutions as three tensors of
equally many rows, whatever the channels of queries, keys and values are, and renames two norms. Both spellings are
read, and transformers' own is written.
"""

import dataclasses

from lin_jax.config import ModelConfig
from lin_jax.hf import llama, rope, sections
from lin_jax.hf.layout import Layout
from lin_jax.hf.qwen3_5 import DECAY, gated_delta_net, write_attention, write_gated_delta_net
from lin_jax.hf.sections import Section
from lin_jax.mixers.attention import AttentionConfig
from lin_jax.mixers.gated_delta_net import GatedDeltaNetConfig

_MODEL = Section(ModelConfig, llama.WHOLE_MODEL | {
    "width": ("hidden_size", 3840), "vocab_size": ("vocab_size", 100352)}, {"post_norm": "hybrid"},
    ("mixer", "hybrid_mixer", "hybrid_layers", "dtype"))
_DELTA = Section(GatedDeltaNetConfig, {
    "heads": ("linear_num_key_heads", None), "value_heads": ("linear_num_value_heads", None),
    "head_dim": ("linear_key_head_dim", None), "conv_width": ("linear_conv_kernel_dim", 4),
    "allow_neg_eigval": ("linear_allow_neg_eigval", True)}, {"norm_eps": 1e-5}, ("expand_v",))
_ATTENTION = Section(AttentionConfig, {"heads": ("num_attention_heads", 30), "kv_heads": ("num_key_value_heads", None)},
                     {"qk_norm": "heads"}, ("head_dim", *llama.ROPE))
_SERVED = llama.ACTIVATION | {"attention_bias": (False,)}
_START = tuple(f"linear_{name}" for name in ("a_log_min", "a_log_max", "dt_min", "dt_max", "dt_init_floor"))
_TOKENS = {"eos_token_id": 100257, "pad_token_id": 100277}
_OWN = (*rope.OPTIONS, *_START, "layer_types", "linear_value_head_dim")

_PROJECTIONS = {"query": "q", "key": "k", "value": "v", "gate": "g", "beta": "b", "decay": "a", "output": "o"}
_DELTA_TENSORS = DECAY | {
    f"mixer.{here}.kernel": f"linear_attn.{there}_proj.weight" for here, there in _PROJECTIONS.items()} | {
    tuple(f"mixer.convolutions.{i}.kernel" for i in range(3)):
        tuple(f"linear_attn.{name}_conv1d.weight" for name in "qkv"),
    "mixer.norm.scale": "linear_attn.o_norm.weight", "mixer_norm.scale": "attention_layer_norm.weight",
    "mlp_norm.scale": "feedforward_layer_norm.weight"}
_ATTENTION_TENSORS = llama.ATTENTION | {"mixer_norm.scale": "feedforward_layer_norm.weight",
                                        "mlp_norm.scale": "post_feedforward_layernorm.weight"}
_SPELLINGS = (("attention_layer_norm", "input_layernorm"), ("feedforward_layer_norm", "post_attention_layernorm"))
_SIZES = dict.fromkeys(("attention_layer_norm", "feedforward_layer_norm", "post_feedforward_layernorm"), "hidden_size")


def from_hf(values: dict) -> ModelConfig:
  """The model of a `config.json`. Raises ValueError as `families` says."""
  sections.require("olmo_hybrid", values, (_MODEL, _DELTA, _ATTENTION), _SERVED, _OWN)
  model, delta = _MODEL.read(values), _DELTA.read(values)
  attention = llama.resolved(AttentionConfig(**_ATTENTION.read(values), **rope.read_or_none(values)), model["width"])
  heads = delta["heads"] or attention.heads
  delta |= {"heads": heads, "value_heads": delta["value_heads"] or attention.heads,
            "head_dim": delta["head_dim"] or int(0.75 * model["width"] / heads)}
  value_dim = values.get("linear_value_head_dim")
  layers = sections.attention_layers(values, model["depth"]) or (model["depth"] - 1,)
  if len(layers) == model["depth"]:
    raise ValueError("layer_types: must have a layer of 'linear_attention'")
  return ModelConfig(mixer=gated_delta_net(delta, 2 * delta["head_dim"] if value_dim is None else value_dim),
                     hybrid_mixer=attention, hybrid_layers=layers, dtype=sections.dtype(values), **model)


def to_hf(config: ModelConfig) -> dict:
  """The `config.json` of a model, for float32 tensors. Raises ValueError that names every field in the way."""
  refused = []
  mixer = dataclasses.replace(config.mixer, norm_eps=config.mixer.norm_eps or config.norm_eps)
  values = {"model_type": "olmo_hybrid", "architectures": ["OlmoHybridForCausalLM"], "dtype": "float32",
            "hidden_act": "silu", "layer_types": sections.layer_types(config)}
  values |= _MODEL.write(config, refused) | write_gated_delta_net(_DELTA, mixer, refused)
  values |= write_attention(_ATTENTION, config, refused)
  attention = config.hybrid_mixer
  if attention is None:
    refused.append("hybrid_mixer=None (only attention)")
  elif not refused and attention.head_dim not in (0, config.width // attention.heads):
    refused.append(f"head_dim={attention.head_dim} (only hidden_size / num_attention_heads)")
  elif not refused and attention.rope_fraction != 1:
    refused.append(f"rope_fraction={attention.rope_fraction} (only 1.0)")
  if config.vocab_size <= max(_TOKENS.values()):  # the class has these where a file has none
    values |= dict.fromkeys(_TOKENS)
  if refused:
    raise ValueError(f"no olmo_hybrid model of transformers has {'; '.join(refused)}")
  return values | rope.write(attention.rope_base)


def layout(config: ModelConfig, values: dict) -> Layout:
  """The tensors of a model."""
  return llama.stack(config, lambda layer, mixer: llama.MLP | (
      _DELTA_TENSORS if isinstance(mixer, GatedDeltaNetConfig) else _ATTENTION_TENSORS),
      spellings=_SPELLINGS, sizes=_SIZES)
