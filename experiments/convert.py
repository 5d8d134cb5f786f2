"""Converts released checkpoints in Hugging Face's format to workdirs, and back, and attention to linear attention.

  python experiments/convert.py --from=hub/gla-1.3B-100B --workdir=runs/gla_1b3_100b
  python experiments/generate.py --workdir=runs/gla_1b3_100b --prompt="The capital of France is" --temperature=0
  python experiments/evaluate.py --workdir=runs/gla_1b3_100b --data=data/english
  python experiments/convert.py --to=hub/gla_tiny --workdir=runs/gla_tiny
  python experiments/convert.py --to=hub/mine --workdir=runs/mine --model_type=llama
  python experiments/convert.py --linearize=runs/transformer_tiny --workdir=runs/transformer_tiny_linear
  python experiments/train.py --config=supra_tiny --init_from=runs/transformer_tiny_linear

`hub/...` is a directory with config.json and model.safetensors, or several files with an index, downloaded beforehand.
`lin_jax/hf/families.py` lists the families: Qwen3.5 (text), Olmo Hybrid, Llama, Mistral, Qwen3, Mamba-2 and the ones
of flash-linear-attention. The parameters are spread over all devices. The tokenizer.model, or else the
tokenizer.json with the settings beside it, is copied if `lin_jax.tokenizer` can read it. Without one, generate.py needs
--data with a dataset of the same tokenizer.

--linearize makes a recurrent model of a run with softmax attention. It is to be trained further with a config of the
same layers: `lin_jax.linearize` says how, and for how long.

The workdir or the directory appears only when it is complete, so a command that was killed can simply be repeated.
"""

import dataclasses
import functools
import pathlib
import shutil

import jax
import numpy as np
from absl import flags
from flax import nnx

from lin_jax import files, hf
from lin_jax.checkpoint import load_model, save_model
from lin_jax.config import DTYPES, DataConfig, MeshConfig, TrainConfig, validate
from lin_jax.fast_tokenizer import CONFIG_FILE, TEMPLATE_FILE, TOKENIZER_FILE, FastTokenizer
from lin_jax.hf import families
from lin_jax.linearize import linearize
from lin_jax.model import parameter_count
from lin_jax.sharding import make_mesh
from lin_jax.tokenizer import MODEL_FILE, MistralTokenizer, load_tokenizer, require_vocabulary
from running import commands

_FROM = flags.DEFINE_string("from", "", "Directory of the Hugging Face checkpoint that becomes the workdir.")
_TO = flags.DEFINE_string("to", "", "Directory of the Hugging Face checkpoint that the workdir's run becomes.")
_LINEARIZE = flags.DEFINE_string("linearize", "", "Directory of the run of which the workdir becomes a recurrent one.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run, which --from and --linearize make and --to "
                               "reads.", required=True)
_CHECKPOINT = commands.define_checkpoint()
_DTYPE = flags.DEFINE_enum("dtype", None, DTYPES, "Dtype of activations with --from; by default the checkpoint's own.")
_MODEL_TYPE = flags.DEFINE_enum("model_type", "", ["", *families.FAMILIES], "Family of checkpoints that --to writes; "
                                "by default the first one that has such a model.")

# The file of each kind of tokenizer, of which a folder's first one is taken, and the settings beside a tokenizer.json.
_TOKENIZERS = {MistralTokenizer.name: MODEL_FILE, FastTokenizer.name: TOKENIZER_FILE}
_SETTINGS = (CONFIG_FILE, TEMPLATE_FILE, "special_tokens_map.json", "generation_config.json")


def main(_):
  if sum(map(bool, (_FROM.value, _TO.value, _LINEARIZE.value))) != 1:
    raise ValueError("exactly one of --from, --to and --linearize must be given")
  if _MODEL_TYPE.value and not _TO.value:
    raise ValueError(f"--model_type={_MODEL_TYPE.value}: only for --to; a checkpoint says itself what it is")
  if _FROM.value:
    read(pathlib.Path(_FROM.value), pathlib.Path(_WORKDIR.value), _DTYPE.value)
  elif _TO.value:
    write(pathlib.Path(_TO.value), pathlib.Path(_WORKDIR.value), _MODEL_TYPE.value)
  else:
    make_linear(pathlib.Path(_LINEARIZE.value), pathlib.Path(_WORKDIR.value))


def read(source: pathlib.Path, workdir: pathlib.Path, dtype: str | None = None) -> None:
  """Makes `workdir` a run of the checkpoint `source`, with the checkpoint's tokenizer if the library can read it."""
  mesh = _mesh()
  model_config, model = hf.load(source, mesh)
  model_config.dtype = dtype or model_config.dtype
  tokenizer, unserved = _served(source, model_config.vocab_size)
  data = DataConfig(path="" if unserved else str(workdir / next(iter(tokenizer))), batch_size=8)
  config = validate(TrainConfig(name=source.resolve().name, model=model_config, data=data))
  if _complete(workdir, functools.partial(load_model, mesh=mesh), (config, model), tokenizer):
    print(f"{workdir}: complete already, nothing to do")
    return
  with files.whole_folder(workdir) as work:
    save_model(work, config, model)
    _copy(tokenizer, work)
  print(f"{source} -> {workdir}: {parameter_count(model_config):,} parameters")
  if unserved:
    print(f"{unserved}; generate.py will need --data")


