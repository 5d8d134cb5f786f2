"""The page of models: sizes beside the papers', state and arithmetic per token, commands, and the training smoke."""

import dataclasses
import itertools
import json
import pathlib

import jax
from flax import nnx

from lin_jax import mixers
from lin_jax.config import TrainConfig
from lin_jax.generate import state_bytes
from lin_jax.model import LanguageModel, abstract_model, layer_mixers

from . import CONFIGS, lookup, support

SMOKE = "smoke_models.json"
RESULTS = pathlib.Path(__file__).parents[1] / "results"


@dataclasses.dataclass(frozen=True)
class Size:
  """A published size: the paper's, in the digits that it prints, and the parameters of flash-linear-attention's
  configuration of that layout, whose head is not tied to the embedding (vocabulary 32,000). A released model has the
  exact count of its language model in `transformers` 5.24."""

  family: str
  paper: str = ""
  source: str = ""
  peer: float = 0.0
  vocabulary: int = 0  # the paper's, if it makes another size
  note: str = ""
  released: int = 0


_GLA, _DELTANET, _GATED, _TNL = (
    f"arXiv:{number}" for number in ("2312.06635", "2406.06484", "2412.06464", "2405.17381"))

SIZES = {
    "gla_tiny": Size("GLA", note="for a CPU"),
    "transformer_tiny": Size("Transformer++", note="for a CPU"),
    "gla_small": Size("GLA", note="for an hour of one GPU"),
    "transformer_small": Size("Transformer++", note="for an hour of one GPU"),
    "gla_340m": Size("GLA", "340M", _GLA, 374e6),
    "gla_1b3": Size("GLA", "1.3B", _GLA, 1.366e9),
    "transformer_340m": Size("Transformer++", "340M", _GLA, 374e6),
    "transformer_1b3": Size("Transformer++", "1.3B", _GLA, 1.364e9),
    "retnet_340m": Size("RetNet", "340M", _GLA, note="an MLP of ratio 2, rounded up to 1536 as "
                        "flash-linear-attention does; 1280 would give 328M"),
    "retnet_1b3": Size("RetNet", "1.3B", _GLA, 1.352e9),
    "deltanet_340m": Size("DeltaNet", "340M", _DELTANET, 374e6),
    "deltanet_1b3": Size("DeltaNet", "1.3B", _DELTANET, 1.366e9),
    "deltanet_swa_340m": Size("DeltaNet + window", "340M", _DELTANET),
    "deltanet_swa_1b3": Size("DeltaNet + window", "1.3B", _DELTANET),
    "deltanet_global_340m": Size("DeltaNet + attention", "340M", _DELTANET),
    "deltanet_global_1b3": Size("DeltaNet + attention", "1.3B", _DELTANET),
    "gated_deltanet_1b3": Size("Gated DeltaNet", "1.3B", _GATED, 1.387e9),
    "delta_product_340m": Size("Gated DeltaProduct", note="no paper has this size"),
    "hgrn2_340m": Size("HGRN2", peer=374e6, note="no paper has this size"),
    "hgrn2_1b3": Size("HGRN2", "1.3B", _GATED),
    "mamba_340m": Size("Mamba", "370M", "arXiv:2312.00752", vocabulary=50280),
    "mamba_1b3": Size("Mamba", "1.3B", _GLA),
    "mamba2_340m": Size("Mamba-2", peer=382e6, note="no paper has this size"),
    "mamba2_1b3": Size("Mamba-2", "1.3B", _GATED, 1.372e9),
    "tnl_385m": Size("TransNormerLLM", "385M", _TNL),
    "tnl_1b": Size("TransNormerLLM", "1B", _TNL),
    "tnl_3b": Size("TransNormerLLM", "3B", _TNL),
    "tnl_7b": Size("TransNormerLLM", "7B", _TNL),
    "kda_340m": Size("KDA", note="no paper has this size"),
    "kda_1b3": Size("KDA", note="no paper has this size"),
    "kimi_linear_1b3": Size("Kimi Linear", note="no paper has this size; without experts"),
    "qwen35_0b8": Size("Qwen3.5", source="Qwen/Qwen3.5-0.8B", released=752_393_024),
    "qwen35_2b": Size("Qwen3.5", source="Qwen/Qwen3.5-2B", released=1_881_825_088),
    "qwen35_4b": Size("Qwen3.5", source="Qwen/Qwen3.5-4B", released=4_205_751_296),
    "qwen35_9b": Size("Qwen3.5", source="Qwen/Qwen3.5-9B", released=8_953_803_264),
    "olmo_hybrid_7b": Size("Olmo Hybrid", source="allenai/Olmo-Hybrid-7B", released=7_430_870_688),
    "supra_tiny": Size("SUPRA", note="for a CPU"),
    "supra_340m": Size("SUPRA", note="no paper has this size"),
}


