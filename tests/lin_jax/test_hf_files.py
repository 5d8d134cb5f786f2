"""Damaged and unusual checkpoint directories: they load, or one message names the file and what is wrong in it."""

import json
import random
import shutil
import struct

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lin_jax import hf
from tests.lin_jax.damage import damaged, outcomes
from tests.lin_jax.test_hf import FIXTURES, NAMES, edited


def sharded(path, change=lambda names: names):
  """The GLA fixture in two files; `change` is applied to the index's map from tensors to files."""
  shutil.copytree(FIXTURES / "gla", path)
  tensors = load_file(path / hf.WEIGHTS)
  (path / hf.WEIGHTS).unlink()
  names = {key: f"part-{i % 2}.safetensors" for i, key in enumerate(tensors)}
  for part in set(names.values()):
    save_file({key: value for key, value in tensors.items() if names[key] == part}, path / part)
  (path / hf.INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": change(names)}))
  return path


@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_config_loads_or_is_one_message(tmp_path, name):
  source, path = random.Random(name), edited(name, tmp_path / "copy") / hf.CONFIG
  values = json.loads(path.read_text())
  assert outcomes(path, [damaged(values, source) for _ in range(25)], lambda: hf.load_config(path.parent)) > 3


def test_a_damaged_index_loads_or_is_one_message(tmp_path):
  source, path = random.Random(0), sharded(tmp_path / "copy") / hf.INDEX
  values = json.loads(path.read_text())
  texts = [damaged(values, source) for _ in range(25)]
  assert outcomes(path, texts, lambda: hf.load(path.parent), named=path.parent) > 10


def test_damaged_tensors_load_or_are_one_message(tmp_path):
  source, path = random.Random(0), edited("gla", tmp_path / "copy") / hf.WEIGHTS
  content = path.read_bytes()
  header = 8 + struct.unpack("<Q", content[:8])[0]
  texts = [content[:source.randrange(len(content))] for _ in range(10)]
  for _ in range(30):
    at = source.randrange(source.choice([8, header]))
    texts.append(content[:at] + source.randbytes(1) + content[at + source.randrange(2):])
  assert outcomes(path, texts, lambda: hf.load(path.parent), named=path.parent) > 30


OPTIONS = {
    "no layers": ("gla", {"num_hidden_layers": 0}, "num_hidden_layers=0: must be positive"),
    "negative": ("gla", {"num_hidden_layers": -1}, "num_hidden_layers=-1: must be positive"),
    "text": ("gla", {"num_hidden_layers": "12"}, "num_hidden_layers='12': must be a whole number"),
    "null": ("gla", {"num_hidden_layers": None}, "num_hidden_layers=None: must be a whole number"),
    "boolean": ("gla", {"num_hidden_layers": True}, "num_hidden_layers=True: must be a whole number"),
    "float": ("gla", {"num_hidden_layers": 1e9}, "num_hidden_layers=1000000000.0: must be a whole number"),
    "many": ("gla", {"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000: must be positive and at most 10,000"),
    "NaN": ("gla", {"norm_eps": float("nan")}, "norm_eps=nan: must be finite"),
    "infinite": ("gla", {"expand_k": {"__float__": "Infinity"}}, "expand_k=inf: must be finite"),
    "list": ("gla", {"hidden_size": [32]}, r"hidden_size=\[32\]: must be a whole number"),
    "no flag": ("gla", {"tie_word_embeddings": "false"}, "tie_word_embeddings='false': must be true or false"),
    "type": ("gla", {"model_type": ["gla"]}, r"model_type=\['gla'\]: must be one of"),
    "no type": ("gla", {"model_type": ...}, "model_type=None: must be one of"),
    "heads": ("gla", {"num_heads": 3}, "expand_k=0.5 of width 32 gives 16 channels: not divisible by heads=3"),
    "attn": ("gla", {"attn": "flash"}, "attn='flash': must be null, an object or a list"),
    "attn without layers": ("gla", {"attn": {"num_heads": 2}}, "attn={'num_heads': 2}: must give layers"),
    "attn layers": ("gla", {"attn": {"num_heads": 2, "layers": [2]}}, r"attn.layers=\[2\]: must be different numbers"),
    "attn heads": ("gla", {"attn": {"num_heads": "2", "layers": [1]}}, "attn.num_heads='2': must be a whole number"),
    "attn of softmax": ("transformer", {"attn": "flash"}, r"attn='flash' \(served: None\)"),
    "heads there": ("mamba2", {"num_heads": 5}, r"num_heads=5 \(head_dim=16 gives 4\)"),
    "ratio": ("hgrn2", {"expand_ratio": 0}, "expand_ratio=0: must be positive"),
    "norm": ("delta_net", {"qk_norm": ["l2"]}, "qk_norm=.*: must be a text"),
    "quantized": ("gla", {"quantization_config": {"quant_method": "fbgemm_fp8"}}, "quantization_config={'quant"),
    "rope": ("transformer", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling={'type': 'linear'"),
}


@pytest.mark.parametrize("name, options, message", OPTIONS.values(), ids=OPTIONS)
def test_options_of_another_type_or_range_are_named(tmp_path, name, options, message):
  with pytest.raises(ValueError, match=f"config.json: .*{message}"):
    hf.load_config(edited(name, tmp_path / "copy", options=options))


def test_options_that_the_library_does_not_know_are_ignored(tmp_path, caplog):
  options = {"_attn_implementation_autoset": True, "quantization_config": None, "share_conv_kernel": True,
             "rope_theta": "of another family", "licence": "mit", "conv_size": 4, "use_cache": False}
  assert hf.load_config(edited("gla", tmp_path / "copy", options=options)) == hf.load_config(FIXTURES / "gla")
  assert caplog.messages == [
      "ignored, since the library knows no such options: 'licence, rope_theta, share_conv_kernel'"]


@pytest.mark.parametrize("dtype", ["int8", "uint8", "bool", "float64"])
def test_tensors_of_other_dtypes_are_named(tmp_path, dtype):
  name = "model.layers.0.attn.q_proj.weight"
  path = edited("gla", tmp_path / "copy", lambda tensors: tensors | {name: tensors[name].astype(dtype)})
  with pytest.raises(ValueError, match=f"of another dtype than F32, F16, BF16: {name} .* in model.safetensors"):
    hf.load(path)


def test_tensors_of_eight_bit_floats_are_named(tmp_path):
  def change(tensors):
    return {key: value.view(np.uint8)[..., ::4] if "norm" in key else value for key, value in tensors.items()}

  path = edited("gla", tmp_path / "copy", lambda t: {k: np.ascontiguousarray(v) for k, v in change(t).items()})
  content = (path / hf.WEIGHTS).read_bytes()
  size = struct.unpack("<Q", content[:8])[0]
  header = content[8:8 + size].replace(b'"U8"', b'"F8_E4M3"')
  (path / hf.WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + content[8 + size:])
  with pytest.raises(ValueError, match="of another dtype than .* model.norm.weight F8_E4M3 in model.safetensors"):
    hf.load(path)


INDEXES = {
    "null": (lambda names: None, "weight_map=None: must be an object"),
    "list": (lambda names: [1], r"weight_map=\[1\]: must be an object"),
    "empty": (lambda names: {}, "weight_map={}: must be an object"),
    "number": (lambda names: names | {"lm_head.weight": 1}, "'lm_head.weight' in 1: must be the name of a"),
    "above": (lambda names: names | {"lm_head.weight": "../part-0.safetensors"}, "in '../part-0.safetensors': must be"),
    "absolute": (lambda names: names | {"lm_head.weight": "/part-0.safetensors"}, "in '/part-0.safetensors': must be"),
    "pickle": (lambda names: names | {"lm_head.weight": "pytorch_model.bin"}, "in 'pytorch_model.bin': must be"),
    "missing file": (lambda names: names | {"lm_head.weight": "part-2.safetensors"}, "part-2.safetensors: not a read"),
    "other file": (lambda names: {key: "part-0.safetensors" for key in names}, "is not in part-0.safetensors, where"),
    "other tensor": (lambda names: names | {"x": "part-0.safetensors"}, "'x' is not in part-0.safetensors, where"),
}


@pytest.mark.parametrize("change, message", INDEXES.values(), ids=INDEXES)
def test_wrong_indexes_are_named(tmp_path, change, message):
  with pytest.raises(ValueError, match=message):
    hf.load(sharded(tmp_path / "copy", change))


def test_a_tensor_in_two_files_is_refused(tmp_path):
  path = sharded(tmp_path / "copy")
  tensors = load_file(path / "part-1.safetensors") | {"lm_head.weight": load_file(FIXTURES / "gla" / hf.WEIGHTS)[
      "lm_head.weight"]}
  for part in ("part-0.safetensors", "part-1.safetensors"):
    save_file(load_file(path / part) | {"lm_head.weight": tensors["lm_head.weight"]}, path / part)
  with pytest.raises(ValueError, match="part-1.safetensors: 'lm_head.weight' is in part-0.safetensors as well"):
    hf.load(path)


def test_pickles_are_not_read_and_the_way_out_is_named(tmp_path):
  path = edited("gla", tmp_path / "copy")
  (path / hf.WEIGHTS).rename(path / "pytorch_model.bin")
  with pytest.raises(ValueError, match="has pytorch_model.bin but no model.safetensors: .* save_file"):
    hf.load(path)
