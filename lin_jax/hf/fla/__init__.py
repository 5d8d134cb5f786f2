"""The families of flash-linear-attention 0.6: their configs, and their tensors."""

from lin_jax.config import ModelConfig
from lin_jax.hf.fla import bounds
from lin_jax.hf.fla.names import FAMILIES, MLP, MODEL
from lin_jax.hf.layout import Layout
from lin_jax.mixers import name_of
from lin_jax.model import layer_mixers

_SIZES = {"embeddings": "vocab_size and hidden_size", "lm_head": "vocab_size and hidden_size", "norm": "hidden_size",
          "gate_proj": "intermediate_size and hidden_size", "up_proj": "intermediate_size and hidden_size",
          "down_proj": "intermediate_size and hidden_size"}


def layout(config: ModelConfig, values: dict) -> Layout:
  """The tensors of a model, whose `config.json` holds `values`."""
  family = _family(config.mixer)
  names = {"base": family.base, "final_norm": family.final_norm}
  return Layout(
      model={here: there.format(**names) for here, there in MODEL.items()},
      layers=[_block(family, mixer, f"{family.base}.layers.{layer}.", values.get("fuse_norm", True))
              for layer, mixer in enumerate(layer_mixers(config))],
      # A tied head may be stored as well, but the embedding is the one that counts.
      optional=(MODEL["head"],) if config.tie_embeddings else (),
      bounds=f"{family.base}.{bounds.TENSOR}", sizes=_SIZES)


def _block(family, mixer, prefix, fused_norm):
  """The parameters of one block, each with its tensor."""
  own = _family(mixer)
  renamed = {} if fused_norm else own.unfused
  tensors = {"mixer_norm.scale": f"{prefix}{family.mixer_norm}.weight"}
  tensors |= {here: prefix + there for here, there in MLP.items()}
  for here, there in own.tensors.items():
    parts = f"mixer.{here}" if isinstance(here, str) else tuple(f"mixer.{part}" for part in here)
    tensors[parts] = f"{prefix}{family.mixer_name}.{renamed.get(there, there)}"
  return tensors


def _family(mixer):
  return next(family for family in FAMILIES.values() if family.mixer == name_of(mixer))