@dataclasses.dataclass(frozen=True)
class Model:
  """The numbers of one config on the page, all from shapes."""

  config: TrainConfig
  size: Size
  parameters: int
  untied: int  # parameters with a separate head
  state: int  # bytes per sequence at the training length
  growth: int  # bytes per token, while the state grows
  window: int  # tokens after which the state stops growing; 0 for never
  flops: int  # per training token: the forward pass, and twice as many for the backward pass

  @property
  def compared(self) -> int:
    """Parameters with the paper's vocabulary."""
    model = self.config.model
    more = (self.size.vocabulary or model.vocab_size) - model.vocab_size
    return self.parameters + more * model.width * (1 if model.tie_embeddings else 2)

  @property
  def difference(self) -> float | None:
    """The count with the paper's vocabulary over the paper's number, minus 1."""
    return self.compared / printed(self.size.paper) - 1 if self.size.paper else None

  @property
  def peer_difference(self) -> float | None:
    return self.untied / self.size.peer - 1 if self.size.peer else None


def measure(name: str) -> Model:
  """Measures a config. Raises ValueError if `SIZES` does not know it."""
  if name not in SIZES:
    raise ValueError(f"config {name!r} has no entry in SIZES of experiments/configs/page.py: its family, and the "
                     "paper's size if there is one")
  config = lookup(name)
  model, length = abstract_model(config.model), config.data.sequence_length
  parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
  untied = parameters + config.model.tie_embeddings * model.embedding.size
  growth = state_bytes(model, 1, 2) - state_bytes(model, 1, 1)
  windows = [mixer.window for mixer in layer_mixers(config.model) if hasattr(mixer, "window")]
  return Model(config, SIZES[name], parameters, untied, state_bytes(model, 1, length), growth,
               0 if _grows_on(model) else max(windows, default=0), 3 * model.flops_per_token(length))


def printed(size: str) -> float:
  """Returns the number for which "340M" or "1.3B" stands."""
  return float(size[:-1]) * {"M": 1e6, "B": 1e9}[size[-1]]


def rounds_to(count: int, size: str) -> bool:
  """Whether `count` is `size` when printed with as many digits."""
  unit, digits = printed("1" + size[-1]), len(size[:-1].partition(".")[2])
  return f"{count / unit:.{digits}f}{size[-1]}" == size


def verdict(model: Model) -> str:
  """Says how far off the paper's size is, "" if there is none."""
  if model.difference is None:
    return ""
  if abs(model.difference) <= 0.01:
    return "within 1%"
  return "equal as far as printed" if rounds_to(model.compared, model.size.paper) else "off"


