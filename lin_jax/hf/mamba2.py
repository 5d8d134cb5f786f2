"""Mamba-2 as transformers 5 and as its authors' mamba_ssm store it. Both have the tensors of flash-linear-attention.

The authors' files call the embedding by another name, and their `vocab_size` is before the padding of its rows. They
are published as pickles, which a refusal says how to convert.
"""

import dataclasses
import math

from lin_jax.config import ModelConfig
from lin_jax.hf import fla, sections
from lin_jax.hf.layout import Layout
from lin_jax.hf.sections import Section
from lin_jax.mixers.mamba2 import Mamba2Config
from lin_jax.typed_json import require_type, shown

_WHOLE = {"norm": "rms", "mlp_width": 0}
_MODEL = Section(ModelConfig, {
    "width": ("hidden_size", 4096), "depth": ("num_hidden_layers", 64), "vocab_size": ("vocab_size", 32768),
    "norm_eps": ("layer_norm_epsilon", 1e-5), "tie_embeddings": ("tie_word_embeddings", False)}, _WHOLE,
    ("mixer", "dtype"))
_MIXER = Section(Mamba2Config, {
    "heads": ("num_heads", 128), "groups": ("n_groups", 8), "state_size": ("state_size", 128), "expand": ("expand", 2),
    "conv_width": ("conv_kernel", 4)})
_SERVED = {"hidden_act": ("silu", "swish"), "use_bias": (False,), "use_conv_bias": (True,), "rms_norm": (True,),
           "time_step_limit": ((0.0, math.inf),)}
_OWN = ("head_dim", "time_step_rank", "time_step_min", "time_step_max", "time_step_floor")

_AUTHORS_MODEL = Section(ModelConfig, {
    "width": ("d_model", 2560), "depth": ("n_layer", 64), "vocab_size": ("vocab_size", 50277),
    "tie_embeddings": ("tie_embeddings", True)}, _WHOLE | {"norm_eps": 1e-5}, ("mixer", "dtype"))
_AUTHORS_MIXER = Section(Mamba2Config, {
    "groups": ("ngroups", 1), "state_size": ("d_state", 128), "expand": ("expand", 2), "conv_width": ("d_conv", 4)},
    {}, ("heads",))
_AUTHORS_SERVED = {"d_intermediate": (0,), "attn_layer_idx": ((),), "rms_norm": (True,)}
_AUTHORS_MIXER_SERVED = {"layer": ("Mamba2",), "D_has_hdim": (False,), "rmsnorm": (True,), "norm_before_gate": (False,),
                         "bias": (False,), "conv_bias": (True,), "dt_limit": ((0.0, math.inf),), "d_ssm": (None,),
                         "activation": ("swish", "silu")}
_AUTHORS_OWN = ("ssm_cfg", "attn_cfg", "pad_vocab_size_multiple", "fused_add_norm", "residual_in_fp32")
_START = ("headdim", "chunk_size", "A_init_range", "dt_min", "dt_max", "dt_init_floor", "conv_init", "use_mem_eff_path")


def from_hf(values: dict) -> ModelConfig:
  """The model of a `config.json` of transformers. Raises ValueError as `families` says."""
  sections.require("mamba2", values, (_MODEL, _MIXER), _SERVED, _OWN)
  model, mixer = _MODEL.read(values), _MIXER.read(values)
  inner, head_dim = round(mixer["expand"] * model["width"]), values.get("head_dim", 64)
  require_type(head_dim, int, "head_dim")
  if mixer["heads"] * head_dim != inner:
    raise ValueError(f"num_heads={mixer['heads']} of head_dim={head_dim}: must be expand * hidden_size = {inner}")
  return ModelConfig(mixer=Mamba2Config(**mixer), dtype=sections.dtype(values), **model)


def to_hf(config: ModelConfig) -> dict:
  """The `config.json` of transformers for a model. Raises ValueError that names every field in the way."""
  refused = []
  values = {"model_type": "mamba2", "architectures": ["Mamba2ForCausalLM"], "dtype": "float32"}
  values |= _MODEL.write(config, refused) | _MIXER.write(config.mixer, refused)
  _finish(config, values, values, "head_dim", refused)
  return values


def from_authors(values: dict) -> ModelConfig:
  """The model of a `config.json` of mamba_ssm. Raises ValueError as `families` says."""
  sections.require("mamba_ssm", values, (_AUTHORS_MODEL,), _AUTHORS_SERVED, _AUTHORS_OWN)
  options = values["ssm_cfg"]
  sections.require("mamba_ssm", options, (_AUTHORS_MIXER,), _AUTHORS_MIXER_SERVED, _START)
  model, mixer = _AUTHORS_MODEL.read(values), _AUTHORS_MIXER.read(options)
  multiple, head_dim = values.get("pad_vocab_size_multiple", 8), options.get("headdim", 64)
  for option, value in (("pad_vocab_size_multiple", multiple), ("ssm_cfg.headdim", head_dim)):
    require_type(value, int, option)
    if value < 1:
      raise ValueError(f"{option}={value}: must be positive")
  inner = round(mixer["expand"] * model["width"])
  if inner % head_dim:
    raise ValueError(f"ssm_cfg.headdim={head_dim}: must divide expand * d_model = {inner}")
  model["vocab_size"] += -model["vocab_size"] % multiple
  return ModelConfig(mixer=Mamba2Config(**mixer, heads=inner // head_dim), dtype=sections.dtype(values), **model)


def to_authors(config: ModelConfig) -> dict:
  """The `config.json` of mamba_ssm for a model. Raises ValueError that names every field in the way."""
  refused = []
  options = {"layer": "Mamba2"} | _AUTHORS_MIXER.write(config.mixer, refused)
  values = _AUTHORS_MODEL.write(config, refused) | {
      "d_intermediate": 0, "rms_norm": True, "attn_layer_idx": [], "pad_vocab_size_multiple": 1, "ssm_cfg": options}
  _finish(config, values, options, "headdim", refused)
  return values


def authors_layout(config: ModelConfig, values: dict) -> Layout:
  """The tensors of mamba_ssm for a model."""
  layout = fla.layout(config, values)
  return dataclasses.replace(layout, model={**layout.model, "embedding": "backbone.embedding.weight"})


def is_authors(values: dict) -> bool:
  """Whether a `config.json` is of Mamba-2 in mamba_ssm, which gives no model type. Raises ValueError for Mamba."""
  if "model_type" in values or "ssm_cfg" not in values:
    return False
  options = values["ssm_cfg"]
  if not isinstance(options, dict) or options.get("layer") != "Mamba2":
    raise ValueError(f"ssm_cfg={shown(options)}: must be an object with the layer 'Mamba2'")
  return True


def _finish(config, values, options, head_dim, refused):
  """Adds the head size and a whole `expand` to the mixer's options, and raises for what is refused."""
  options[head_dim] = round(config.width * config.mixer.expand) // config.mixer.heads
  if config.mixer.expand % 1:
    refused.append(f"expand={config.mixer.expand} (only whole numbers)")
  if refused:
    raise ValueError(f"no such Mamba-2 model has {'; '.join(refused)}")
  options["expand"] = int(config.mixer.expand)
