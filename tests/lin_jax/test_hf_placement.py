"""Parameters on their way from the files to a mesh: what is read, what the host holds, and where the shards end."""

import sys
import tracemalloc

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from lin_jax import hf
from lin_jax.checkpoint import load_model, save_model
from lin_jax.config import MeshConfig, ModelConfig, TrainConfig
from lin_jax.evaluate import evaluate
from lin_jax.generate import generate
from lin_jax.hf import placement
from lin_jax.hf.files import Tensors
from lin_jax.hf.layout import Interleaved, Layout, plan
from lin_jax.mixers.attention import AttentionConfig
from lin_jax.model import abstract_model
from lin_jax.sharding import make_mesh, param_shardings
from running import meshes
from tests.lin_jax.test_hf import FIXTURES

CONFIG = ModelConfig(mixer=AttentionConfig(heads=4, kv_heads=2), vocab_size=8192, width=256, depth=16, mlp_width=512,
                     dtype="float32")
LARGEST = 4 * CONFIG.vocab_size * CONFIG.width


def random_model(config):
  random = np.random.default_rng(0)
  return jax.tree.map(lambda x: random.standard_normal(x.shape).astype(x.dtype), abstract_model(config))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A model in several files of 16-bit floats, which is many times as large as its largest tensor."""
  path = tmp_path_factory.mktemp("hub") / "model"
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(hf, "FILE_BYTES", 2 * LARGEST)
    hf.save(path, CONFIG, random_model(CONFIG))
  for file in path.glob("*.safetensors"):
    save_file({name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in load_file(file).items()}, file)
  return path


@pytest.fixture(scope="module")
def mesh():
  return make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))


def same(model, other):
  jax.tree.map(np.testing.assert_array_equal, nnx.state(model, nnx.Param), nnx.state(other, nnx.Param))


def on_another_device(array, device, put=placement._put):
  """Places a copy. A CPU device may take over the host's array instead, and lets go of it only in a later call."""
  references = sys.getrefcount(array)
  copy = jax.block_until_ready(put(array, device).copy())
  while sys.getrefcount(array) > references:
    put(np.zeros(1), device)
  return copy


def test_the_host_holds_about_the_largest_tensor(folder, mesh, monkeypatch):
  monkeypatch.setattr(placement, "_put", on_another_device)
  assert len(list(folder.glob("model-*-of-*.safetensors"))) > 2
  assert sum(file.stat().st_size for file in folder.iterdir()) > 1.5 * LARGEST  # in float32 more than 3
  hf.load(folder, mesh)  # so that only the parameters are counted below
  for target in (mesh, None):
    tracemalloc.start()
    model = hf.load(folder, target)[1]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # A tensor in float32, its half as large form in the file, and the index of the tensors.
    assert LARGEST / 8 < peak < 1.6 * LARGEST, (target, peak / LARGEST)
  assert max(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))) > LARGEST / 2  # a stack of layers


