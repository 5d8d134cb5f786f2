"""The base of mixers whose op keeps a matrix per head: projections, the op, a head norm with optional gate, output.

A subclass builds its layers, names in `layout` the arrays that its op takes, and defines three methods:
  project(x[B,T,D], state, segment_ids) -> (arrays, kept)    the op's arrays, beginning with q, k, v, and the part of
                                                             the state besides the memory
  mix(*arrays, **options) -> (o[B,T,H,V], memory)            the op, with its usual options
  mix_step(memory, *arrays) -> (memory, o[B,H,V])            the op's step on the arrays of one token, without `scale`
Mixers that do something else after the op override `finish`. `B` batch, `T` time, `D` width, `H` heads, `K` and `V` key
and value channels per head.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, Int

from lin_jax.layers import Linear, ShortConvolution, convolve
from lin_jax.sharding import map_over_heads


@dataclasses.dataclass(kw_only=True)
class OpConfig:
  """The options with which a mixer calls its op."""

  chunk_size: int = 0  # tokens per chunk of the parallel form; 0 lets the op choose
  implementation: str = ""  # of the op; "" means the first that supports the inputs


class MatrixMemory(nnx.Module):
  """A mixer without layers. Its state is the float32 memory and the part that `project` keeps of earlier tokens."""

  layout: str  # axes of the op's arrays, in the letters of `map_over_heads`
  scale: float | None = None  # of the queries; None means 1 / sqrt(K)
  flops_per_entry = 4  # per entry of the memory and token: two for the write and two for the read
  gate: Linear | None = None

  def __init__(self, config: OpConfig, memory_shape: tuple[int, int, int]):
    self.memory_shape = memory_shape
    self.chunk_size = config.chunk_size or None
    self.implementation = config.implementation or None

  def __call__(self, x: Float[Array, "B T D"], state: dict | None = None,
               segment_ids: Int[Array, "B T"] | None = None) -> tuple[Float[Array, "B T D"], dict | None]:
    arrays, kept = self.project(x, state, segment_ids)

    def mix(memory, segment_ids, *arrays):
      return self.mix(*arrays, scale=self.scale, initial_state=memory, segment_ids=segment_ids,
                      chunk_size=self.chunk_size, implementation=self.implementation)

    mix = map_over_heads(mix, f"bhkv,bt,{self.layout}->bthv,bhkv")
    o, memory = mix(None if state is None else state["memory"], segment_ids, *arrays)
    y = self.finish(x, checkpoint_name(o, "mixer_output"), arrays[2])
    return y, None if state is None else {"memory": memory, **kept}

  def step(self, x: Float[Array, "B D"], state: dict) -> tuple[Float[Array, "B D"], dict]:
    x = x[:, None]
    arrays, kept = self.project(x, state, None)
    token = (a if a is None or "t" not in axes else a[:, 0]
             for a, axes in zip(arrays, self.layout.split(","), strict=True))
    memory, o = self.mix_step(state["memory"], *token)
    q, _, v, *_ = arrays
    o = (o * (q.shape[-1] ** -0.5 if self.scale is None else self.scale)).astype(v.dtype)
    return self.finish(x, o[:, None], v)[:, 0], {"memory": memory, **kept}

  def init_state(self, batch: int, max_length: int) -> dict:
    """An empty memory and empty convolutions. They are the same for any `max_length`."""
    return {"memory": self.empty_memory(batch), "inputs": [conv.init_state(batch) for conv in self.convolutions]}

  def empty_memory(self, batch: int) -> Float[Array, "B H K V"]:
    return jnp.zeros((batch, *self.memory_shape), jnp.float32)

  def flops_per_token(self, sequence_length: int) -> int:
    """FLOPs of all projections, convolutions and the recurrence. The chunked form's extra products are not counted."""
    layers = [layer for layer in (*vars(self).values(), *getattr(self, "convolutions", ())) if isinstance(
        layer, Linear | ShortConvolution)]
    return sum(layer.flops_per_token() for layer in layers) + self.flops_per_entry * math.prod(self.memory_shape)

  def convolved(self, layers: Sequence[Linear], x: Float[Array, "B T D"], state: dict | None,
                segment_ids: Int[Array, "B T"] | None, silu: Sequence[bool]) -> tuple[list[Array], dict[str, Any]]:
    """The projections of x by `layers`, each followed by its convolution if there is one and by SiLU where `silu`, and
    the convolutions' states.
    """
    states = None if state is None else state["inputs"]
    outputs, inputs = convolve(self.convolutions, [layer(x) for layer in layers], states, segment_ids, silu)
    return outputs, {"inputs": inputs}

  def finish(self, x: Float[Array, "B T D"], o: Float[Array, "B T H V"], v: Array) -> Float[Array, "B T D"]:
    """Head norm, swish output gate if there is one, and output projection. A mixer with a skip connection reads v."""
    return self.output(self.norm.gated(o, None if self.gate is None else self.gate(x)))


def short_convolutions(channels: Sequence[int], taps: int, *, dtype, rngs: nnx.Rngs) -> nnx.List:
  """One convolution for each number of `channels`, sharded over devices as heads are, or none if `taps` is 0."""
  return nnx.List([ShortConvolution(size, taps, axis="heads", dtype=dtype, rngs=rngs) for size in channels if taps])


def by_heads(x: Float[Array, "B T C"], heads: int) -> Float[Array, "B T H _"]:
  """Reshapes the channels of x into those of `heads` heads."""
  return x.reshape(*x.shape[:2], heads, -1)
