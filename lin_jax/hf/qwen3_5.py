"""Qwen3.5, dense: three layers of Gated DeltaNet to one of gated attention. Only the text model is read and written.

Released files hold the text model's options in `text_config` and its tensors under `model.language_model.`, beside
a vision model's and those for several predicted tokens, which are skipped. Norms multiply by 1 + weight, except for the
head norm of Gated DeltaNet. Positions of text are plain rotary ones, whatever `mrope_section` says.
"""

import dataclasses

from lin_jax import mixers
from lin_jax.config import ModelConfig
from lin_jax.hf import llama, rope, sections
from lin_jax.hf.layout import Interleaved, Layout
from lin_jax.hf.sections import Section
from lin_jax.mixers.attention import AttentionConfig
from lin_jax.mixers.gated_delta_net import GatedDeltaNetConfig
from lin_jax.typed_json import require_type, shown

TEXT, WHOLE = "qwen3_5_text", "qwen3_5"
_MODEL = Section(ModelConfig, llama.WHOLE_MODEL | {
    "vocab_size": ("vocab_size", 248320), "mlp_width": ("intermediate_size", 12288)}, {"norm": "rms_offset"},
    ("mixer", "hybrid_mixer", "hybrid_layers", "dtype"))
_DELTA = Section(GatedDeltaNetConfig, {
    "heads": ("linear_num_key_heads", 16), "value_heads": ("linear_num_value_heads", 32),
    "head_dim": ("linear_key_head_dim", 128), "conv_width": ("linear_conv_kernel_dim", 4)}, {}, ("expand_v",))
_ATTENTION = Section(AttentionConfig, {
    "heads": ("num_attention_heads", 16), "kv_heads": ("num_key_value_heads", 4), "head_dim": ("head_dim", 256)},
    {"qk_norm": "head", "qk_norm_offset": True, "output_gate": True}, llama.ROPE)
