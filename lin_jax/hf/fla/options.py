"""Types and ranges of the options in flash-linear-attention's configs, and the options that no model here has."""

from typing import Any

from lin_jax.hf.fla.names import COMMON, Family
from lin_jax.typed_json import require_type, shown

_TYPES = {option: kind for kind, options in {
    int: "hidden_size num_hidden_layers vocab_size num_heads num_kv_heads num_v_heads intermediate_size conv_size "
         "conv_kernel expand_ratio head_dim n_groups state_size window_size",
    float: "norm_eps hidden_ratio expand_k expand_v expand rope_theta",
    bool: "tie_word_embeddings use_short_conv use_gate allow_neg_eigval use_lower_bound fuse_norm",
    str: "qk_norm qk_activation"}.items() for option in options.split()}
# For these options null is a value: another option, or the absence of something, takes its place.
_OPTIONAL = frozenset("num_kv_heads num_v_heads intermediate_size hidden_ratio expand_ratio window_size".split())
_MOST = {"num_hidden_layers": 10_000, "rope_theta": 10**12, int: 2**24, float: 1000}

# Options of other libraries, and of other versions of this one, that change what a model computes.
FOREIGN = frozenset("""
  quantization_config compression_config norm_first rope_scaling rope_parameters partial_rotary_factor
  final_logit_softcapping attn_logit_softcapping is_encoder_decoder add_cross_attention
""".split())


def known(kind: str, family: Family) -> set[str]:
  """The options of the model type `kind` that `require` checks."""
  names = {option for option, _ in (*COMMON.values(), *family.fields.values())} | {"fuse_norm"}
  if family.mlp:
    names |= {"hidden_ratio", "intermediate_size"}
  if family.short_convolution is not None:
    names |= {"use_short_conv", "conv_size"}
  return names | {"hgrn2": {"expand_ratio"}, "mamba2": {"head_dim"}}.get(kind, set())


def require(values: dict, names: set[str], where: str = "", optional: frozenset[str] = frozenset()) -> None:
  """Raises ValueError unless each of `values` that `names` lists has its option's type, and numbers are positive.

  The names in `optional` may be null as well. The message begins with `where` and the option.
  """
  for option in sorted(names & set(values)):
    value, kind, name = values[option], _TYPES[option], where + option
    require_type(value, kind, name, optional=option in _OPTIONAL | optional)
    most = _MOST.get(option, _MOST.get(kind))
    if value is not None and most and not 0 < value <= most:
      raise ValueError(f"{name}={shown(value)}: must be positive and at most {most:,}")


def require_attention(attn: Any, depth: int) -> list[dict]:
  """The groups of attention layers, one or several, that the option `attn` describes.

  Raises ValueError if `attn` is no such description, or names layers that a model of `depth` layers does not have.
  """
  parts = attn if isinstance(attn, list) else [] if attn is None else [attn]
  for part in parts:
    if not isinstance(part, dict):
      raise ValueError(f"attn={shown(attn)}: must be null, an object or a list of objects")
    for option in ("layers", "num_heads"):
      if option not in part:
        raise ValueError(f"attn={shown(part)}: must give {option}")
    require_type(part["layers"], tuple[int, ...], "attn.layers")
    require(part, {"num_heads", "num_kv_heads", "window_size", "rope_theta"}, "attn.")
  layers = [layer for part in parts for layer in part["layers"]]
  if len(set(layers)) < len(layers) or not all(0 <= layer < depth for layer in layers):
    raise ValueError(f"attn.layers={shown(layers)}: must be different numbers from 0 to num_hidden_layers - 1 = "
                     f"{depth - 1}")
  return parts