def write(target: pathlib.Path, workdir: pathlib.Path, kind: str = "") -> None:
  """Writes the run's model as the checkpoint `target` of the family `kind`, or of the first one that has such a model.

  The tokenizer of the run's data is written beside it if it is a file.
  """
  mesh = _mesh()
  config, model = load_model(workdir, commands.checkpoint_step(_CHECKPOINT.value), mesh)
  tokenizer = _of_data(config.data.path)

  def load(folder):
    config, model = hf.load(folder, mesh)
    return families.writing(config, kind), model

  if _complete(target, load, (families.writing(config.model, kind), model), tokenizer):
    print(f"{target}: complete already, nothing to do")
    return
  with files.whole_folder(target) as work:
    hf.save(work, config.model, model, kind)
    _copy(tokenizer, work)
  print(f"{workdir} -> {target}: {parameter_count(config.model):,} parameters")
  if not tokenizer:
    print(f"{target} has no tokenizer: data path {config.data.path!r} has none with a file")


def make_linear(source: pathlib.Path, workdir: pathlib.Path) -> None:
  """Makes `workdir` a run whose model is the one of the run `source` with recurrent layers in place of attention."""
  mesh = _mesh()
  config, model = load_model(source, commands.checkpoint_step(_CHECKPOINT.value), mesh)
  model_config, model = linearize(config.model, model, config.seed)
  config = dataclasses.replace(config, name=workdir.resolve().name, init_from="", model=model_config)
  if _complete(workdir, functools.partial(load_model, mesh=mesh), (config, model), {}):
    print(f"{workdir}: complete already, nothing to do")
    return
  with files.whole_folder(workdir) as work:
    save_model(work, config, model)
  print(f"{source} -> {workdir}: {parameter_count(model_config):,} parameters, of which the feature maps are new: "
        f"train it further with train.py --init_from={workdir}")


def _mesh():
  """All devices, each of which holds a part of every matrix, because a model may be too large for one."""
  return make_mesh(MeshConfig(data=1, fsdp=-1))


def _served(folder: pathlib.Path, vocab_size: int) -> tuple[dict[str, pathlib.Path], str]:
  """The files of the tokenizer in a folder, or none and why it does not serve a model of `vocab_size`."""
  file = next((folder / name for name in _TOKENIZERS.values() if (folder / name).is_file()), None)
  if file is None:
    return {}, f"{folder} has no {' and no '.join(_TOKENIZERS.values())}"
  try:
    require_vocabulary(load_tokenizer(file), vocab_size)
  except ValueError as e:
    return {}, f"the tokenizer is left out: {e}"
  return _carried(file), ""


def _of_data(path: str) -> dict[str, pathlib.Path]:
  """The files of the tokenizer of a run's data, or none if it has no file or is on another machine."""
  file = pathlib.Path(path)
  if path and not file.exists():
    return {}
  try:
    tokenizer = load_tokenizer(path)
  except ValueError:
    if any((file / name).exists() for name in _TOKENIZERS.values()):  # there is a tokenizer, and it is damaged
      raise
    return {}
  name = _TOKENIZERS.get(tokenizer.name)
  return {} if name is None else _carried(file if file.is_file() else file / name)


def _carried(file: pathlib.Path) -> dict[str, pathlib.Path]:
  """The files of a tokenizer by the names with which a folder carries them, the tokenizer itself first."""
  if file.suffix != ".json":
    return {MODEL_FILE: file}
  beside = {name: file.parent / name for name in _SETTINGS if (file.parent / name).is_file()}
  return {TOKENIZER_FILE: file} | beside


def _copy(tokenizer: dict[str, pathlib.Path], folder: pathlib.Path) -> None:
  for name, file in tokenizer.items():
    shutil.copyfile(file, folder / name)


def _complete(folder, load, made, tokenizer) -> bool:
  """Whether `folder` is complete already, as when this command was killed after its last write."""
  try:
    config, model = load(folder) if folder.is_dir() else (None, None)
  except ValueError:
    return False
  names = [name for name in (*_TOKENIZERS.values(), *_SETTINGS) if (folder / name).is_file()]
  if config != made[0] or set(names) != set(tokenizer):
    return False
  if any((folder / name).read_bytes() != file.read_bytes() for name, file in tokenizer.items()):
    return False
  here, there = (jax.tree.leaves(nnx.state(m, nnx.Param)) for m in (made[1], model))
  return len(here) == len(there) and all(map(np.array_equal, here, there))


if __name__ == "__main__":
  commands.run(main)