_SERVED = llama.ACTIVATION | {"attention_bias": (False,), "attn_output_gate": (True,)}
_OWN = (*rope.OPTIONS, "layer_types", "full_attention_interval", "linear_value_head_dim", "text_config",
        "vision_config", "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
_SIZES = {"in_proj_qkv": "linear_num_key_heads, linear_key_head_dim, linear_num_value_heads, linear_value_head_dim and "
                         "hidden_size",
          "conv1d": "linear_conv_kernel_dim and the heads of linear_num_key_heads and linear_num_value_heads",
          "in_proj_z": "linear_num_value_heads, linear_value_head_dim and hidden_size",
          "out_proj": "linear_num_value_heads, linear_value_head_dim and hidden_size",
          **dict.fromkeys(("in_proj_a", "in_proj_b", "A_log", "dt_bias"), "linear_num_value_heads and hidden_size"),
          "q_proj": "num_attention_heads, head_dim and hidden_size, twice for the gate"}

DECAY = {"mixer.A_log": "linear_attn.A_log", "mixer.dt_bias": "linear_attn.dt_bias"}
_DELTA_TENSORS = DECAY | {
    ("mixer.query.kernel", "mixer.key.kernel", "mixer.value.kernel"): "linear_attn.in_proj_qkv.weight",
    tuple(f"mixer.convolutions.{i}.kernel" for i in range(3)): "linear_attn.conv1d.weight",
    "mixer.gate.kernel": "linear_attn.in_proj_z.weight", "mixer.beta.kernel": "linear_attn.in_proj_b.weight",
    "mixer.decay.kernel": "linear_attn.in_proj_a.weight", "mixer.norm.scale": "linear_attn.norm.weight",
    "mixer.output.kernel": "linear_attn.out_proj.weight"}


def from_hf(values: dict) -> ModelConfig:
  """The text model of a `config.json`. Raises ValueError as `families` says."""
  if values.get("model_type") == WHOLE:
    sections.require(WHOLE, values, (), {}, (*_OWN, "tie_word_embeddings"))
    text = values.get("text_config")
    if not isinstance(text, dict):
      raise ValueError(f"text_config={shown(text)}: must be an object")
    outer = {option: values[option] for option in ("tie_word_embeddings", "dtype", "torch_dtype") if option in values}
    values = text | outer
  sections.require(TEXT, values, (_MODEL, _DELTA, _ATTENTION), _SERVED, _OWN)
  model = _MODEL.read(values)
  layers = sections.attention_layers(values, model["depth"])
  attention = AttentionConfig(**_ATTENTION.read(values), **rope.read(values, fraction=0.25))
  return ModelConfig(mixer=gated_delta_net(_DELTA.read(values), values.get("linear_value_head_dim", 128)),
                     hybrid_mixer=attention if layers else None, hybrid_layers=layers, dtype=sections.dtype(values),
                     **model)


def to_hf(config: ModelConfig) -> dict:
  """The `config.json` of a text model, for float32 tensors. Raises ValueError that names every field in the way."""
  refused = []
  values = {"model_type": TEXT, "architectures": ["Qwen3_5ForCausalLM"], "dtype": "float32", "hidden_act": "silu",
            "layer_types": sections.layer_types(config)}
  values |= _MODEL.write(config, refused) | write_gated_delta_net(_DELTA, config.mixer, refused)
  values |= write_attention(_ATTENTION, config, refused)
  if refused:
    raise ValueError(f"no {TEXT} model of transformers has {'; '.join(refused)}")
  positions = config.hybrid_mixer or AttentionConfig()
  return values | rope.write(positions.rope_base, positions.rope_fraction)


def reading_only(config: ModelConfig) -> dict:
  """Refuses to write the family of models with images, whose other parts are not read."""
  raise ValueError(f"a {WHOLE} checkpoint has a vision model too: the text model is written as {TEXT}")


def layout(config: ModelConfig, values: dict) -> Layout:
  """The tensors of a text model, alone or within a model with images."""

  def block(layer, mixer):
    if isinstance(mixer, GatedDeltaNetConfig):
      return llama.NORMS | llama.MLP | _DELTA_TENSORS
    queries = Interleaved(("mixer.query.kernel", "mixer.gate.kernel"), mixer.heads)
    return llama.NORMS | llama.MLP | llama.KEYS_AND_VALUES | llama.QK_NORMS | {queries: "self_attn.q_proj.weight"}

  return llama.stack(config, block, spellings=(("model.", "model.language_model."),),
                     skipped=(r"^model\.visual\.", r"^mtp\."), sizes=_SIZES)


def gated_delta_net(fields: dict, value_dim: int) -> GatedDeltaNetConfig:
  """The mixer with value heads of `value_dim` channels. Raises ValueError unless that is a positive whole number."""
  require_type(value_dim, int, "linear_value_head_dim")
  if value_dim < 1:
    raise ValueError(f"linear_value_head_dim={value_dim}: must be positive")
  return GatedDeltaNetConfig(**fields, expand_v=value_dim / fields["head_dim"])


def write_gated_delta_net(section: Section, mixer: GatedDeltaNetConfig, refused: list[str]) -> dict:
  """The options of Gated DeltaNet, with its number of value heads given."""
  mixer = dataclasses.replace(mixer, value_heads=mixer.value_heads or mixer.heads)
  return section.write(mixer, refused) | {"linear_value_head_dim": round(mixer.head_dim * mixer.expand_v)}


def write_attention(section: Section, config: ModelConfig, refused: list[str]) -> dict:
  """The options of a hybrid's attention layers, if it has any."""
  if config.hybrid_mixer is None:
    return {}
  if not isinstance(config.hybrid_mixer, AttentionConfig):
    refused.append(f"hybrid_mixer of {mixers.name_of(config.hybrid_mixer)!r} (only 'attention')")
    return {}
  return section.write(llama.resolved(config.hybrid_mixer, config.width), refused)
