"""From a run to a Hugging Face checkpoint and back by the commands, and the use of the converted run."""

import json
import pathlib
import re
import shutil
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import convert
from lin_jax import files, hf
from lin_jax.checkpoint import load_model, save_model
from lin_jax.config import DataConfig, ModelConfig, TrainConfig
from lin_jax.mixers.attention import AttentionConfig
from lin_jax.mixers.delta_net import DeltaNetConfig
from lin_jax.mixers.supra import SupraConfig
from lin_jax.model import LanguageModel
from lin_jax.tokenizer import MODEL_FILE, load_tokenizer
from tests.environment import ENVIRONMENT
from tests.forked import ROOT, Command
from tests.lin_jax import fast_tokenizers, tiny
from tests.lin_jax.test_tokenizer import train_model

FIXTURES = ROOT / "tests" / "fixtures" / "hf"


def start(command, *arguments):
  return subprocess.Popen([sys.executable, ROOT / "experiments" / command, *map(str, arguments)], cwd=ROOT,
                          env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def outputs(*processes):
  texts = [process.communicate() for process in processes]
  assert [process.returncode for process in processes] == [0] * len(processes), texts
  return [out for out, _ in texts]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A run of a random model whose data is a tokenizer file, with a vocabulary padded to twice the tokenizer's."""
  folder = tmp_path_factory.mktemp("run")
  model = ModelConfig(mixer=DeltaNetConfig(heads=2, implementation="reference"), vocab_size=720, width=32, depth=1,
                      mlp_width=32, dtype="float32")
  config = TrainConfig(name="random", model=model, data=DataConfig(path=str(train_model(folder)), sequence_length=32))
  save_model(folder / "run", config, LanguageModel(model, rngs=nnx.Rngs(0)))
  return folder / "run"


def test_a_run_survives_both_ways(run, tmp_path):
  out, = outputs(start("convert.py", f"--to={tmp_path}/hub", f"--workdir={run}"))
  assert "parameters" in out and json.loads((tmp_path / "hub" / hf.CONFIG).read_text())["model_type"] == "delta_net"
  out, = outputs(Command("convert.py", f"--from={tmp_path}/hub", f"--workdir={tmp_path}/again"))
  sample = ["--prompt=it was the", "--tokens=20", "--seed=3"]
  data = tiny.write_dataset(tmp_path / "data")
  evaluate = [f"--data={data}", "--batches=1", "--sequence_length=32"]
  texts = outputs(Command("generate.py", f"--workdir={run}", *sample),
                  Command("generate.py", f"--workdir={tmp_path}/again", *sample),
                  Command("evaluate.py", f"--workdir={tmp_path}/again", *evaluate))
  assert texts[0] == texts[1] and texts[0].startswith("it was the") and len(texts[0]) > 20
  assert "bits per byte" in texts[2]


def test_a_conversion_that_was_killed_is_repeated_as_it_was(run, tmp_path, monkeypatch, capsys):
  def killed(*_):
    raise KeyboardInterrupt

  def content(folder):
    return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}

  monkeypatch.setattr(convert, "_CHECKPOINT", types.SimpleNamespace(value="last"))
  for target, again in ((tmp_path / "hub", lambda: convert.write(tmp_path / "hub", run)),
                        (tmp_path / "run", lambda: convert.read(tmp_path / "hub", tmp_path / "run"))):
    # The tokenizer comes last, after what makes the folder a checkpoint or a run.
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
      patch.setattr(convert.shutil, "copyfile", killed)
      again()
    assert not target.exists()
    left = target.with_name(target.name + files.PARTIAL)
    left.mkdir()
    (left / "config.json").write_text("{")  # what SIGKILL leaves
    again()
    assert (target / MODEL_FILE).is_file() and not left.exists()
    before = content(target)
    again()
    assert capsys.readouterr().out.endswith(f"{target}: complete already, nothing to do\n")
    (target / MODEL_FILE).unlink()
    with pytest.raises(ValueError, match="exists and is not an empty folder"):
      again()
    assert content(target) == before - {pathlib.Path(MODEL_FILE)}
    convert.shutil.copyfile(json.loads((run / "config.json").read_text())["data"]["path"], target / MODEL_FILE)


