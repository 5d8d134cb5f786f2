"""Every op over heads with every form of its decay: implementations, inputs, and results under a transformation."""

import functools

import pytest

import kernels
from tests.close import assert_close, tolerance
from tests.kernels.cases import Case, make_inputs, results

# Ops over heads of queries, keys and values; selective_scan has tests of its own.
FORMS = [("gla", "channel"), ("linear_attention", "token"), ("linear_attention", "constant"),
         ("linear_attention", "none"), ("delta_rule", "channel"), ("delta_rule", "token"), ("delta_rule", "none")]
CHUNKED = {op: functools.partial(getattr(kernels, op), implementation="xla_chunked") for op, _ in FORMS}
every_form = pytest.mark.parametrize("op, decay", FORMS)
# For transformations, which depend on the op's own derivative and on the axes of its decay, but not on both together:
# every op once, and every form of a decay.
few_forms = pytest.mark.parametrize("op, decay", [
    ("gla", "channel"), ("linear_attention", "constant"), ("linear_attention", "none"), ("delta_rule", "token"),
    ("delta_rule", "channel")])
# The forms in which every token has gates of its own.
every_gate = pytest.mark.parametrize("op, decay", [form for form in FORMS if form[1] in ("channel", "token")])


@functools.cache
def implementations(op):
  """The op under every implementation, by name; always the same objects, so that compiled programs serve again."""
  others = {name: functools.partial(getattr(kernels, op), implementation=name)
            for name in ("reference", "pallas_triton")}
  return {"xla_chunked": CHUNKED[op]} | others


@functools.cache
def inputs(op, decay, **fields):
  beta = {"beta": "double"} if op == "delta_rule" else {}
  return make_inputs(Case(**dict(B=4, T=50, H=2, K=8, V=12, decay=decay) | beta | fields))


@functools.cache
def plain(op, decay):
  return transformed(CHUNKED[op], op, decay)


def transformed(fn, op, decay):
  """Results of an op that went through a transformation."""
  return results(fn, inputs(op, decay).arrays, None, inputs(op, decay).cotangents)


def changed(op, decay, **arrays):
  """Results of the op with other arrays in the place of some."""
  x = inputs(op, decay)
  return results(CHUNKED[op], x.arrays | arrays, None, x.cotangents)


def assert_equal_results(actual, expected):
  assert actual.keys() == expected.keys()
  for name, x in expected.items():
    assert_close(name, actual[name], x, tolerance(name, "float32"))
