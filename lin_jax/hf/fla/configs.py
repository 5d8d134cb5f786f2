"""Configs of flash-linear-attention's models, the `config.json` of a checkpoint, as a `ModelConfig` and back."""

import dataclasses
import logging
import math
from typing import Any

from lin_jax import mixers
from lin_jax.config import DTYPES, ModelConfig
from lin_jax.hf.fla import options
from lin_jax.hf.fla.names import ATTENTION_OPTIONS, COMMON, COMMON_OPTIONS, FAMILIES, IGNORED, Family
from lin_jax.mixers.attention import AttentionConfig
from lin_jax.typed_json import shown

_ATTENTION_FIELDS = FAMILIES["transformer"].fields

_log = logging.getLogger(__name__)


def from_hf(values: dict) -> ModelConfig:
  """The model that a `config.json` describes, whose model type is one of `FAMILIES`.

  Flash-linear-attention ignores options that it does not know. They are ignored here too, and logged.

  Raises:
    ValueError: a value is not of its option's type or range, or no mixer here has some of the options. The message
      names each with its value.
  """
  kind, refused = values["model_type"], []
  family = FAMILIES[kind]
  known = options.known(kind, family)
  options.require(values, known, optional=frozenset(o for o, default in family.fields.values() if default is None))
  values = _derived(kind, values, refused)
  _refuse_options(family, values, known, refused)
  common = {field: values.get(option, family.defaults.get(field, default))
            for field, (option, default) in COMMON.items()}
  mixer = _mixer_from_hf(family, values, refused)
  attn = None if "attn" in family.options else values.get("attn")
  hybrid, layers = _hybrid_from_hf(options.require_attention(attn, common["depth"]), refused)
  if kind == "hgrn2" and mixer.learned_bound and 0 in layers:
    refused.append("attn.layers with 0 (the layer whose forget gate has no lower bound)")
  dtype = values.get("dtype") or values.get("torch_dtype") or "float32"
  if dtype not in DTYPES:
    refused.append(f"dtype={shown(dtype)} (served: {', '.join(DTYPES)})")
  if refused:
    raise ValueError(f"{kind} model with options that have no equivalent here: {'; '.join(refused)}")
  return ModelConfig(mixer=mixer, hybrid_mixer=hybrid, hybrid_layers=layers, dtype=dtype,
                     mlp_width=_mlp_width(family, values) if family.mlp else 0, **common)


def to_hf(config: ModelConfig) -> dict:
  """The `config.json` of a model of one of `FAMILIES`. Its dtype is float32, because tensors are written in float32.

  Raises:
    ValueError: the model has no equivalent there. The message names every field in the way.
  """
  name, refused = mixers.name_of(config.mixer), []
  kind, family = next((kind, family) for kind, family in FAMILIES.items() if family.mixer == name)
  values = {option: getattr(config, field) for field, (option, _) in COMMON.items()}
  mixer = config.mixer
  if kind == "hgrn2":
    mixer = dataclasses.replace(mixer, norm_eps=mixer.norm_eps or config.norm_eps)
    values["expand_ratio"] = config.width // mixer.heads
    if mixer.learned_bound and 0 in config.hybrid_layers:
      refused.append(f"hybrid_layers={config.hybrid_layers} (the first layer is {name})")
  if kind == "retnet" and mixer.heads >= 4:
    mixer = dataclasses.replace(mixer, decays="consecutive")  # which are the same decays
  values |= {"model_type": kind, "dtype": "float32", **_mixer_to_hf(family, mixer, refused)}
  if family.mlp:
    values["intermediate_size"] = config.mlp_width
  own = {"mixer", "hybrid_mixer", "hybrid_layers", "mlp_width", "start", "dtype", *COMMON}
  refused += [f"{field.name}={getattr(config, field.name)!r}" for field in dataclasses.fields(config)
              if field.name not in own and getattr(config, field.name) != field.default]
  if bool(config.mlp_width) != family.mlp:
    refused.append(f"mlp_width={config.mlp_width} ({'no block is' if family.mlp else 'every block is'} a mixer alone)")
  if kind == "mamba2":
    values["head_dim"] = round(config.width * config.mixer.expand) // config.mixer.heads
  if config.hybrid_mixer is not None:
    if type(config.hybrid_mixer) is not AttentionConfig or "attn" in family.options:
      refused.append(f"hybrid_mixer={config.hybrid_mixer!r} (only attention, and not in {kind} models)")
    else:
      _mixer_to_hf(FAMILIES["transformer"], config.hybrid_mixer, refused)
      fields = {option: getattr(config.hybrid_mixer, field) or None for field, (option, _) in _ATTENTION_FIELDS.items()}
      values["attn"] = {"layers": list(config.hybrid_layers), "qkv_bias": False, **fields}
  if refused:
    raise ValueError(f"no {kind} model of flash-linear-attention has {'; '.join(refused)}")
  return values