def render(smoke: pathlib.Path | None = None) -> str:
  """Returns the page, with the table of `smoke_models.py`'s records if their file exists."""
  models, smoked = [measure(name) for name in CONFIGS], load_smoke(smoke) if smoke and smoke.exists() else []
  papers, released = ([m for m in models if bool(m.size.released) == wanted] for wanted in (False, True))
  parts = [_ABOUT, "## What each family can do", support.ABOUT, table(support.COLUMNS, _support_rows(models, smoked)),
           "## Sizes", _ABOUT_SIZES, table(_SIZE_COLUMNS, map(_size_row, papers)),
           "## Released models", _ABOUT_RELEASED, table(_RELEASED_COLUMNS, map(_released_row, released)),
           "## State and cost", _ABOUT_COST, table(_COST_COLUMNS, map(_cost_row, models))]
  if smoked:
    parts += ["## Training smoke", _ABOUT_SMOKE.format(file=smoke.name), *_smoke(smoked)]
  return "\n\n".join(parts) + "\n"


def _support_rows(models, smoked):
  families = {}
  for model in sorted(models, key=lambda model: model.parameters):
    families.setdefault(model.size.family, []).append((model.config.name, model.parameters, model.config.model))
  trained, decoded = (support.recorded(*(RESULTS / f"{name}.jsonl" for name in names))
                      for names in (support.TRAINED, support.DECODED))
  trained |= {r["family"] for r in smoked if r["device"].startswith("NVIDIA") and not r["reason"]}
  return support.rows(dict(sorted(families.items())), trained, decoded)


def load_smoke(path: pathlib.Path) -> list[dict]:
  """Reads the records of `smoke_models.py`. Raises ValueError when the file holds something else."""
  try:
    records = json.loads(path.read_text(encoding="utf-8"))
    if not all(record["family"] and record["device"] for record in records):
      raise KeyError("family")
  except (ValueError, KeyError, TypeError) as e:
    raise ValueError(f"{path}: not the records of smoke_models.py: {e!r}") from e
  return records


_ABOUT = """# Models

Generated by `python experiments/report_models.py` from shapes alone (`jax.eval_shape`); do not edit."""

_ABOUT_SIZES = """\
Parameters are counted with the head tied to the embedding. `paper` is the rounded size that the paper prints. The
difference is taken with the paper's vocabulary if that makes another size. "equal as far as printed" means that a count
differs by more than 1% but gives the same digits when it is rounded. `untied` is the count with a separate head. It
compares with `FLA`, which is the count of flash-linear-attention's configuration of the same layout, in three or four
digits (vocabulary 32,000)."""
_SIZE_COLUMNS = ["config", "family", "layers", "width", "parameters", "paper", "difference", "verdict", "untied", "FLA",
                 "difference", "note"]

_ABOUT_RELEASED = """\
`released` is the number of parameters of the released model in `transformers` 5.24, without vision towers and
multi-token heads. A tied head is counted once."""
_RELEASED_COLUMNS = ["config", "family", "layers", "width", "vocabulary", "head", "parameters", "released",
                     "difference", "source"]

_ABOUT_COST = """\
`state` is the number of bytes that decoding keeps for one sequence of the training length (`context`). A recurrent
mixer keeps float32 memories and convolution inputs, which are the same for any length. Attention keeps keys, values and
positions. `per token` is the growth of the state with one more token. GFLOP is the arithmetic per training token:
products and mixing of the forward pass, and twice as much for the backward pass. Attention counts over the mean number
of tokens seen. Recomputation and the extra scores of chunked forms are not counted. The config's docstring says where
the data comes from."""
_COST_COLUMNS = ["config", "context", "state", "per token", "GFLOP", "command"]

_ABOUT_SMOKE = """\
Generated from `{file}`, which `python experiments/smoke_models.py` writes: the same steps of every family at one
setting. `tokens/s` is the speed of the last steps, after compilation. MFU counts the arithmetic above. GiB is the
memory of the compiled step, with parameters and optimizer. `compile` is the time from tracing to the program, while the
other families compile beside it. An untrained model's loss is close to the logarithm of its vocabulary, 10.4 for 32,000
tokens."""
_SMOKE_COLUMNS = ["family", "parameters", "loss", "tokens/s", "MFU", "ms per step", "GiB", "compile s"]