def test_every_shard_is_read_once_and_placed_as_in_training(folder, mesh, monkeypatch):
  read, sizes = Tensors.read, []

  def counted(*args):
    sizes.append((part := read(*args)).nbytes)
    return part

  monkeypatch.setattr(Tensors, "read", counted)
  model = hf.load(folder, mesh)[1]
  bytes_stored = sum(leaf.nbytes // 2 for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
  assert sum(sizes) == bytes_stored and max(sizes) == LARGEST // 2 // 4
  expected = param_shardings(nnx.state(abstract_model(CONFIG), nnx.Param), mesh)
  placed = jax.tree.map(lambda leaf, at: leaf.sharding.is_equivalent_to(at, leaf.ndim),
                        nnx.state(model, nnx.Param), expected)
  assert all(jax.tree.leaves(placed))
  same(model, hf.load(folder)[1])


@pytest.mark.parametrize("name", ["qwen3_5_text", "olmo_hybrid", "mamba2_transformers", "hgrn2_window"])
def test_shards_of_parameters_that_share_tensors_are_found(name, mesh):
  same(hf.load(FIXTURES / name, mesh)[1], hf.load(FIXTURES / name)[1])


def test_whole_parameters_are_read_in_parts_under_a_mesh_in_use(folder):
  mesh = make_mesh(MeshConfig(data=8))
  with jax.set_mesh(mesh):
    model = hf.load(folder, mesh)[1]
  assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
  same(model, hf.load(folder)[1])


def test_a_run_is_evaluated_and_generates_on_a_mesh(tmp_path):
  config = ModelConfig(mixer=AttentionConfig(heads=2), vocab_size=16, width=16, depth=1, mlp_width=8, dtype="float32")
  save_model(tmp_path / "run", TrainConfig(model=config), random_model(config))
  prompt = np.random.default_rng(1).integers(0, 16, (1, 8))
  batch = {"tokens": prompt, "targets": prompt, "mask": np.ones(prompt.shape, np.float32),
           "segment_ids": np.zeros(prompt.shape, np.int32)}
  results, shapes = [], []
  for value in ("", "fsdp=4,tensor=2", "fsdp=2,context=4"):
    with meshes.using(value) as mesh:
      model = load_model(tmp_path / "run", mesh=mesh)[1]
      results.append((evaluate(model, [batch])["loss"], generate(model, prompt, 6, temperature=0.0)))
      shapes.append(model.embedding[...].sharding.shard_shape((16, 16)))
  assert shapes == [(16, 16), (8, 4), (16, 8)]
  (loss, tokens), *on_meshes = results
  for mesh_loss, mesh_tokens in on_meshes:
    np.testing.assert_array_equal(tokens, mesh_tokens)
    assert abs(loss - mesh_loss) < 1e-5


@pytest.mark.parametrize("value, message", [("1,8", "--mesh=1,8: must be sizes of different axes"),
                                            ("fsdp=0", "must be sizes"), ("fsdp=2,fsdp=4", "of different axes"),
                                            ("rows=8", "of data, fsdp, context, tensor"),
                                            ("fsdp=3", "does not fit 8 devices")])
def test_wrong_meshes_are_refused(value, message):
  with pytest.raises(ValueError, match=message), meshes.using(value):
    pass


def rows(names, outputs, stored=None):
  """The rows of each parameter of one layer, whose kernels have so many `outputs`."""
  config = ModelConfig(mixer=AttentionConfig(heads=1), depth=1)
  shapes = {f"runs.0.0.{name}": (1, 3, size) for name, size in outputs.items()}
  made = plan(Layout({}, [names]), config, shapes, stored)
  return {name: [piece[:3] for piece in pieces] for (name, _), pieces in made.by_parameter().items()}, made.shapes


def test_parameters_that_share_tensors_find_their_rows():
  kernels = ("q.kernel", "k.kernel")
  found, shapes = rows({kernels: "qk"}, dict(zip(kernels, (4, 2), strict=True)))
  assert found == {"runs.0.0.q.kernel": [("qk", 0, 4)], "runs.0.0.k.kernel": [("qk", 4, 6)]}
  assert shapes == {"qk": (6, 3)}

  found, _ = rows({Interleaved(kernels, 2): "qk"}, dict.fromkeys(kernels, 4))
  assert found == {"runs.0.0.q.kernel": [("qk", 0, 2), ("qk", 4, 6)],
                   "runs.0.0.k.kernel": [("qk", 2, 4), ("qk", 6, 8)]}


def test_parameters_that_are_cut_at_other_rows_than_tensors_find_their_rows():
  kernels = ("q.kernel", "k.kernel")
  found, shapes = rows({kernels: ("a", "b")}, dict(zip(kernels, (4, 2), strict=True)))
  assert found == {"runs.0.0.q.kernel": [("a", 0, 3), ("b", 0, 1)], "runs.0.0.k.kernel": [("b", 1, 3)]}
  assert shapes == {"a": (3, 3), "b": (3, 3)}
  # The same rows where a file has them in tensors of other lengths.
  found, shapes = rows({kernels: ("a", "b")}, dict(zip(kernels, (4, 2), strict=True)), {"a": (1, 3), "b": (5, 3)})
  assert found == {"runs.0.0.q.kernel": [("a", 0, 1), ("b", 0, 3)], "runs.0.0.k.kernel": [("b", 3, 5)]}
  assert shapes == {"a": (1, 3), "b": (5, 3)}
