"""Tuned configurations: the form of a device's file, and when its entries apply."""

import dataclasses
import json

import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from kernels import tuned
from kernels.tuned import Tile

DEVICE = "NVIDIA H100 80GB HBM3"


@dataclasses.dataclass(frozen=True)
class Config:
  chunk: int
  forward: Tile
  backward: Tile | None


MEASURED = Config(64, Tile(128, 8, 3), None)


def on(device):
  """Compiling for `device`, whatever the host has."""
  return use_abstract_mesh(AbstractMesh((), (), abstract_device=AbstractDevice(device, 132, "gpu")))


def lookup(op="gla", gate="channel", K=128, V=64, dtype="bfloat16"):
  return tuned.lookup(op, Config, gate=gate, K=K, V=V, dtype=jnp.dtype(dtype))


@pytest.fixture
def folder(tmp_path, monkeypatch):
  monkeypatch.setattr(tuned, "FOLDER", tmp_path)
  return tmp_path


def entry(**changes):
  return {"op": "gla", "gates": ["channel", "token"], "K": 128, "V": 64, "dtype": "bfloat16",
          "config": dataclasses.asdict(MEASURED)} | changes


def write(folder, *entries):
  (folder / "nvidia_h100_80gb_hbm3.json").write_text(json.dumps({"configs": entries}))


def test_finds_what_was_measured_on_this_device_for_this_shape(folder):
  write(folder, entry(), entry(dtype="float32", config=dataclasses.asdict(dataclasses.replace(MEASURED, chunk=16))))
  with on(DEVICE):
    assert lookup() == lookup(dtype="float16") == MEASURED
    assert lookup(dtype="float32").chunk == 16
    assert lookup(op="linear_attention") is lookup(gate="none") is lookup(K=64) is lookup(V=32) is None
  with on("NVIDIA A100-SXM4-80GB"):
    assert lookup() is None
  assert lookup() is None  # the host of the tests has no GPU
  assert tuned.listed("gla", DEVICE) == [
      (gate, 128, 64, dtype) for dtype in ("bfloat16", "float32") for gate in ("channel", "token")]
  assert tuned.listed("linear_attention", DEVICE) == tuned.listed("gla", "NVIDIA A100-SXM4-80GB") == []


def test_heads_that_are_not_listed_take_the_nearest_wider_ones(folder):
  wide, wider = (dataclasses.asdict(dataclasses.replace(MEASURED, chunk=chunk)) for chunk in (32, 16))
  write(folder, entry(), entry(K=128, V=96, config=wide), entry(K=256, config=wider))
  with on(DEVICE):
    assert [lookup(K=K).chunk for K in (65, 96, 128, 129, 192)] == [64, 64, 64, 16, 16]
    assert [lookup(V=V).chunk for V in (33, 64, 65, 96)] == [64, 64, 32, 32]
    # Padding doubles no width, so these take the heuristic's answer.
    assert lookup(K=64) is lookup(K=257) is lookup(V=32) is lookup(V=97) is lookup(K=96, gate="none") is None


@pytest.mark.parametrize("text", ["", "[]", '{"configs": 3}', '{"configs": [{"op": "gla"}]}'])
def test_broken_file(folder, text):
  (folder / "nvidia_h100_80gb_hbm3.json").write_text(text)
  with on(DEVICE), pytest.raises(ValueError, match=r"nvidia_h100_80gb_hbm3.json: must be JSON with 'configs'"):
    lookup()


def test_entry_twice(folder):
  write(folder, entry(), entry())
  with on(DEVICE), pytest.raises(ValueError, match="hbm3.json: lists an op, gate, K, V and dtype twice"):
    lookup()


@pytest.mark.parametrize("config, rule", [
    ({"chunk": 64}, "must have exactly the fields chunk, forward, backward"),
    ({"chunk": 64, "forward": {"block": 64}, "backward": None, "more": 1}, "must have exactly the fields"),
    ({"chunk": 64, "forward": {"width": 64}, "backward": None}, "must hold integers, tiles"),
    (3, "must have exactly the fields"),
])
def test_entry_of_other_kernels(folder, config, rule):
  write(folder, entry(config=config))
  with on(DEVICE), pytest.raises(ValueError, match=f"hbm3.json: gla channel 128x64 bfloat16: config=.* {rule}"):
    lookup()


@pytest.mark.parametrize("device, name", [
    (DEVICE, "nvidia_h100_80gb_hbm3"), ("NVIDIA A100-SXM4-80GB", "nvidia_a100_sxm4_80gb"),
    ("NVIDIA GeForce RTX 4090", "nvidia_geforce_rtx_4090"),
])
def test_slug(device, name):
  assert tuned.slug(device) == name


@pytest.mark.parametrize("device", ["NVIDIA H200", "NVIDIA H100 NVL", "NVIDIA GH200 480GB"])
def test_device_with_the_same_multiprocessors_takes_the_measured_ones_file(folder, device):
  write(folder, entry())
  with on(device):
    assert lookup() == MEASURED
    other = dataclasses.replace(MEASURED, chunk=32)
    (folder / f"{tuned.slug(device)}.json").write_text(
        json.dumps({"configs": [entry(config=dataclasses.asdict(other))]}))
    assert lookup() == other
  with on("NVIDIA H20"):
    assert lookup() is None
