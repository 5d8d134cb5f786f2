"""Ops whose tokens are split over devices: outputs, states and every gradient equal to one device's."""

import collections
import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from kernel_tuning import compiled
from lin_jax import context, sharding
from lin_jax.config import MeshConfig
from tests.close import assert_close

T, K, V = 256, 8, 4
SIZES = dict(b=2, t=T, h=4, g=2, k=K, v=V, n=3)
DOCUMENTS = [1, 2, 15, 64, 65, 109], [32, 160, 64]  # of two rows; the second row's begin where parts of 32 tokens do
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

LAYOUTS = {
    "gla": "btgk,btgk,bthv,btgk", "none": "btgk,btgk,bthv", "constant": "btgk,btgk,bthv,h",
    "token": "btgk,btgk,bthv,bth", "delta none": "btgk,btgk,bthv,bth", "delta token": "btgk,btgk,bthv,bth,bth",
    "delta channel": "btgk,btgk,bthv,bth,bthk", "scan": "bth,bth,hn,btn,btn"}
STATES = {"scan": "bhn"}
OUTPUTS = {"scan": "bth"}


def op_of(form):
  if form.startswith("delta"):
    return functools.partial(context.delta_rule, normalize_qk=True)
  return {"gla": context.gla, "scan": context.selective_scan}.get(form, context.linear_attention)


def segment_ids():
  return np.stack([np.repeat(np.arange(len(row)), row) for row in DOCUMENTS]).astype(np.int32)


def axes_of(form):
  """The axes of the op's arrays, of its initial state, and of the cotangents of the output and the final state."""
  output, state = OUTPUTS.get(form, "bthv"), STATES.get(form, "bhkv")
  return LAYOUTS[form].split(","), [state], [output, state]


def arrays(form):
  """The op's arrays, an initial state, and cotangents of the output and the final state."""
  rng = np.random.default_rng(0)
  x, (state,), cotangents = ([rng.standard_normal([SIZES[axis] for axis in axes], np.float32) for axes in group]
                             for group in axes_of(form))
  if form == "scan":
    x[1], x[2] = np.log1p(np.exp(x[1] - 3)), -np.exp(x[2])
  if form.startswith("delta"):
    x[3] = 2 / (1 + np.exp(-x[3]))
  if form in ("gla", "constant", "token", "delta token", "delta channel"):
    x[-1] = -np.log1p(np.exp(-x[-1])) / 8
  return x, state, tuple(cotangents)


def results(form, implementation, ids, x, state, cotangents):
  """The output and the final state, and the gradients of all arrays and of the initial state."""
  _, (initial,), (output, final) = axes_of(form)
  layouts = f"{initial},bt,{LAYOUTS[form]}->{output},{final}"

  def run(state, ids, *x):
    return op_of(form)(*x, initial_state=state, segment_ids=ids, implementation=implementation)

  op = sharding.map_over_heads(run, layouts)
  found, pullback = jax.vjp(lambda state, *x: op(state, ids, *x), state, *x)
  return found, pullback(cotangents)


@functools.cache
def on_one_device(form):
  """The function from segment ids and arrays to the results by the op's definition."""
  return jit(functools.partial(results, form, "reference"))


def on_parts(form, parts, implementation):
  mesh = sharding.make_mesh(MeshConfig(data=1, context=parts), jax.devices()[:parts])
  run = jit(functools.partial(results, form, implementation))

  def call(*args):
    with jax.set_mesh(mesh):
      return run(*args)

  return call


def assert_equal(actual, expected):
  for i, (x, y) in enumerate(zip(*map(jax.tree.leaves, (actual, expected)), strict=True)):
    assert_close(f"result {i}", x, y, 1e-5)


@pytest.mark.parametrize("form", LAYOUTS)
@pytest.mark.parametrize("parts", [2, 4, 8])
def test_parts_of_packed_rows_equal_one_device(form, parts):
  run, ids, (x, *rest) = on_parts(form, parts, "reference"), segment_ids(), arrays(form)
  assert_equal(run(ids, x, *rest), on_one_device(form)(ids, x, *rest))
  # A document that lies on three of eight parts, begins inside of one and ends inside of another.
  poisoned, value = (ids[0] == 4), 0 if form == "scan" else 2
  x[value][0, 100] = np.nan
  (output, state), gradients = jax.device_get(run(ids, x, *rest))
  by_token = [output, *(g for g, axes in zip(gradients[1:], LAYOUTS[form].split(","), strict=True) if "bt" in axes)]
  assert np.isnan(output[0, 100:147]).any() and np.isfinite(state).all() and np.isfinite(gradients[0]).all()
  assert all(np.isfinite(a[0, ~poisoned]).all() and np.isfinite(a[1]).all() for a in by_token)