def _size_row(model):
  config, size = model.config, model.size
  return [f"`{config.name}`", size.family, _layers(config.model), str(config.model.width), f"{model.parameters:,}",
          _paper(model), _percent(model.difference), verdict(model), f"{model.untied:,}" if size.peer else "",
          _count(size.peer) if size.peer else "", _percent(model.peer_difference), size.note]


def _released_row(model):
  config, size = model.config.model, model.size
  return [f"`{model.config.name}`", size.family, _layers(config), str(config.width), f"{config.vocab_size:,}",
          "tied" if config.tie_embeddings else "separate", f"{model.parameters:,}", f"{size.released:,}",
          f"{model.parameters - size.released:,}", size.source]


def _paper(model):
  size = model.size
  other = f"; {model.compared:,} with its vocabulary of {size.vocabulary:,}" if size.vocabulary else ""
  return f"{size.paper} ({size.source}{other})" if size.paper else ""


def _cost_row(model):
  growth = f"{model.growth:,}" if model.growth else "0"
  name = model.config.name
  return [f"`{name}`", f"{model.config.data.sequence_length:,}", f"{model.state:,}",
          f"{growth}, up to {model.window:,} tokens" if model.window else growth, f"{model.flops / 1e9:.3g}",
          f"`python experiments/train.py --config={name}`"]


def _smoke(records):
  settings = {}
  for record in records:
    setting = tuple(record[name] for name in ("device", "sequence_length", "batch_size", "dtype", "remat", "steps",
                                              "timed_steps", "data"))
    settings.setdefault(setting, []).append(record)
  for setting, group in settings.items():
    device, length, batch, dtype, remat, steps, timed, data = setting
    yield (f"### {device}\n\n{batch} sequences of {length:,} tokens ({data}), {dtype}, remat `{remat}`, {steps} steps, "
           f"the last {timed} timed.")
    yield table(_SMOKE_COLUMNS, map(_smoke_row, group))
    versions = dict.fromkeys(", ".join(f"{k} {v}" for k, v in record["versions"].items()) for record in group)
    commands = dict.fromkeys(f"`{record['command']}`" for record in group)
    yield f"Versions: {'; '.join(versions)}. Command: {', '.join(commands)}."


def _smoke_row(record):
  head = [f"`{record['family']}`", f"{record['parameters']:,}"]
  if record["reason"]:
    return [*head, f"failed: {record['reason']}", *[""] * 5]
  return [*head, f"{record['loss_first']:.2f} to {record['loss_last']:.2f}", f"{record['tokens_per_s']:,.0f}",
          "" if record["mfu"] is None else f"{100 * record['mfu']:.1f}%", f"{record['step_ms']:.0f}",
          f"{record['memory_gib']:.1f}", f"{record['compile_s']:.0f}"]


def _grows_on(model: LanguageModel) -> bool:
  long = 2**24  # beyond any window
  return state_bytes(model, 1, 2 * long) > state_bytes(model, 1, long)


def _layers(model):
  """How many layers of the model have each mixer."""
  groups = itertools.groupby(sorted(map(_layer, layer_mixers(model))))
  return ", ".join(f"{len(list(group))} {name}" for name, group in groups)


def _layer(mixer):
  window = getattr(mixer, "window", 0)
  return mixers.name_of(mixer) + (f" (window {window:,})" if window else "")


def _percent(difference):
  return "" if difference is None else f"{100 * difference:+.1f}%".replace("-0.0", "0.0").replace("+0.0", "0.0")


def _count(count):
  return f"{count / 1e9:.3f}B" if count >= 1e9 else f"{count / 1e6:.0f}M"


def table(head, rows):
  lines = [head, ["---"] * len(head), *rows]
  return "\n".join("| " + " | ".join(line) + " |" for line in lines)
