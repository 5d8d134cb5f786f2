"""Converts checkpoints of flash-linear-attention (Hugging Face's format) to workdirs, and back; linearizes attention.

  python experiments/convert.py --from=hub/gla-1.3B-100B --workdir=runs/gla_1b3_100b
  python experiments/generate.py --workdir=runs/gla_1b3_100b --prompt="The capital of France is" --temperature=0
  python experiments/evaluate.py --workdir=runs/gla_1b3_100b --data=data/english
  python experiments/convert.py --to=hub/gla_tiny --workdir=runs/gla_tiny
  python experiments/convert.py --linearize=runs/transformer --workdir=runs/supra
  python experiments/train.py --config=... --init_from=runs/supra --workdir=runs/supra_uptrained

`hub/...` is a directory with config.json and model.safetensors, downloaded beforehand. Its tokenizer.model is copied
where `lin_jax.tokenizer` can read it. Without one, generate.py needs --data with a dataset of the same tokenizer.

--linearize makes a recurrent model of a run's softmax attention: `lin_jax.linearize` says how, and how it is to be
trained further.

The workdir or the directory appears only when it is complete, so a command that was killed can simply be repeated.
"""

import dataclasses
import pathlib
import shutil

import jax
import numpy as np
from absl import flags
from flax import nnx

from lin_jax import files, hf
from lin_jax.checkpoint import load_model, save_model
from lin_jax.config import DTYPES, DataConfig, TrainConfig, validate
from lin_jax.linearize import linearize
from lin_jax.model import parameter_count
from lin_jax.tokenizer import MODEL_FILE, MistralTokenizer, load_tokenizer, require_vocabulary
from running import commands

_FROM = flags.DEFINE_string("from", "", "Directory of the Hugging Face checkpoint that becomes the workdir.")
_TO = flags.DEFINE_string("to", "", "Directory of the Hugging Face checkpoint that the workdir's run becomes.")
_LINEARIZE = flags.DEFINE_string("linearize", "", "Directory of the run of which the workdir becomes a recurrent one.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run, which --from and --linearize make and --to "
                               "reads.", required=True)
_CHECKPOINT = commands.define_checkpoint()
_DTYPE = flags.DEFINE_enum("dtype", None, DTYPES, "Dtype of activations with --from; by default the checkpoint's own.")


def main(_):
  if sum(map(bool, (_FROM.value, _TO.value, _LINEARIZE.value))) != 1:
    raise ValueError("exactly one of --from, --to and --linearize must be given")
  if _FROM.value:
    read(pathlib.Path(_FROM.value), pathlib.Path(_WORKDIR.value), _DTYPE.value)
  elif _TO.value:
    write(pathlib.Path(_TO.value), pathlib.Path(_WORKDIR.value))
  else:
    make_linear(pathlib.Path(_LINEARIZE.value), pathlib.Path(_WORKDIR.value))


def read(source: pathlib.Path, workdir: pathlib.Path, dtype: str | None = None) -> None:
  """Makes `workdir` a run of the checkpoint `source`, with the checkpoint's tokenizer if the library can read it."""
  model_config, model = hf.load(source)
  model_config.dtype = dtype or model_config.dtype
  tokenizer = source / MODEL_FILE
  unserved = _unserved(tokenizer, model_config.vocab_size)
  data = DataConfig(path="" if unserved else str(workdir / MODEL_FILE), batch_size=8)
  config = validate(TrainConfig(name=source.resolve().name, model=model_config, data=data))
  tokenizer = None if unserved else tokenizer
  if _complete(workdir, load_model, (config, model), tokenizer):
    print(f"{workdir}: complete already, nothing to do")
    return
  with files.whole_folder(workdir) as work:
    save_model(work, config, model)
    if tokenizer:
      shutil.copyfile(tokenizer, work / MODEL_FILE)
  print(f"{source} -> {workdir}: {parameter_count(model_config):,} parameters")
  if unserved:
    print(f"{unserved}; generate.py will need --data")


def write(target: pathlib.Path, workdir: pathlib.Path) -> None:
  """Writes the run's model as the checkpoint `target`, with the tokenizer of its data if that is a file."""
  config, model = load_model(workdir, commands.checkpoint_step(_CHECKPOINT.value))
  tokenizer = _tokenizer_file(config.data.path)

  def load(folder):
    config, model = hf.load(folder)
    return hf.to_hf(config), model

  if _complete(target, load, (hf.to_hf(config.model), model), tokenizer):
    print(f"{target}: complete already, nothing to do")
    return
  with files.whole_folder(target) as work:
    hf.save(work, config.model, model)
    if tokenizer:
      shutil.copyfile(tokenizer, work / MODEL_FILE)
  print(f"{workdir} -> {target}: {parameter_count(config.model):,} parameters")
  if not tokenizer:
    print(f"{target} has no tokenizer: data path {config.data.path!r} has none with a file")


def make_linear(source: pathlib.Path, workdir: pathlib.Path) -> None:
  """Makes `workdir` a run whose model is the one of the run `source` with recurrent layers in place of attention."""
  config, model = load_model(source, commands.checkpoint_step(_CHECKPOINT.value))
  model_config, model = linearize(config.model, model, config.seed)
  config = dataclasses.replace(config, name=workdir.resolve().name, model=model_config)
  if _complete(workdir, load_model, (config, model), None):
    print(f"{workdir}: complete already, nothing to do")
    return
  with files.whole_folder(workdir) as work:
    save_model(work, config, model)
  print(f"{source} -> {workdir}: {parameter_count(model_config):,} parameters, of which the feature maps are new: "
        f"train it further with train.py --init_from={workdir}")


def _unserved(file: pathlib.Path, vocab_size: int) -> str:
  """Says why a tokenizer file does not serve a model of `vocab_size`; empty if it does."""
  if not file.is_file():
    return f"{file.parent} has no {MODEL_FILE}, the one tokenizer file that is served"
  try:
    require_vocabulary(MistralTokenizer(file), vocab_size)
  except ValueError as e:
    return f"the tokenizer is left out: {e}"
  return ""


def _complete(folder, load, made, tokenizer) -> bool:
  """Whether `folder` is complete already, as when this command was killed after its last write."""
  try:
    config, model = load(folder) if folder.is_dir() else (None, None)
    found = (folder / MODEL_FILE).read_bytes() if (folder / MODEL_FILE).exists() else None
  except ValueError:
    return False
  if config != made[0] or found != (tokenizer.read_bytes() if tokenizer else None):
    return False
  here, there = (jax.tree.leaves(nnx.state(m, nnx.Param)) for m in (made[1], model))
  return len(here) == len(there) and all(map(np.array_equal, here, there))


def _tokenizer_file(path: str) -> pathlib.Path | None:
  file = pathlib.Path(path)
  if path and not file.exists():
    return None  # the data are on another machine
  try:
    tokenizer = load_tokenizer(path)
  except ValueError:
    if file.is_dir() and (file / MODEL_FILE).exists():  # there is a tokenizer, and it is damaged
      raise
    return None
  return (file if file.is_file() else file / MODEL_FILE) if isinstance(tokenizer, MistralTokenizer) else None


if __name__ == "__main__":
  commands.run(main)
