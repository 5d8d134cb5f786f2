"""The families of checkpoints by name, and which of them a `config.json` belongs to."""

import dataclasses
import functools
from collections.abc import Callable

from lin_jax import mixers
from lin_jax.config import ModelConfig
from lin_jax.hf import fla, llama, mamba2, olmo_hybrid, qwen3_5
from lin_jax.hf.fla import configs as fla_configs
from lin_jax.hf.layout import Layout
from lin_jax.typed_json import shown


@dataclasses.dataclass(frozen=True)
class Family:
  """One kind of checkpoint.

  Attributes:
    mixer: the registered name of the mixer of its layers, or of most of them in a hybrid.
    from_hf: the model that the values of a `config.json` describe. Raises ValueError that names what is not served.
    to_hf: the values of the `config.json` of a model. Raises ValueError that names every field in the way.
    layout: the tensors of a model, given its config and the values of its `config.json`.
  """

  mixer: str
  from_hf: Callable[[dict], ModelConfig]
  to_hf: Callable[[ModelConfig], dict]
  layout: Callable[[ModelConfig, dict], Layout]


# Where a model could be written as several kinds, the first is taken.
FAMILIES = {kind: Family(family.mixer, fla_configs.from_hf, fla_configs.to_hf, fla.layout)
            for kind, family in fla.FAMILIES.items()} | {
    qwen3_5.TEXT: Family("gated_delta_net", qwen3_5.from_hf, qwen3_5.to_hf, qwen3_5.layout),
    qwen3_5.WHOLE: Family("gated_delta_net", qwen3_5.from_hf, qwen3_5.reading_only, qwen3_5.layout),
    "olmo_hybrid": Family("gated_delta_net", olmo_hybrid.from_hf, olmo_hybrid.to_hf, olmo_hybrid.layout)} | {
    kind: Family("attention", functools.partial(llama.from_hf, kind), functools.partial(llama.to_hf, kind),
                 llama.layout) for kind in llama.KINDS} | {
    "mamba2_transformers": Family("mamba2", mamba2.from_hf, mamba2.to_hf, fla.layout),
    "mamba_ssm": Family("mamba2", mamba2.from_authors, mamba2.to_authors, mamba2.authors_layout)}


def of(values: dict) -> str:
  """The family of a `config.json`. Raises ValueError, with the names of all families, if it is of no known one."""
  if mamba2.is_authors(values):
    return "mamba_ssm"
  kind = values.get("model_type")
  # Two libraries call their models so. Only one of them has this option, and always writes it.
  return "mamba2_transformers" if kind == "mamba2" and "layer_norm_epsilon" in values else _known(kind)


def writing(config: ModelConfig, kind: str = "") -> tuple[str, dict]:
  """The family `kind`, or the first one that has such a model, and the values of its `config.json`.

  Raises ValueError, which names every field in the way, if there is no such model.
  """
  mixer, refusal = mixers.name_of(config.mixer), None
  if kind:
    if FAMILIES[_known(kind)].mixer != mixer:
      raise ValueError(f"mixer {mixer!r}: a {kind} checkpoint has {FAMILIES[kind].mixer!r}")
    return kind, FAMILIES[kind].to_hf(config)
  for kind in (kind for kind, family in FAMILIES.items() if family.mixer == mixer):
    try:
      return kind, FAMILIES[kind].to_hf(config)
    except ValueError as e:
      refusal = refusal or e
  if refusal:
    raise refusal
  served = dict.fromkeys(family.mixer for family in FAMILIES.values())
  raise ValueError(f"mixer {mixer!r}: must be one of {', '.join(served)}")


def _known(kind):
  if not isinstance(kind, str) or kind not in FAMILIES:
    raise ValueError(f"model_type={shown(kind)}: must be one of {', '.join(FAMILIES)}")
  return kind
