"""The Pallas kernels lower for CUDA on a host without a GPU, each exactly as often as the algorithm needs it."""

import collections
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

import kernels

H100 = AbstractMesh((), (), abstract_device=AbstractDevice("NVIDIA H100", 132, "gpu"))
FORWARD = {"gla_states": 1, "gla_scores": 1, "gla_output": 1}
BACKWARD = {"gla_states": 1, "gla_scores": 1, "gla_dstates": 1, "gla_dscores": 1, "gla_dqkg": 1, "gla_dv": 1}


def kernel_counts(fn, K=64, V=64, dtype="bfloat16"):
  """How often each kernel appears in `fn` lowered for CUDA."""
  array = lambda width, dtype: jax.ShapeDtypeStruct((1, 130, 2, width), dtype)  # noqa: E731
  arguments = array(K, dtype), array(K, dtype), array(V, dtype), array(K, "float32")
  with use_abstract_mesh(H100):
    text = jax.jit(fn).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
  assert "stablehlo.while" not in text, "an interpreted kernel is part of the program"
  return collections.Counter(re.findall(r'name = "(gla_\w+)"', text))


def loss(q, k, v, log_decay):
  output, final_state = kernels.gla(q, k, v, log_decay, implementation="pallas_triton")
  return jnp.sum(jnp.sin(output.astype(jnp.float32))) + jnp.sum(jnp.sin(final_state))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("K, V", [(32, 32), (60, 100), (128, 128), (256, 512)])
def test_every_width_lowers(K, V, dtype):
  counts = kernel_counts(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)), K, V, dtype)
  assert counts == collections.Counter(FORWARD) + collections.Counter(BACKWARD)


def test_forward_alone():
  assert kernel_counts(loss) == FORWARD


def test_remat_repeats_no_kernel_that_only_the_output_needs():
  # The loss needs the output's value, so the backward pass under remat recomputes the forward once for it, and the
  # backward's own states and scores; nothing is computed a third time.
  plain = kernel_counts(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))
  remat = kernel_counts(jax.value_and_grad(jax.checkpoint(loss), argnums=(0, 1, 2, 3)))
  assert remat == plain + collections.Counter(FORWARD)