def test_attention_becomes_linear_once(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(convert, "_CHECKPOINT", types.SimpleNamespace(value="last"))
  model = ModelConfig(mixer=AttentionConfig(heads=2), vocab_size=48, width=32, depth=1, mlp_width=32, dtype="float32")
  config = TrainConfig(name="softmax", seed=5, model=model, data=DataConfig(path="bytes", sequence_length=32))
  save_model(tmp_path / "softmax", config, jax.jit(lambda: LanguageModel(model, rngs=nnx.Rngs(0)))())
  for end in ("train it further with train.py --init_from=", "complete already, nothing to do"):
    convert.make_linear(tmp_path / "softmax", tmp_path / "linear")
    assert end in capsys.readouterr().out
  made, linear = load_model(tmp_path / "linear")
  assert (made.name, made.seed, made.model.mixer, made.data) == ("linear", 5, SupraConfig(heads=2), config.data)
  parameters = dict(nnx.to_flat_state(nnx.state(linear, nnx.Param)))
  old = dict(nnx.to_flat_state(nnx.state(load_model(tmp_path / "softmax")[1], nnx.Param)))
  assert old and all((parameters[path][...] == value[...]).all() for path, value in old.items())


def test_a_tokenizer_json_goes_both_ways_with_its_settings(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(convert, "_CHECKPOINT", types.SimpleNamespace(value="last"))
  shutil.copytree(FIXTURES / "llama", tmp_path / "hub")
  change = {"vocab_size": 331}
  (tmp_path / "hub" / hf.CONFIG).write_text(json.dumps(json.loads((tmp_path / "hub" / hf.CONFIG).read_text()) | change))
  tensors = load_file(tmp_path / "hub" / hf.WEIGHTS)
  tensors["model.embed_tokens.weight"] = np.zeros((331, 12), np.float32)
  save_file(tensors, tmp_path / "hub" / hf.WEIGHTS)
  fast_tokenizers.save(tmp_path / "hub", fast_tokenizers.byte_level(), eos_token="<|im_end|>", chat_template="{{ 1 }}")
  for _ in range(2):
    convert.read(tmp_path / "hub", tmp_path / "run")
    convert.write(tmp_path / "back", tmp_path / "run", "llama")
  assert capsys.readouterr().out.count("complete already") == 2
  for name in ("tokenizer.json", "tokenizer_config.json"):
    assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "hub" / name).read_bytes()
  tokenizer = load_tokenizer(load_model(tmp_path / "run")[0].data.path)
  assert (tokenizer.name, tokenizer.chat_template) == ("fast", "{{ 1 }}")


@pytest.mark.parametrize("options, message", [
    (None, "has no tokenizer.model and no tokenizer.json"),
    ({}, "the tokenizer is left out: tokenizer 'mistral' has 360 tokens, the model 48"),
    ({"eos_id": -1}, "the tokenizer is left out: .* without an end id"),
])
def test_without_a_tokenizer_that_is_served_a_run_has_none(tmp_path, capsys, options, message):
  shutil.copytree(FIXTURES / "retnet", tmp_path / "retnet")
  if options is not None:
    train_model(tmp_path / "retnet", **options)
  convert.read(tmp_path / "retnet", tmp_path / "run")
  assert re.search(f"{message}.*; generate.py will need --data", capsys.readouterr().out)
  config, _ = load_model(tmp_path / "run")
  assert (config.name, config.model.dtype, config.data.path) == ("retnet", "float32", "")


def test_without_a_tokenizer_generation_asks_for_one(tmp_path):
  convert.read(FIXTURES / "retnet", tmp_path / "run")
  asked = {"": "tokenizer ''", "--data=bytes": "tokenizer 'bytes' has 257 tokens, the model 48"}
  processes = [Command("generate.py", f"--workdir={tmp_path}/run", *filter(None, [option])) for option in asked]
  for process, message in zip(processes, asked.values(), strict=True):
    err = process.communicate()[1]
    assert message in err and "Traceback" not in err and process.returncode == 2
  with pytest.raises(ValueError, match="run exists and is not an empty folder: choose another"):
    convert.read(FIXTURES / "delta_net", tmp_path / "run")


def test_mistakes_exit_with_2_and_write_nothing(run, tmp_path):
  (tmp_path / "foreign").mkdir()
  (tmp_path / "foreign" / hf.CONFIG).write_text('{"model_type": "gpt2"}')
  cases = [([f"--workdir={tmp_path}/new"], "exactly one of --from, --to and --linearize"),
           ([f"--from={tmp_path}/foreign", f"--workdir={tmp_path}/new"], "model_type='gpt2'"),
           ([f"--from={tmp_path}/foreign", f"--workdir={tmp_path}/new", "--model_type=gla"], "--model_type=gla: only"),
           ([f"--to={tmp_path}/new", f"--workdir={run}", "--model_type=gla"], "a gla checkpoint has 'gla'"),
           ([f"--linearize={run}", f"--workdir={tmp_path}/new"], "mixer is 'delta_net': only softmax attention")]
  processes = [Command("convert.py", *arguments) for arguments, _ in cases]
  for process, (_, message) in zip(processes, cases, strict=True):
    _, err = process.communicate()
    assert process.returncode == 2 and message in err and "Traceback" not in err
  assert [path.name for path in tmp_path.iterdir()] == ["foreign"]