@pytest.mark.parametrize("form, parts", [("gla", 4), ("delta token", 2)])
def test_the_implementation_that_dispatch_chooses_runs_on_parts(form, parts):
  whole, x = np.zeros((2, T), np.int32), arrays(form)
  assert_equal(on_parts(form, parts, None)(None, *x), on_one_device(form)(whole, *x))


@pytest.mark.parametrize("form", LAYOUTS)
def test_kernels_of_a_part_are_those_of_a_row_as_long_as_it(form):
  """Lowered for CUDA on a mesh of GPUs, with one all-gather forward and one reduce-scatter backward.

  The launches equal an op's without a mesh, so parts bring no program of their own to compile. The delta rule has K
  more value channels, and the selective scan launches each kernel twice.
  """
  gpu = AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu")
  part = dict(SIZES, b=64, t=T // 2, v=V + K * form.startswith("delta"))
  with use_abstract_mesh(AbstractMesh((), (), abstract_device=gpu)):
    expected = traced(form, part).jaxpr
  mesh = AbstractMesh((1, 1, 2, 1), sharding.AXES, axis_types=(AxisType.Auto,) * 4, abstract_device=gpu)
  with use_abstract_mesh(mesh):
    found = traced(form, dict(SIZES, b=64))
    text = found.lower(lowering_platforms=("cuda",)).as_text()
  calls, wanted = (collections.Counter(compiled.launched(x.jaxpr)) for x in (found.jaxpr, expected))
  assert wanted and calls == collections.Counter({call: n * (1 + (form == "scan")) for call, n in wanted.items()})
  assert [text.count(f'"stablehlo.{kind}"') for kind in ("all_gather", "reduce_scatter")] == [1, 1]


def traced(form, sizes):
  """The program of the op and its gradients by its GPU kernels, on arrays of these sizes."""
  x, (state,), cotangents = ([jax.ShapeDtypeStruct([sizes[axis] for axis in axes], jnp.float32) for axes in group]
                             for group in axes_of(form))
  run = jax.jit(functools.partial(results, form, "pallas_triton", None))
  return run.trace(x, state, tuple(cotangents))


@pytest.mark.parametrize("form", LAYOUTS)
def test_no_cumulative_sum_takes_padded_tokens(form):
  """XLA joins the padding with a reversed sum, which then takes a quadratic time on a GPU.

  At 131,072 tokens on two GPUs a step of GLA with 1.3B parameters did not end in 90 s.
  """
  mesh = AbstractMesh((1, 1, 2, 1), sharding.AXES, axis_types=(AxisType.Auto,) * 4)
  with use_abstract_mesh(mesh):
    found = cumulative(traced(form, dict(SIZES, b=64)).jaxpr)
  assert found or form not in ("gla", "constant", "token")  # the ops whose decays a part sums
  assert not any(operand in ("pad", "_pad", "concatenate") for operand in found), found


def cumulative(jaxpr):
  """What makes the operands of a program's reversed cumulative reductions."""
  found, makers = [], {}
  for eqn in jaxpr.eqns:
    makers |= {id(x): eqn.params.get("name", eqn.primitive.name) for x in eqn.outvars}
    if eqn.primitive.name.startswith("cum") and eqn.params["reverse"]:
      found.append(makers.get(id(eqn.invars[0]), "argument"))
    if eqn.primitive.name != "pallas_call":
      for x in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
        x = getattr(x, "jaxpr", x)
        found += cumulative(x) if hasattr(x, "eqns") else []
  return found


def test_a_part_shorter_than_a_convolution_is_refused():
  op = sharding.map_over_heads(context.short_convolution, "bth,kh->bth,bkh")
  mesh = sharding.make_mesh(MeshConfig(data=1, context=4), jax.devices()[:4])
  with jax.set_mesh(mesh), pytest.raises(ValueError, match="part of 2 tokens: must have the 3 tokens that the next"):
    op(jnp.ones((1, 8, 4)), jnp.ones((4, 4)))


def test_layers_take_their_ops_from_context():
  """An op of `kernels` would take a part of a sequence for the whole of it."""
  files = [path for path in pathlib.Path(context.__file__).parent.rglob("*.py") if path.stem not in ("context", "ops")]
  imported = {path.name: set(re.findall(r"\w+", names)) & set(context.__all__) for path in files
              for names in re.findall(r"^from kernels import (.*)", path.read_text(), flags=re.MULTILINE)}
  assert len(imported) > 3 and not any(imported.values()), imported
