"""Configs of flash-linear-attention's models, the `config.json` of a checkpoint, as a `ModelConfig` and back."""

import dataclasses
import math
from typing import Any

from lin_jax import mixers
from lin_jax.config import DTYPES, ModelConfig
from lin_jax.hf.names import ATTENTION_OPTIONS, COMMON, COMMON_OPTIONS, FAMILIES, IGNORED, Family
from lin_jax.mixers.attention import AttentionConfig

_ATTENTION_FIELDS = FAMILIES["transformer"].fields
# Options that say together what one or two fields here say.
_LAYOUT = {"hidden_ratio", "intermediate_size", "use_short_conv", "conv_size", "expand_ratio", "head_dim", "num_heads"}


def from_hf(values: dict) -> ModelConfig:
  """The model that a `config.json` describes.

  Raises:
    ValueError: another model type, or options that no mixer here has; the message names each with its value.
  """
  kind = values.get("model_type")
  if kind not in FAMILIES:
    raise ValueError(f"model_type={kind!r}: must be one of {', '.join(FAMILIES)}")
  family, refused = FAMILIES[kind], []
  values = _derived(kind, values, refused)
  known = {option for option, _ in (*COMMON.values(), *family.fields.values())} | {"attn", *_LAYOUT}
  options = COMMON_OPTIONS | family.options
  for option, value in values.items():
    served = options.get(option)
    if served is not None:
      accepted = [values.get(v) if v == "num_heads" else v for v in served]
      if (tuple(value) if isinstance(value, list) else value) not in accepted:
        refused.append(f"{option}={value!r} (served: {', '.join(map(repr, served))})")
    elif option not in known | IGNORED and value:
      refused.append(f"{option}={value!r} (not known)")
  mixer = _mixer_from_hf(family, values, refused)
  hybrid, layers = _hybrid_from_hf(values.get("attn"), refused)
  if kind == "hgrn2" and mixer.learned_bound and 0 in layers:
    refused.append("attn.layers with 0 (the layer whose forget gate has no lower bound)")
  common = {field: values.get(option, family.defaults.get(field, default))
            for field, (option, default) in COMMON.items()}
  dtype = values.get("dtype") or values.get("torch_dtype") or "float32"
  if dtype not in DTYPES:
    refused.append(f"dtype={dtype!r} (served: {', '.join(DTYPES)})")
  if refused:
    raise ValueError(f"{kind} model with options that have no equivalent here: {'; '.join(refused)}")
  return ModelConfig(mixer=mixer, hybrid_mixer=hybrid, hybrid_layers=layers, dtype=dtype,
                     mlp_width=_mlp_width(family, values) if family.mlp else 0, **common)


def to_hf(config: ModelConfig) -> dict:
  """The `config.json` of a model; tensors are written in float32, so that is its dtype.

  Raises:
    ValueError: the model has no equivalent there; the message names every field in the way.
  """
  name, refused = mixers.name_of(config.mixer), []
  kind = next((kind for kind, family in FAMILIES.items() if family.mixer == name), None)
  if kind is None:
    raise ValueError(f"mixer {name!r}: must be one of {', '.join(f.mixer for f in FAMILIES.values())}")
  family = FAMILIES[kind]
  values = {option: getattr(config, field) for field, (option, _) in COMMON.items()}
  mixer = config.mixer
  if kind == "hgrn2":
    mixer = dataclasses.replace(mixer, norm_eps=mixer.norm_eps or config.norm_eps)
    values["expand_ratio"] = config.width // mixer.heads
    if mixer.learned_bound and 0 in config.hybrid_layers:
      refused.append(f"hybrid_layers={config.hybrid_layers} (the first layer is {name})")
  values |= {"model_type": kind, "dtype": "float32", **_mixer_to_hf(family, mixer, refused)}
  if family.mlp:
    values["intermediate_size"] = config.mlp_width
  own = {"mixer", "hybrid_mixer", "hybrid_layers", "mlp_width", "dtype", *COMMON}
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
      fields = {option: getattr(config.hybrid_mixer, field) or None for field, (option, _) in _ATTENTION_FIELDS.items()}
      values["attn"] = {"layers": list(config.hybrid_layers), "qkv_bias": False, **fields}
  if refused:
    raise ValueError(f"no {kind} model of flash-linear-attention has {'; '.join(refused)}")
  return values


def _derived(kind, values, refused):
  """`values` with the number of heads where the layout derives it from other options."""
  width = values.get("hidden_size", 2048)
  if kind == "mamba2":
    inner, size = round(values.get("expand", 2) * width), values.get("head_dim", 64)
    values = values | {"num_heads": inner // size}
    if inner % size:
      refused.append(f"head_dim={size!r} (must divide {inner})")
  if kind == "hgrn2" and (ratio := values.get("expand_ratio", 128)) is not None:
    values = values | {"num_heads": width // ratio}
    if width % ratio:
      refused.append(f"expand_ratio={ratio!r} (must divide hidden_size={width})")
  return values


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
  """Options of the mixer; appends to `refused` each field whose value no option expresses."""
  values = {}
  for field in dataclasses.fields(mixer):
    value = getattr(mixer, field.name)
    if field.name in family.fields:
      option, default = family.fields[field.name]
      there = {here: there for there, here in family.values.get(field.name, {value: value}).items()}
      if value not in there:
        refused.append(f"{field.name}={value!r}")
      values[option] = None if value == 0 and default is None else there.get(value)
    elif field.name == "conv_width" and family.short_convolution is not None:
      values |= {"use_short_conv": bool(value), "conv_size": value or 4}
    elif field.name in family.constants and value != family.constants[field.name]:
      refused.append(f"{field.name}={value!r} (only {family.constants[field.name]!r})")
  return values


def _hybrid_from_hf(attn: dict | list | None, refused: list) -> tuple[AttentionConfig | None, tuple[int, ...]]:
  """The attention layers of a hybrid: their mixer and which they are."""
  parts = [attn] if isinstance(attn, dict) else attn or []
  layers, configs = [], []
  for part in parts:
    known = {option for option, _ in _ATTENTION_FIELDS.values()}
    for option, value in part.items():
      if option not in known | {"layers"} and value:
        refused.append(f"attn.{option}={value!r} (served: {ATTENTION_OPTIONS.get(option, (None,))[0]!r})")
    fields = {field: part.get(option, default) or 0 for field, (option, default) in _ATTENTION_FIELDS.items()}
    configs.append(AttentionConfig(**fields))
    layers += part.get("layers", [])
  if any(config != configs[0] for config in configs):
    refused.append(f"attn={attn!r} (served: one kind of attention)")
  return (configs[0], tuple(sorted(layers))) if layers else (None, ())


def _mlp_width(family: Family, values: dict) -> int:
  """`intermediate_size`, or two thirds of `hidden_ratio` times the width, rounded up to a multiple of 256."""
  if values.get("intermediate_size") is not None:
    return values["intermediate_size"]
  ratio = values.get("hidden_ratio", family.defaults.get("hidden_ratio", 4)) or 4
  return 256 * math.ceil(int(values.get("hidden_size", 2048) * ratio * 2 / 3) / 256)
