"""Kernels in loops of 1 to 24 chunks, where an assembler once lost a product, against the scan and against themselves.

On a GPU: `XLA_PYTHON_CLIENT_PREALLOCATE=false pytest tests/kernels/test_chunk_counts.py -m gpu -n 8 --record=FILE`.
More processes side by side do not leave the scan of 512 value channels its memory.
"""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels
from kernel_tuning import search
from kernels import pieces, tuned
from tests.close import assert_bounds, relative_error
from tests.kernels import cases
from tests.kernels.cases import Case
from tests.kernels.test_lowering import A100
from tests.kernels.test_pallas_triton import BETA, DECAYS, OPS, PALLAS

MOST, PARTS = 24, 4
# Widths of each kind of answer that the heuristics have: narrow and wide keys and values, one tile of each and several.
WIDTHS = {"bfloat16": ((16, 32), (32, 128), (64, 128), (96, 96), (128, 128), (160, 64), (256, 256)),
          "float32": ((16, 32), (64, 64), (128, 128), (256, 256))}
UNOPTIMISED = {"xla_gpu_disable_gpuasm_optimizations": True}


def listed(device):
  """Op, gate, K, V, dtype of everything with a measured configuration, and of the heuristics' classes."""
  found = [(op, *entry) for op in OPS for entry in (tuned.listed(op, device) if device else ())]
  found += [(op, decay, *width, dtype) for op in OPS for decay in DECAYS[op] for dtype in WIDTHS
            for width in WIDTHS[dtype]]
  return list(dict.fromkeys(found))


class Lengths:
  """Inputs of the longest sequence, and the scan's results on its first tokens."""

  def __init__(self, op, decay, K, V, dtype, chunk, most):
    self.op, self.chunk = op, chunk
    case = Case(B=1, T=most * chunk, H=2, K=K, V=V, dtype=dtype, gate="near_zero", decay=decay, beta=BETA.get(op))
    self.inputs = cases.make_inputs(case)

  def cut(self, count, fill=False):
    """The first `count` chunks, or if `fill` the longest sequence with tokens that change nothing behind them."""
    T, arrays, (do, dstate) = count * self.chunk, dict(self.inputs.arrays), self.inputs.cotangents
    gate = arrays["log_decay"]
    if fill and gate is not None and gate.ndim == 1:
      arrays["log_decay"] = jnp.broadcast_to(gate, arrays["v"].shape[:3])
    first = lambda x: x[:, :T] if not fill else jnp.where((np.arange(x.shape[1]) < T).reshape(-1, *[1] * (x.ndim - 2)),
                                                          x, jnp.zeros((), x.dtype))
    cut = {name: x if x is None or x.ndim == 1 or name == "initial_state" else first(x) for name, x in arrays.items()}
    return cut, (first(do), dstate)

  def expected(self, count):
    arrays, cotangents = self.cut(count, fill=True)
    found = cases.expected(cases.Inputs(arrays, None, cotangents))
    for name in found:
      if name not in ("final_state", "dinitial_state"):
        found[name] = found[name][:, :count * self.chunk]
    constant = self.inputs.arrays["log_decay"]
    if constant is not None and constant.ndim == 1:
      found["dlog_decay"] = np.sum(np.asarray(found["dlog_decay"], np.float64), axis=(0, 1))
    return found


def check(op, decay, K, V, dtype, counts, record_property, monkeypatch, compare):
  """Asserts the errors of each length, uncut, and that the assembler without optimisation gives the same, if asked."""
  configs = search.configurations(op, decay)
  config = tuned.lookup(op, configs.Config, gate=decay, K=K, V=V, dtype=dtype) if compare else None
  config = config or configs.heuristic(K, V, jnp.dtype(dtype))
  record_property("config", search.describe(config))
  monkeypatch.setattr(pieces, "count", lambda *_, **__: 1)
  lengths, worst, changed = Lengths(op, decay, K, V, dtype, config.chunk, max(counts)), {}, {}
  for count in counts:
    arrays, cotangents = lengths.cut(count)
    fn = functools.partial(cases.results.__wrapped__, PALLAS[op])
    program = jax.jit(lambda arrays, cotangents, fn=fn: fn(arrays, None, cotangents)).lower(arrays, cotangents)
    found = program.compile()(arrays, cotangents)
    for name, x in lengths.expected(count).items():
      worst[name] = max(worst.get(name, 0.0), relative_error(found[name], x))
    if compare and count in (2, 4, 7, 8, 12, 17):
      for name, x in program.compile(UNOPTIMISED)(arrays, cotangents).items():
        changed[name] = max(changed.get(name, 0.0), relative_error(found[name], x))
  if compare:
    record_property("optimised", {name: float(f"{x:.1e}") for name, x in changed.items()})
  assert_bounds(f"{op} {decay} {K}x{V} {dtype}", dtype, worst, record_property)
  assert max(changed.values(), default=0.0) <= 1e-3, f"the assembler's optimisation changes results: {changed}"


@pytest.mark.gpu
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("op, decay, K, V, dtype", listed(tuned.device_kind()))
def test_every_number_of_chunks(op, decay, K, V, dtype, part, record_property, monkeypatch):
  counts = range(1 + part, MOST + 1, PARTS)
  check(op, decay, K, V, dtype, counts, record_property, monkeypatch, compare=True)


def selective_scan_results(implementation, arrays, cotangents):
  (output, state), vjp = jax.vjp(lambda x: kernels.selective_scan(**x, implementation=implementation), arrays)
  return {"output": output, "final_state": state} | {f"d{name}": x for name, x in vjp(cotangents)[0].items()}


