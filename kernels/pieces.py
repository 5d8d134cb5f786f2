"""Cuts sequences into pieces, so that a scan over chunks fills a GPU although there are few sequences and heads.

The pieces of a sequence become rows of the batch. Each is first scanned from a zero state for its update alone. The
state that enters piece p + 1 is then `kept` times the state that enters piece p, plus the update of p. This is exact,
because the recurrence of the state is affine and its map is diagonal. Finally all pieces are scanned at once, each from
its own entry state.
"""

import jax.numpy as jnp

ENOUGH = 160  # programs that fill a GPU: cutting costs one more reading of the keys and values
WANTED = 256  # programs that cutting aims at
SHORTEST = 8  # chunks in the shortest piece


def count(programs: int, T: int, chunk: int, enough: int = ENOUGH) -> int:
  """How many pieces to cut `T` tokens into: 1 when the `programs` of an uncut scan are `enough`."""
  found = 1
  while programs < enough and programs * found < WANTED and -(-T // chunk) >= 2 * found * SHORTEST:
    found *= 2
  return found


def fold(x, count: int, chunk: int):
  """`[B, T, ...]` to `[B * count, T' / count, ...]`, with zeros behind T so that each piece has whole chunks."""
  B, T = x.shape[:2]
  x = jnp.pad(x, ((0, 0), (0, -T % (count * chunk)), *((0, 0) for _ in x.shape[2:])))
  return x.reshape(B * count, -1, *x.shape[2:])


def unfold(x, B: int):
  """Inverse of `fold`; the zeros stay."""
  return x.reshape(B, -1, *x.shape[2:])


def entry_states(initial_state, kept, update, reverse: bool):
  """The state that enters each piece, `[B * count, H, K, V]`.

  Args:
    initial_state: `[B, H, K, V]` of the first piece, or the last one if `reverse`.
    kept, update: `[B * count, H, 1 or K, 1]` and `[B * count, H, K, V]` of each piece.
  """
  B = initial_state.shape[0]
  kept, update = (jnp.moveaxis(x.reshape(B, -1, *x.shape[1:]), 1, 0) for x in (kept, update))
  order = range(len(update))
  state, states = initial_state, {}
  for p in reversed(order) if reverse else order:
    states[p] = state
    state = kept[p] * state + update[p]
  return jnp.stack([states[p] for p in order], axis=1).reshape(-1, *initial_state.shape[1:])


def exit_state(states, B: int, reverse: bool):
  """The state `[B, H, K, V]` that leaves the last piece of each row, or the first one if `reverse`."""
  return states.reshape(B, -1, *states.shape[1:])[:, 0 if reverse else -1]
