"""Counts what JAX compiles."""

import contextlib
from collections.abc import Iterator

import jax

_COMPILED = []
jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: _COMPILED.append(event))


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
  """Yields a list that has an entry for each program compiled inside, once the context has ended."""
  _COMPILED.clear()
  found = []
  yield found
  found += [event for event in _COMPILED if event == "/jax/core/compile/backend_compile_duration"]
