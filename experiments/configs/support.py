"""What each family of models can do here: a table for the page of models, from the configs and from records of runs."""

import json
import pathlib
from collections.abc import Iterable, Sequence

from lin_jax import hf, mixers
from lin_jax.config import ModelConfig

COLUMNS = ["family", "configs", "trained on a GPU", "decoded on a GPU", "Hugging Face's format", "op"]
TRAINED = "training", "scaling", "raw/finetune_h200"
DECODED = "decoding", "serving"
"""Files of records, without their ending."""
ABOUT = """\
Every family trains, generates, and is evaluated, on one device or many. `configs` is their number. The next two columns
name the largest config of the family that ran on a GPU, or on two: by the records of `training.jsonl`, `scaling.jsonl`,
`finetune_h200.jsonl` and `smoke_models.json`, and of `decoding.jsonl` and `serving.jsonl`. The tests run all families
on a CPU, at tiny sizes. `python experiments/convert.py` reads and writes models in Hugging Face's format. The fifth
column has the `model_type` as which the family's largest config is written, and nothing where that format has no such
model. Llama, Mistral and Qwen3 models are read and written too. On a GPU each op runs the kernels of `pallas_triton`,
except where it is said, and delta_rule on Hopper those of `mosaic_gpu`."""

_OPS = {"gla": "gla", "hgrn2": "gla", "simple_gla": "linear_attention", "linear_attention": "linear_attention",
        "retention": "linear_attention", "lightning_attention": "linear_attention", "mamba2": "linear_attention",
        "supra": "linear_attention", "delta_net": "delta_rule", "gated_delta_net": "delta_rule",
        "delta_product": "delta_rule", "kda": "delta_rule",
        "mamba": "selective_scan", "attention": "softmax attention (cuDNN)"}


def rows(families: dict[str, list[tuple[str, int, ModelConfig]]], trained: set[str], decoded: set[str],
         ) -> Iterable[list[str]]:
  """Yields a row per family, whose configs are given as (name, parameters, model), and the configs that ran."""
  for family, configs in families.items():
    model = configs[-1][2]
    yield [family, str(len(configs)), largest(configs, trained), largest(configs, decoded), _format(model), _ops(model)]


def recorded(*paths: pathlib.Path) -> set[str]:
  """The configs that have a record of a GPU without a failure in files of JSON lines."""
  texts = [path.read_text(encoding="utf-8") for path in paths if path.exists()]
  found = [json.loads(line) for text in texts for line in text.splitlines()]
  return {r["setting"]["name"] for r in found
          if r["device"].startswith("NVIDIA") and not r.get("reason") and not r["setting"].get("tiny")
          and r["setting"].get("library", "lin_jax") == "lin_jax"}


def largest(configs: Sequence[tuple[str, int, ModelConfig]], names: set[str]) -> str:
  """The name of the largest of the `configs` that is among `names`, or ""."""
  found = [(parameters, name) for name, parameters, _ in configs if name in names]
  return f"`{max(found)[1]}`" if found else ""


def _format(model):
  try:
    return f"`{hf.families.writing(model)[0]}`"
  except ValueError:
    return ""


def _ops(model):
  kinds = [model.mixer] if model.hybrid_mixer is None else [model.mixer, model.hybrid_mixer]
  return ", ".join(dict.fromkeys(_OPS[mixers.name_of(kind)] for kind in kinds))
