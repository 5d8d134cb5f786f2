"""Layers with the fused kernels, interpreted, on a mesh of eight devices: equal to jnp on one."""

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from kernels import dispatch
from lin_jax import sharding
from lin_jax.config import MeshConfig
from lin_jax.layers import RMSNorm, ShortConvolution, SimpleRMSNorm, SwiGLU
from lin_jax.mixers.mamba2 import Mamba2, Mamba2Config
from tests.close import assert_close

B, T = 4, 16
RNGS = functools.partial(nnx.Rngs, 0)


def normal(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape)


def convolution():
  ids = jnp.broadcast_to(jnp.arange(T)[None] // 7, (B, T))
  layer = ShortConvolution(32, 4, axis="heads", dtype=jnp.float32, rngs=RNGS())
  return layer, (normal(0, B, T, 32), normal(1, B, 3, 32)), lambda layer, x, past: layer(x, past, ids, silu=True)


CASES = {
    "head norm": lambda: (RMSNorm(16, eps=1e-6, rngs=RNGS()), (normal(0, B, T, 2, 16), normal(1, B, T, 32)),
                          lambda norm, o, gate: norm.gated(o, gate)),
    "head norm without a gate": lambda: (RMSNorm(16, eps=1e-6, rngs=RNGS()), (normal(0, B, T, 2, 16),),
                                         lambda norm, o: norm.gated(o)),
    "norm over all heads": lambda: (SimpleRMSNorm(eps=1e-6), (normal(0, B, T, 32), normal(1, B, T, 32)),
                                    lambda norm, o, gate: norm.gated(o, gate, "identity")),
    "skip, gate and norm": lambda: (
        Mamba2(Mamba2Config(heads=4, state_size=8), width=16, norm_eps=1e-6, dtype=jnp.float32, rngs=RNGS()),
        (normal(0, B, T, 16), normal(1, B, T, 4, 8), normal(2, B, T, 4, 8)),
        lambda mixer, x, o, v: mixer.finish(x, o, v)),
    "convolution": convolution,
    "swiglu": lambda: (SwiGLU(16, 64, dtype=jnp.float32, rngs=RNGS()), (normal(0, B, T, 16),),
                       lambda mlp, x: mlp(x)),
}


@pytest.mark.parametrize("name", CASES)
def test_kernels_on_eight_devices_equal_jnp_on_one(name, monkeypatch):
  layer, arrays, call = CASES[name]()

  def results(layer, *arrays):
    y, pull = jax.vjp(call, layer, *arrays)
    return y, pull(jax.tree.map(jnp.cos, y))

  expected = jax.jit(results)(layer, *arrays)
  monkeypatch.setitem(dispatch.PLATFORMS, "pallas_triton", ("cuda", "cpu"))
  jax.clear_caches()
  for tensor in (1, 2):
    with jax.set_mesh(sharding.make_mesh(MeshConfig(data=2, fsdp=-1, tensor=tensor))):
      traced = jax.jit(results).trace(layer, *arrays)
      actual = traced.lower().compile()(layer, *arrays)
    # A norm over heads that are split over devices stays with the compiler.
    split = name in ("norm over all heads", "skip, gate and norm") and tensor == 2
    assert ("pallas_call" in str(traced.jaxpr)) == (not split)
    for found, wanted in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
      assert_close(f"{name}, {tensor} parts", found, wanted, 2e-6)
  jax.clear_caches()