def _refuse_options(family, values, known, refused):
  """Appends the options that no mixer here has to `refused`."""
  ignored = []
  for option, value in values.items():
    served = (COMMON_OPTIONS | family.options).get(option)
    if served is not None:
      accepted = [values.get(v) if v == "num_heads" else v for v in served]
      if (tuple(value) if isinstance(value, list) else value) not in accepted:
        refused.append(f"{option}={shown(value)} (served: {', '.join(map(repr, served))})")
    elif option in options.FOREIGN and value:
      refused.append(f"{option}={shown(value)} (not known)")
    elif value and option not in known | IGNORED | options.FOREIGN | {"attn"} and not option.startswith("_"):
      ignored.append(option)
  if ignored:
    _log.warning("ignored, since the library knows no such options: %s", shown(", ".join(sorted(ignored))))


def _derived(kind, values, refused):
  """`values` with the number of heads, where the layout derives that number from other options."""
  width = values.get("hidden_size", 2048)
  if kind == "mamba2":
    inner, option = round(values.get("expand", 2) * width), "head_dim"
    size = values.get("head_dim", 64)
  elif kind == "hgrn2" and (size := values.get("expand_ratio", 128)) is not None:
    inner, option = width, "expand_ratio"
  else:
    return values
  if inner % size:
    refused.append(f"{option}={size!r} (must divide {inner})")
  elif (values.get("num_heads") or inner // size) != inner // size:
    refused.append(f"num_heads={values['num_heads']} ({option}={size} gives {inner // size})")
  return values | {"num_heads": inner // size}


def _mixer_from_hf(family: Family, values: dict, refused: list) -> Any:
  fields = dict(family.constants)
  for field, (option, default) in family.fields.items():
    value = values.get(option, default)
    served = family.values.get(field)
    if served is not None and value not in served:
      refused.append(f"{option}={value!r} (served: {', '.join(map(repr, served))})")
    fields[field] = 0 if value is None else value if served is None else served.get(value, value)
  if family.short_convolution is not None:
    used = values.get("use_short_conv", family.short_convolution)
    fields["conv_width"] = values.get("conv_size", 4) if used else 0
  return mixers.config_class(family.mixer)(**fields)


def _mixer_to_hf(family: Family, mixer: Any, refused: list) -> dict:
  """The options of the mixer. Each field whose value no option expresses is appended to `refused`."""
  values = {}
  for field in dataclasses.fields(mixer):
    value = getattr(mixer, field.name)
    if field.name in family.fields:
      option, default = family.fields[field.name]
      there = {here: there for there, here in family.values.get(field.name, {value: value}).items()}
      # Numbers must be positive there, unless null stands for 0.
      if value not in there or (value == 0 and default is not None and value is not False):
        refused.append(f"{field.name}={value!r}")
      values[option] = None if value == 0 and default is None else there.get(value)
    elif field.name == "conv_width" and family.short_convolution is not None:
      values |= {"use_short_conv": bool(value), "conv_size": value or 4}
    elif field.name in family.constants and value != family.constants[field.name]:
      refused.append(f"{field.name}={value!r} (only {family.constants[field.name]!r})")
  return values


def _hybrid_from_hf(parts: list[dict], refused: list) -> tuple[AttentionConfig | None, tuple[int, ...]]:
  """The mixer of a hybrid's attention layers, and the numbers of these layers."""
  layers, configs = [], []
  for part in parts:
    for option, served in ATTENTION_OPTIONS.items():
      if part.get(option):
        refused.append(f"attn.{option}={shown(part[option])} (served: {served[0]!r})")
    fields = {field: part.get(option, default) or 0 for field, (option, default) in _ATTENTION_FIELDS.items()}
    configs.append(AttentionConfig(**fields))
    layers += part["layers"]
  if any(config != configs[0] for config in configs):
    refused.append(f"attn={shown(parts)} (served: one kind of attention)")
  return (configs[0], tuple(sorted(layers))) if layers else (None, ())


def _mlp_width(family: Family, values: dict) -> int:
  """`intermediate_size`, or two thirds of `hidden_ratio` times the width, rounded up to a multiple of 256."""
  if values.get("intermediate_size") is not None:
    return values["intermediate_size"]
  ratio = values.get("hidden_ratio", family.defaults.get("hidden_ratio", 4)) or 4
  width = 256 * math.ceil(int(values.get("hidden_size", 2048) * ratio * 2 / 3) / 256)
  options.require({"intermediate_size": width}, {"intermediate_size"})
  return width
