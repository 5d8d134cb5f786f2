"""Options of a `config.json` as fields of our configs and back, by tables, with every other option judged."""

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

from lin_jax.config import DTYPES, ModelConfig
from lin_jax.hf.fla.names import IGNORED as HUBS_OWN
from lin_jax.hf.fla.options import FOREIGN as FOREIGN_TO_FLA
from lin_jax.typed_json import require_type, shown

# Options of other models that change what a model computes. Transformers' classes ignore those of another class, so
# other options that a class does not know are logged and not refused.
FOREIGN = FOREIGN_TO_FLA | frozenset("""
  attention_multiplier residual_multiplier embedding_multiplier logits_scaling logit_scale query_pre_attn_scalar
  no_rope_layers num_experts num_local_experts clip_qkv use_qk_norm alibi parallel_residual sliding_window_pattern
  attention_chunk_size attn_logit_cap
""".split())
# Options for training, for generation, and of how a model is computed, which leave its outputs as they are.
IGNORED = HUBS_OWN | frozenset("""
  attention_dropout attn_implementation hidden_dropout pretraining_tp pruned_heads return_dict output_attentions
  output_hidden_states chunk_size_feed_forward problem_type id2label label2id mamba_ssm_dtype max_window_layers
  vocab_size_per_layer_input sep_token_id cls_token_id tokenizer_class
""".split())
_MOST = {"depth": 10_000, "rope_base": 1e12, int: 2**24, float: 1000}
_OURS = frozenset(("implementation", "chunk_size"))  # fields that leave a layer's outputs as they are


@dataclasses.dataclass(frozen=True)
class Section:
  """One of our config dataclasses, and the options that hold its fields.

  Attributes:
    fields: field -> (option, default of the option). A default of None allows null, which is 0 here.
    constants: field -> the one value that every model of the family has.
    derived: fields that the family reads and writes itself.
  """

  config: type
  fields: Mapping[str, tuple[str, Any]]
  constants: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  derived: tuple[str, ...] = ()

  def read(self, values: dict) -> dict:
    """The fields from the options. Raises ValueError unless each has its field's type, and numbers are positive."""
    types = {field.name: field.type for field in dataclasses.fields(self.config)}
    made = dict(self.constants)
    for field, (option, default) in self.fields.items():
      value, kind = values.get(option, default), types[field]
      require_type(value, kind, option, optional=default is None)
      most = _MOST.get(field, _MOST.get(kind))
      if value is not None and most and not 0 < value <= most:
        raise ValueError(f"{option}={shown(value)}: must be positive and at most {most:,.0f}")
      made[field] = 0 if value is None else value
    return made

  def write(self, config: Any, refused: list[str]) -> dict:
    """The options of a config. Each field whose value no option expresses is appended to `refused`."""
    values = {}
    for field in dataclasses.fields(self.config):
      value = getattr(config, field.name)
      only = self.constants.get(field.name, field.default)
      if field.name in self.fields:
        values[self.fields[field.name][0]] = value
      elif field.name not in _OURS and field.name not in self.derived and value != only:
        refused.append(f"{field.name}={value!r} (only {only!r})")
    return values


def require(kind: str, values: dict, sections: tuple[Section, ...], served: Mapping[str, tuple],
            own: tuple[str, ...] = ()) -> None:
  """Judges the options that no section reads.

  Args:
    served: option -> the values that mean what the model here computes.
    own: options that the family reads itself.
  Raises:
    ValueError: an option has another value than the ones served, or is another model's and changes the mathematics.
  """
  known = {option for section in sections for option, _ in section.fields.values()} | {*own, "dtype", "torch_dtype"}
  refused, ignored = [], []
  for option, value in values.items():
    if option in served:
      if (tuple(value) if isinstance(value, list) else value) not in served[option]:
        refused.append(f"{option}={shown(value)} (served: {', '.join(map(repr, served[option]))})")
    elif option in known or not value or option in IGNORED or option.startswith(("_", "mtp_")):
      continue
    elif option in FOREIGN:
      refused.append(f"{option}={shown(value)} (not known)")
    else:
      ignored.append(option)
  if dtype(values) not in DTYPES:
    refused.append(f"dtype={shown(dtype(values))} (served: {', '.join(DTYPES)})")
  if refused:
    raise ValueError(f"{kind} model with options that have no equivalent here: {'; '.join(refused)}")
  if ignored:
    logging.getLogger(__name__).warning("ignored, because %s models have no such options: %s", kind,
                                        shown(", ".join(sorted(ignored))))


def dtype(values: dict) -> Any:
  """The dtype of a checkpoint's activations as its `config.json` gives it."""
  return values.get("dtype") or values.get("torch_dtype") or "float32"


def attention_layers(values: dict, depth: int) -> tuple[int, ...]:
  """The numbers of the layers with attention, from `layer_types`, or else by `full_attention_interval`.

  Raises ValueError if `layer_types` is not one of two types for each layer, or if the interval is not positive.
  """
  kinds, every = values.get("layer_types"), values.get("full_attention_interval", 4)
  require_type(every, int, "full_attention_interval")
  if every < 1:
    raise ValueError(f"full_attention_interval={every}: must be positive")
  if kinds is None:
    return tuple(layer for layer in range(depth) if (layer + 1) % every == 0)
  served = ("linear_attention", "full_attention")
  if not isinstance(kinds, list) or len(kinds) != depth or not all(kind in served for kind in kinds):
    raise ValueError(f"layer_types={shown(kinds)}: must be {' or '.join(served)} for each of num_hidden_layers={depth}")
  return tuple(layer for layer, kind in enumerate(kinds) if kind == served[1])


def layer_types(config: ModelConfig) -> list[str]:
  """The option `layer_types` of a hybrid with attention."""
  return ["full_attention" if layer in config.hybrid_layers else "linear_attention" for layer in range(config.depth)]
