"""Softmax Transformers of transformers 5: Llama, Mistral with its window, and Qwen3 with normed queries and keys."""

import dataclasses

from lin_jax.config import ModelConfig
from lin_jax.hf import rope, sections
from lin_jax.hf.layout import Layout, Names, prefixed
from lin_jax.hf.sections import Section
from lin_jax.mixers.attention import AttentionConfig
from lin_jax.model import layer_mixers
from lin_jax.typed_json import shown

MODEL = {"embedding": "model.embed_tokens.weight", "norm.scale": "model.norm.weight", "head": "lm_head.weight"}
MLP = {f"mlp.{name}.kernel": f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
NORMS = {"mixer_norm.scale": "input_layernorm.weight", "mlp_norm.scale": "post_attention_layernorm.weight"}
KEYS_AND_VALUES = {"mixer.key.kernel": "self_attn.k_proj.weight", "mixer.value.kernel": "self_attn.v_proj.weight",
                   "mixer.output.kernel": "self_attn.o_proj.weight"}
QK_NORMS = {"mixer.query_norm.scale": "self_attn.q_norm.weight", "mixer.key_norm.scale": "self_attn.k_norm.weight"}
ATTENTION = KEYS_AND_VALUES | QK_NORMS | {"mixer.query.kernel": "self_attn.q_proj.weight"}
SIZES = {"embed_tokens": "vocab_size and hidden_size", "lm_head": "vocab_size and hidden_size", "norm": "hidden_size",
         "input_layernorm": "hidden_size", "post_attention_layernorm": "hidden_size",
         "q_proj": "num_attention_heads, head_dim and hidden_size",
         "o_proj": "num_attention_heads, head_dim and hidden_size",
         "k_proj": "num_key_value_heads, head_dim and hidden_size",
         "v_proj": "num_key_value_heads, head_dim and hidden_size", "q_norm": "head_dim", "k_norm": "head_dim",
         **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "intermediate_size and hidden_size")}
WHOLE_MODEL = {"width": ("hidden_size", 4096), "depth": ("num_hidden_layers", 32), "vocab_size": ("vocab_size", 32000),
               "mlp_width": ("intermediate_size", 11008), "norm_eps": ("rms_norm_eps", 1e-6),
               "tie_embeddings": ("tie_word_embeddings", False)}
HEADS = {"heads": ("num_attention_heads", 32), "kv_heads": ("num_key_value_heads", None)}
ROPE = ("rope_base", "rope_fraction")
ACTIVATION = {"hidden_act": ("silu", "swish")}


@dataclasses.dataclass(frozen=True)
class Kind:
  """How one of the model types differs from the others."""

  architecture: str
  attention: Section
  model: Section
  served: dict[str, tuple]


def _kind(architecture, attention=None, model=None, constants=None, served=None):
  head_dim = {"head_dim": ("head_dim", None)}
  return Kind(architecture, Section(AttentionConfig, HEADS | head_dim | (attention or {}), constants or {}, ROPE),
              Section(ModelConfig, WHOLE_MODEL | (model or {}), {}, ("mixer", "dtype")), ACTIVATION | (served or {}))


KINDS = {
    "llama": _kind("LlamaForCausalLM", served={"attention_bias": (False,), "mlp_bias": (False,)}),
    "mistral": _kind("MistralForCausalLM", attention={
        "window": ("sliding_window", None), "kv_heads": ("num_key_value_heads", 8)}, model={
            "mlp_width": ("intermediate_size", 14336)}, served={"layer_types": (None,)}),
    "qwen3": _kind("Qwen3ForCausalLM", attention={"head_dim": ("head_dim", 128)}, model={
        "mlp_width": ("intermediate_size", 22016), "vocab_size": ("vocab_size", 151936)}, constants={
            "qk_norm": "head"}, served={"attention_bias": (False,), "use_sliding_window": (False,)}),
}


def from_hf(kind: str, values: dict) -> ModelConfig:
  """The model of a `config.json`, with all sizes of its attention given. Raises ValueError as `families` says."""
  described = KINDS[kind]
  own = (*rope.OPTIONS, "sliding_window", "layer_types")
  sections.require(kind, values, (described.attention, described.model), described.served, own)
  model, kinds = described.model.read(values), values.get("layer_types")
  if kind == "qwen3" and kinds not in (None, ["full_attention"] * model["depth"]):
    raise ValueError(f"layer_types={shown(kinds)}: must be 'full_attention' for each of {model['depth']} layers")
  attention = resolved(AttentionConfig(**described.attention.read(_window(kind, values)), **rope.read(values)),
                       model["width"])
  return ModelConfig(mixer=attention, dtype=sections.dtype(values), **model)


def to_hf(kind: str, config: ModelConfig) -> dict:
  """The `config.json` of a model, for float32 tensors. Raises ValueError that names every field in the way."""
  described, refused = KINDS[kind], []
  mixer = resolved(config.mixer, config.width)
  values = {"model_type": kind, "architectures": [described.architecture], "dtype": "float32", "hidden_act": "silu"}
  values |= described.model.write(config, refused) | described.attention.write(mixer, refused)
  if kind == "mistral":
    values["sliding_window"] = mixer.window or None
  if not mixer.rope_base:
    refused.append("rope_base=0.0 (must be positive)")
  if mixer.rope_fraction != 1:
    refused.append(f"rope_fraction={mixer.rope_fraction!r} (only 1.0)")
  if refused:
    raise ValueError(f"no {kind} model of transformers has {'; '.join(refused)}")
  return values | rope.write(mixer.rope_base)


def layout(config: ModelConfig, values: dict) -> Layout:
  """The tensors of a model, which are named alike in all three model types."""
  return stack(config, lambda layer, mixer: NORMS | MLP | ATTENTION)


def stack(config: ModelConfig, block, **options) -> Layout:
  """The layout of a model of transformers, given the tensors of a block by (number of the layer, mixer's config)."""
  layers: list[Names] = [prefixed(block(layer, mixer), f"model.layers.{layer}.")
                         for layer, mixer in enumerate(layer_mixers(config))]
  # A tied head may be stored as well, but the embedding is the one that counts.
  optional = (MODEL["head"],) if config.tie_embeddings else ()
  return Layout(MODEL, layers, optional=optional, sizes=SIZES | options.pop("sizes", {}), **options)


def resolved(mixer: AttentionConfig, width: int) -> AttentionConfig:
  """The same attention with its number of key-value heads and its head size given."""
  if not mixer.head_dim and width % mixer.heads:
    raise ValueError(f"num_attention_heads={mixer.heads}: must divide hidden_size={width}, unless head_dim is given")
  return dataclasses.replace(mixer, kv_heads=mixer.kv_heads or mixer.heads,
                             head_dim=mixer.head_dim or width // mixer.heads)


def _window(kind, values):
  """The options with the default window of Mistral, which is 4,096 where no option says that there is none."""
  return {"sliding_window": 4096} | values if kind == "mistral" else values
