"""Keeps non-finite values in their segment, around implementations that multiply by a reset instead of selecting by it.

A reset is a decay of 0, and 0 times NaN or infinity is NaN. A chunk's matrix products multiply by 0 also where a pair
of tokens has no weight, because the two lie in different segments or in the wrong order. Here an implementation gets
finite numbers only. Afterwards, everything that a non-finite number would have reached in its segment becomes NaN:

  forward   the outputs from the first token that writes a non-finite number into the state, the output of a token that
            reads the state with one, and the final state if the last segment has one in its state
  backward  the gradients of these tokens, and the gradients of all tokens up to the last one whose cotangent is not
            finite, or is not zero although its output is NaN

Finite numbers give the same results, bit for bit. Where the compiler does not fuse this with the code around the op,
the forward pass reads the inputs up to two more times and writes them once. The backward pass does the same with the
output's cotangent, and reads and writes the gradients once. For 16-bit inputs, K = V = 128 and a gate per channel, that
is 3840 bytes per token and head forward and 3328 backward.

A state that overflows float32 although all inputs are finite is not contained.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from kernels import chunks


def contain(run: Callable, starts, tokens, initial_state, shared=(), *, lead: int):
  """`run(tokens, initial_state, shared)`, an output and a final state, with non-finite values kept in their segments.

  Args:
    starts: `[B, T]`, true where a segment starts; the first token's entry has no effect. With None there is nothing to
      contain, and the arrays go to `run` as they are.
    tokens: arrays `[B, T, ...]`, of which the first reads the state and the others write it. Their third axis may be
      key heads, each for several consecutive heads of the state.
    shared: arrays that all tokens share; their gradients are NaN when the gradient of any token is.
    lead: how many leading axes of `tokens`, batch and time included, have a state of their own.
  """
  if starts is None:
    return run(tokens, initial_state, shared)
  return _contained(run, lead, starts, tuple(tokens), initial_state, tuple(shared))


def _contained(run, lead, *arguments):
  function = jax.custom_vjp(lambda *arguments: _forward(run, lead, *arguments)[0])
  function.defvjp(lambda *arguments: _forward_and_pullback(run, lead, *arguments),
                  lambda *arguments: _backward(lead, *arguments))
  return function(*arguments)


def _forward(run, lead, starts, tokens, initial_state, shared):
  (tokens, initial_state), flags = _clean(lead, starts, tokens, initial_state)
  return _marked(run(tokens, initial_state, shared), flags), flags


def _forward_and_pullback(run, lead, starts, tokens, initial_state, shared):
  (tokens, initial_state), flags = _clean(lead, starts, tokens, initial_state)
  results, pullback = jax.vjp(run, tokens, initial_state, shared)
  return _marked(results, flags), (pullback, flags, starts)


def _clean(lead, starts, tokens, initial_state):
  """Finite arrays, the tokens that find or make the state non-finite, and the outputs that are lost, `[B, T, ...]`."""
  reads, *writes = (_of_heads(_any(~jnp.isfinite(x), lead), initial_state) for x in tokens)
  written = functools.reduce(jnp.logical_or, writes)
  entry = _any(~jnp.isfinite(initial_state), lead - 1)
  state = _from(written.at[:, 0].set(written[:, 0] | entry), starts)
  return jax.tree.map(lambda x: _select(jnp.isfinite(x), x, 0), (tokens, initial_state)), (state, state | reads)


def _marked(results, flags):
  (output, final_state), (state, lost) = results, flags
  return _select(~lost, output, jnp.nan), _select(~state[:, -1], final_state, jnp.nan)


def _backward(lead, residuals, cotangents):
  pullback, (state, lost), starts = residuals
  usable, flags = [], []
  for x, gone, axes in zip(cotangents, (lost, state[:, -1]), (lead, lead - 1), strict=True):
    gone = _like(gone, x)
    usable.append(_select(jnp.isfinite(x) & ~gone, x, 0))
    flags.append(_any(jnp.where(gone, x != 0, ~jnp.isfinite(x)), axes))
  own, end = flags
  reached = state | _until(own.at[:, -1].set(own[:, -1] | end), starts)
  tokens, initial_state, shared = pullback(tuple(usable))
  tokens = [_select(~_of_key_heads(reached if i else state | own, x), x, jnp.nan) for i, x in enumerate(tokens)]
  everywhere = ~jnp.any(reached)
  return (None, tuple(tokens), _select(~reached[:, 0], initial_state, jnp.nan),
          jax.tree.map(lambda x: jnp.where(everywhere, x, jnp.nan), shared))


def _from(flags, starts):
  """The tokens at and after a flag in its segment."""
  index = _index(starts)
  start = jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
  last = jax.lax.cummax(jnp.where(flags, _like(index, flags), -1), axis=1)
  return last >= _like(start, last)


def _until(flags, starts):
  """The tokens at and before a flag in its segment."""
  T = starts.shape[1]
  index = _index(starts)
  ends = jnp.pad(starts[:, 1:], ((0, 0), (0, 1)))
  end = jax.lax.cummin(jnp.where(ends, index, T - 1), axis=1, reverse=True)
  following = jax.lax.cummin(jnp.where(flags, _like(index, flags), T), axis=1, reverse=True)
  return following <= _like(end, following)


def _of_heads(flags, state):
  """Flags `[B, T]` as they are, and flags of key heads `[B, T, G]` for each head of the state `[B, H, ...]`."""
  return flags if flags.ndim == 2 else chunks.repeat_heads(flags[..., None], state.shape[1])[..., 0]


def _of_key_heads(flags, x):
  """Flags `[B, T]` as they are, and whether any head of a group is flagged, for the key heads of `x`."""
  return flags if flags.ndim == 2 else jnp.any(flags.reshape(*x.shape[:3], -1), axis=3)


def _index(starts):
  return jax.lax.broadcasted_iota(jnp.int32, starts.shape, 1)


def _any(x, axes):
  """Whether any entry is true behind the first `axes`."""
  return jnp.any(x, axis=tuple(range(axes, x.ndim)))


def _like(x, other):
  """`x` with as many axes as `other`."""
  return x.reshape(*x.shape, *(1 for _ in other.shape[x.ndim:]))


def _select(keep, x, other):
  return jnp.where(_like(keep, x), x, jnp.asarray(other, x.dtype))
