"""A run's config.json: what it says loads, and every damage to it is one message."""

import json
import random

import pytest

from lin_jax import mixers
from lin_jax.config import ModelConfig, TrainConfig, from_dict, load, save, to_dict
from lin_jax.mixers.attention import AttentionConfig
from tests.forked import Command
from tests.lin_jax import tiny
from tests.lin_jax.damage import damaged, outcomes


def saved(mixer="gla"):
  config = tiny.config("data")
  config.model.mixer = mixers.config_class(mixer).examples()[-1]
  config.model.hybrid_mixer, config.model.hybrid_layers = AttentionConfig(heads=2), (1,)
  return to_dict(config)


@pytest.mark.parametrize("mixer", mixers.MIXERS)
def test_a_damaged_config_loads_or_is_one_message(tmp_path, mixer):
  source, path = random.Random(mixer), tmp_path / "config.json"
  texts = [damaged(saved(mixer), source) for _ in range(20)]
  assert outcomes(path, texts, lambda: load(path)) > 5


CASES = {
    "missing model": (lambda c: c.pop("model"), "config.model=None: must be an object"),
    "mixer null": (lambda c: c["model"].update(mixer=None), "config.model.mixer=None: must be an object with a 'type'"),
    "mixer type": (lambda c: c["model"]["mixer"].update(type=3), "config.model.mixer={'type': 3, .*with a 'type'"),
    "unknown mixer": (lambda c: c["model"]["mixer"].update(type="flash"), "unknown mixer 'flash'"),
    "unknown field": (lambda c: c["optim"].update(speed=1), "config.optim: this version of lin_jax has no field"),
    "part": (lambda c: c.update(optim=[1]), r"config.optim=\[1\]: must be an object"),
    "text": (lambda c: c["model"].update(depth="12"), "config.model.depth='12': must be a whole number"),
    "boolean": (lambda c: c["model"].update(width=True), "config.model.width=True: must be a whole number"),
    "float": (lambda c: c["model"].update(depth=1e9), "config.model.depth=1000000000.0: must be a whole number"),
    "many layers": (lambda c: c["model"].update(depth=10**9), "config.model.depth=1000000000: must be at most 10,000"),
    "huge": (lambda c: c["data"].update(batch_size=10**30), "config.data.batch_size=10+: must lie within"),
    "NaN": (lambda c: c["optim"].update(learning_rate=float("nan")), "config.optim.learning_rate=nan: must be finite"),
    "number": (lambda c: c["data"].update(path=1), "config.data.path=1: must be a text"),
    "unroll": (lambda c: c.update(unroll=-1), "config.unroll=-1: must not be negative"),
    "layers": (lambda c: c["model"].update(hybrid_layers=["1"]), "config.model.hybrid_layers=.*: must be a list of"),
    "heads": (lambda c: c["model"]["mixer"].update(heads=0), "heads=0: must be at least 1"),
    "heads null": (lambda c: c["model"]["mixer"].update(heads=None), "config.model.mixer.heads=None: must be a whole"),
}


@pytest.mark.parametrize("change, message", CASES.values(), ids=CASES)
def test_damage_is_named(tmp_path, change, message):
  values = saved()
  change(values)
  path = tmp_path / "config.json"
  path.write_text(json.dumps(values))
  with pytest.raises(ValueError, match=f"config.json: .*{message}"):
    load(path)


FILES = {
    "empty": (b"", "not a saved lin_jax config .Expecting value"),
    "null": (b"null", "it holds None, not an object"),
    "list": (b"[1]", r"it holds \[1\], not an object"),
    "twice": (b'{"seed": 1, "seed": 2}', "key 'seed' is there twice"),
    "not UTF-8": (b'{"name": "\xff"}', "can't decode byte 0xff"),
    "deep": (b"[" * 100_000, "recursion"),
    "cut": (b'{"model": {"dep', "Unterminated string"),
}


@pytest.mark.parametrize("content, message", FILES.values(), ids=FILES)
def test_files_that_hold_no_config_are_refused(tmp_path, content, message):
  path = tmp_path / "config.json"
  path.write_bytes(content)
  with pytest.raises(ValueError, match=f"config.json: not a saved lin_jax config .*{message}" if "not a" not in message
                     else message):
    load(path)


def test_a_config_older_than_unroll_loads(tmp_path):
  values = saved()
  del values["unroll"]
  (tmp_path / "config.json").write_text(json.dumps(values))
  assert load(tmp_path / "config.json").unroll == 1


@pytest.mark.parametrize("kind", ["retention", "simple_gla"])
def test_a_mixer_older_than_its_decays_keeps_those_that_it_had(kind):
  values = to_dict(TrainConfig(model=ModelConfig(mixer=mixers.config_class(kind)(heads=2))))
  assert from_dict(values).model.mixer.decays == "spread"
  del values["model"]["mixer"]["decays"]
  assert from_dict(values).model.mixer.decays == "consecutive"


def test_a_norm_that_clips_nothing_survives(tmp_path):
  config = tiny.config("data", clip_norm=float("inf"))
  save(config, tmp_path / "config.json")
  assert load(tmp_path / "config.json") == config


def test_a_byte_order_mark_is_dropped(tmp_path):
  path = tmp_path / "config.json"
  path.write_bytes(b"\xef\xbb\xbf" + json.dumps(saved()).encode())
  assert to_dict(load(path)) == saved()


def test_commands_refuse_a_damaged_config_with_2(tmp_path):
  (tmp_path / "config.json").write_text(json.dumps(saved() | {"optim": {"steps": "12"}}))
  process = Command("generate.py", f"--workdir={tmp_path}")
  err = process.communicate()[1]
  assert process.returncode == 2 and err.count("\n") == 1, err
  assert f"{tmp_path}/config.json: config.optim.steps='12': must be a whole number" in err
