"""Keeps non-finite values in their segment, around implementations that multiply by a reset instead of selecting by it.

A reset is a decay of 0, and 0 times NaN or infinity is NaN. A chunk's matrix products multiply by 0 also where a pair
of tokens has no weight, because the two lie in different segments or in the wrong order.

An implementation runs on its inputs as they are, and its own results tell whether they were finite. A state is only
multiplied and added to, so a non-finite number that enters it stays non-finite to the end of the row: one of a key, a
value or an initial state is seen in the final state, and one of a cotangent in the initial state's cotangent. The
inputs that only read the state are looked at themselves, and so are gates, because a kernel compares them with a bound,
which may lose a NaN. Finite inputs thus cost the reading of the queries, of the gates and of a state per row and head,
and a branch in each pass, for which a GPU waits.

If something is not finite, the implementation runs again, on finite numbers only. Afterwards, everything that a
non-finite number would have reached in its segment becomes NaN:

  forward   the outputs from the first token that writes a non-finite number into the state, the output of a token that
            reads the state with one, and the final state if the last segment has one in its state
  backward  the gradients of these tokens, and the gradients of all tokens up to the last one whose cotangent is not
            finite, or is not zero although its output is NaN

All other results are the same as with finite numbers in their place, bit for bit. A state that overflows float32
although all inputs are finite is not contained.

A sum over all segments, such as the loss of a training step, is not finite wherever the number comes from. To get
nothing but such a sum, trace it under `left_out()`: an implementation then runs once, and nothing is looked at. A NaN
of a gate, which a kernel may lose, still shows in the gradient of what the gate was made from.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from kernels import chunks, dispatch
from kernels.derivatives import RESIDUALS

_leaves_out = jax.make_user_context(default_value=False)


def left_out():
  """A context for tracing in which ops let a non-finite number spread over its row, as they do without segment ids.

  JAX keeps what it has traced in this context apart from the rest. Results of finite inputs are the same.
  """
  return _leaves_out(True)


@dataclasses.dataclass(frozen=True)
class Call:
  """An implementation with its options, as a function of arrays.

  It equals another one of the same parts, so that JAX finds the program that it has compiled for that one.
  """

  function: Callable  # of the implementation, the arrays, and the options by name; the same one at each call of an op
  implementation: Callable
  options: tuple[tuple[str, object], ...] = ()

  def __call__(self, *arrays):
    return self.function(self.implementation, *arrays, **dict(self.options))


@dataclasses.dataclass(frozen=True)
class Op:
  """An implementation of an op, and what containing it takes.

  Attributes:
    run: function of `starts`, `tokens`, `initial_state` and `shared` as in `contain`: an output and a final state.
    lead: how many leading axes of `tokens`, batch and time included, have a state of their own.
    gates: which of `tokens` are gates, of which a non-finite one may leave the state finite.
    selects: whether `run` selects by a reset itself.
  """

  run: Call
  lead: int
  gates: int | None = None
  selects: bool = False


def contain(op: Op, starts, tokens, initial_state, shared=()):
  """The output and the final state of `op.run` with non-finite values kept in their segments.

  Args:
    starts: `[B, T]`, true where a segment starts; the first token's entry has no effect. With None there is nothing to
      contain.
    tokens: arrays `[B, T, ...]` or None, of which the first reads the state and the others write it. Their third axis
      may be key heads, each for several consecutive heads of the state.
    shared: arrays that all tokens share; their gradients are NaN when the gradient of any token is.
  """
  arrays = starts, tuple(tokens), initial_state, tuple(shared)
  if not all(map(_known, jax.tree.leaves(arrays))):
    return _run(op, *arrays)
  # Nothing compiles this call as a whole, and piece by piece JAX would compile loops and branches at each call again.
  return _compiled(op, (dispatch.platform(), dispatch.capability()), *arrays)


def _known(x):
  """Whether `x` has values, as it has outside of `jit` and `vmap`, under `grad` too."""
  return not isinstance(x, jax.core.Tracer) or x.to_concrete_value() is not None


@functools.partial(jax.jit, static_argnums=(0, 1))
def _compiled(op, device, *arrays):
  """`_run` as a program of its own. It is made for `device`, because implementations ask which one there is."""
  del device
  return _run(op, *arrays)


def _run(op, starts, tokens, initial_state, shared):
  if starts is None or op.selects or _leaves_out.value:
    return op.run(starts, tokens, initial_state, shared)
  # `run` stands twice in each pass. Under `jit` it is traced and lowered once for both.
  op = dataclasses.replace(op, run=jax.jit(op.run))
  return _contained(op, starts, tokens, initial_state, shared)


def _contained(op, *inputs):
  function = jax.custom_vjp(lambda *inputs: _checked(op, op.run(*inputs), *inputs)[0])
  function.defvjp(functools.partial(_forward, op), functools.partial(_backward, op))
  return function(*inputs)


def _forward(op, starts, *inputs):
  results, pullback = jax.vjp(functools.partial(op.run, starts), *inputs)
  results, sound = _checked(op, results, starts, *inputs)
  return results, (pullback, sound, starts, *inputs)


def _backward(op, residuals, cotangents):
  pullback, sound, *inputs = residuals
  found = pullback(cotangents)
  found = jax.lax.cond(sound & _finite(found[1]), lambda: found, lambda: _contained_gradients(op, *inputs, cotangents))
  return None, *found


def _checked(op, results, starts, tokens, initial_state, shared):
  """`results`, or if they are not `sound` the contained ones, and whether they are."""
  sound = _finite(results[1]) & _finite(tokens[0])
  if op.gates is not None and tokens[op.gates] is not None:
    sound &= _finite(tokens[op.gates])
  # Under its name it is saved, so that no kernel runs again to find it.
  sound = checkpoint_name(sound, RESIDUALS)

  def contained():
    cleaned, flags = _clean(op, starts, tokens, initial_state)
    return _marked(op.run(starts, *cleaned, shared), flags)

  return jax.lax.cond(sound, lambda: results, contained), sound


def _unknown(x, starts):
  """`x` plus a zero: if the compiler knows that `x` is zeros, as a state often is, it tests them for half a minute."""
  return x + jnp.where(starts[0, 0], -0.0, 0.0).astype(x.dtype)


def _finite(x):
  return jnp.all(jnp.isfinite(x))


def _clean(op, starts, tokens, initial_state):
  """Finite arrays, the tokens that find or make the state non-finite, and the outputs that are lost, `[B, T, ...]`."""
  reads, *writes = (_of_heads(_any(~jnp.isfinite(x), op.lead), initial_state) for x in tokens if x is not None)
  written = functools.reduce(jnp.logical_or, writes)
  entry = _any(~jnp.isfinite(_unknown(initial_state, starts)), op.lead - 1)
  state = _from(written.at[:, 0].set(written[:, 0] | entry), starts)
  return jax.tree.map(lambda x: _select(jnp.isfinite(x), x, 0), (tokens, initial_state)), (state, state | reads)


def _marked(results, flags):
  (output, final_state), (state, lost) = results, flags
  return _select(~lost, output, jnp.nan), _select(~state[:, -1], final_state, jnp.nan)


def _contained_gradients(op, starts, tokens, initial_state, shared, cotangents):
  cleaned, (state, lost) = _clean(op, starts, tokens, initial_state)
  _, pullback = jax.vjp(functools.partial(op.run, starts), *cleaned, shared)
  usable, flags = [], []
  for x, gone, axes in zip(cotangents, (lost, state[:, -1]), (op.lead, op.lead - 1), strict=True):
    gone = _like(gone, x)
    usable.append(_select(jnp.isfinite(x) & ~gone, x, 0))
    x = _unknown(x, starts)
    flags.append(_any(jnp.where(gone, x != 0, ~jnp.isfinite(x)), axes))
  own, end = flags
  reached = state | _until(own.at[:, -1].set(own[:, -1] | end), starts)
  tokens, initial_state, shared = pullback(tuple(usable))
  marked = (_select(~_of_key_heads(reached if i else state | own, x), x, jnp.nan) if x is not None else None
            for i, x in enumerate(tokens))
  everywhere = ~jnp.any(reached)
  return (tuple(marked), _select(~reached[:, 0], initial_state, jnp.nan),
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