@pytest.mark.gpu
@pytest.mark.parametrize("N, dtype", [(16, "bfloat16"), (16, "float32"), (32, "bfloat16"), (32, "float32")])
def test_every_number_of_blocks_of_the_selective_scan(N, dtype, record_property):
  rng, worst, changed = np.random.default_rng(0), {}, {}
  block = importlib.import_module("kernels.selective_scan.pallas_triton").block_size(N, jnp.dtype(dtype))
  for count in range(1, MOST + 1):
    normal = lambda *shape, T=count * block: jnp.asarray(rng.standard_normal((2, T, *shape)), dtype)
    arrays = {"x": normal(32), "step_size": jnp.abs(normal(32).astype("float32")), "b": normal(N), "c": normal(N),
              "a": -jnp.asarray(rng.random((32, N)), "float32")}
    cotangents = normal(32), jnp.ones((2, 32, N))

    program = jax.jit(functools.partial(selective_scan_results, "pallas_triton")).lower(arrays, cotangents)
    found = program.compile()(arrays, cotangents)
    wide = jax.tree.map(lambda x: x.astype("float32"), (arrays, cotangents))
    for name, x in jax.jit(functools.partial(selective_scan_results, "reference"))(*wide).items():
      worst[name] = max(worst.get(name, 0.0), relative_error(found[name], x))
    for name, x in program.compile(UNOPTIMISED)(arrays, cotangents).items():
      changed[name] = max(changed.get(name, 0.0), relative_error(found[name], x))
  record_property("optimised", {name: float(f"{x:.1e}") for name, x in changed.items()})
  assert_bounds(f"selective_scan {N} {dtype}", dtype, worst, record_property)
  assert max(changed.values()) <= 1e-3


@pytest.mark.parametrize("op, decay", [(op, DECAYS[op][0]) for op in OPS])
def test_interpreted_in_short_loops(op, decay, record_property, monkeypatch):
  check(op, decay, 16, 16, "float32", (1, 3), record_property, monkeypatch, compare=False)


@pytest.mark.parametrize("op, decay", [(op, decay) for op in OPS for decay in DECAYS[op]])
def test_no_kernel_knows_how_many_chunks_there_are(op, decay):
  """The lengths of the loops that a kernel knows are the same for 8 and for 16 chunks, cut or not."""
  def known(T):
    case = Case(B=1, T=T, H=1, K=32, V=32, dtype="bfloat16", decay=decay, beta=BETA.get(op), chunk_size=16)
    inputs = cases.make_inputs(case)
    call = lambda arrays: cases.results.__wrapped__(PALLAS[op], arrays, None, inputs.cotangents, 16)
    with jax.sharding.use_abstract_mesh(A100):
      return sorted(kernel_loops(jax.make_jaxpr(call)(inputs.arrays).jaxpr))

  for uncut, longer in ((128, 192), (512, 1024)):
    assert set(known(uncut)) == set(known(longer))


def kernel_loops(jaxpr, name=None):
  """Kernel and length of each loop of known length in each kernel."""
  for eqn in jaxpr.eqns:
    inside = eqn.params["name"] if eqn.primitive.name == "pallas_call" else name
    if eqn.primitive.name == "scan" and name:
      yield name, eqn.params["length"]
    for x in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
      x = getattr(x, "jaxpr", x)
      if hasattr(x, "eqns"):
        yield from kernel_loops(x, inside)


# Arrays of more than 2^31 elements and 2^32 bytes.
LARGE = {"gla": (2**17 + 128, 128), "linear_attention": (2**17 + 128, 128), "delta_rule": (2**17 + 128, 128)}


@pytest.mark.gpu
@pytest.mark.parametrize("op, decay", [("linear_attention", "token"), ("delta_rule", "token"), ("gla", "channel")])
def test_arrays_beyond_32_bits(op, decay, record_property):
  """The last head of many equals the same head alone, which is compared with the scan."""
  T, H = LARGE[op]
  draw = lambda i, *shape, dtype=jnp.bfloat16: jax.random.normal(jax.random.key(i), shape, dtype)

  @jax.jit
  def inputs():
    q, k, v = (draw(i, 1, T, H, 128) for i in range(3))
    k *= jnp.bfloat16(128**-0.5)
    gate = -0.01 * jnp.abs(draw(3, *(q.shape if decay == "channel" else q.shape[:3]), dtype=jnp.float32))
    beta = {"beta": jnp.full(q.shape[:3], 0.5, jnp.float32)} if op == "delta_rule" else {}
    return {"q": q, "k": k, "v": v, "log_decay": gate} | beta

  arrays = inputs()
  assert arrays["q"].size > 2**31 and arrays["q"].nbytes > 2**32
  both = jax.jit(lambda x: PALLAS[op](**x))
  last = {name: x[:, :, -1:] for name, x in arrays.items()}
  output = both(arrays)[0][:, :, -1:]
  alone = both(last)[0]
  scan = jax.jit(lambda x: getattr(kernels, op)(**x, implementation="reference"))(
      {name: x.astype(jnp.float32) for name, x in last.items()})[0]
  errors = {"output": max(relative_error(alone, scan), relative_error(output, scan))}
  del output, alone
  gradient = jax.jit(jax.grad(lambda x: jnp.sum(PALLAS[op](**x)[0].astype(jnp.float32) * 0.01)))
  wide = {f"d{name}": x[:, :, -1:] for name, x in gradient(arrays).items()}
  for name, x in gradient(last).items():
    errors[f"d{name}"] = relative_error(wide[f"d{name}"], x)
  assert_bounds(f"{op} beyond 32 bits", "bfloat16", errors, record_property)
