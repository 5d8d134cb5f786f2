"""Sequence mixers by name. A mixer is one file of this folder: it has a config dataclass and a registered nnx module.

The module's contract (`B` batch, `T` time, `D` width):
  Config                                      its config dataclass; `Config.examples()` lists small ones for width 32
  Module(config, *, width, norm_eps, dtype, rngs)
  __call__(x[B,T,D], state, segment_ids) -> (y[B,T,D], state)     parallel form; a state of None returns None
  step(x[B,D], state) -> (y[B,D], state)                          recurrent form
  init_state(batch, max_length) -> pytree                         empty state for up to max_length tokens
  flops_per_token(sequence_length) -> int                         forward pass, projections included
and, only for a mixer that depends on its place in the stack,
  set_layers(mixers, layers, depth)                               static; see `set_layers` below
and, only for a mixer whose kernels keep their start under `ModelConfig.start` "normal",
  keeps_start = True
A config whose layer would change under a new field's default names in `EARLIER` what saved configs without it had.
`matrix_memory.MatrixMemory` provides all of these except the constructor for mixers whose op keeps a matrix per head.
"""

import dataclasses
import importlib
import pkgutil
from collections.abc import Sequence
from typing import Any

from flax import nnx

from lin_jax.typed_json import shown

MIXERS: dict[str, type[nnx.Module]] = {}


def register(name: str):
  """Class decorator that makes a mixer available to configs and tests under `name`. Each name can be taken once."""

  def add(cls):
    if name in MIXERS:
      raise ValueError(f"mixer {name!r} is registered twice")
    if not dataclasses.is_dataclass(getattr(cls, "Config", None)) or not hasattr(cls.Config, "examples"):
      raise ValueError(f"mixer {name!r}: {cls.__name__}.Config must be a dataclass with `examples()`")
    MIXERS[name] = cls
    return cls

  return add


def require(config: Any, field: str, ok: bool, rule: str) -> None:
  """Raises ValueError with the field's value and the rule unless `ok`. The constructors of mixers call it."""
  if not ok:
    raise ValueError(f"{field}={getattr(config, field)!r}: {rule}")


def head_widths(config: Any, width: int) -> tuple[int, int]:
  """Key and value channels over all heads, from `expand_k` and `expand_v`.

  Raises ValueError if the number of heads does not divide them.
  """
  require(config, "heads", config.heads >= 1, "must be at least 1")
  sizes = round(width * config.expand_k), round(width * config.expand_v)
  for field, size in zip(("expand_k", "expand_v"), sizes):
    if size < 1 or size % config.heads:
      raise ValueError(f"{field}={getattr(config, field)} of width {width} gives {size} channels: not divisible by "
                       f"heads={config.heads}")
  return sizes


def name_of(config: Any) -> str:
  """The registered name of a mixer config. Raises ValueError for any other object."""
  for name, cls in MIXERS.items():
    if type(config) is cls.Config:
      return name
  raise ValueError(f"{config!r} is not a mixer config; registered mixers: {', '.join(MIXERS)}")


def config_class(name: str) -> type:
  """The config dataclass of the mixer called `name`. Raises ValueError for an unknown name."""
  if name not in MIXERS:
    raise ValueError(f"unknown mixer {shown(name)}; registered mixers: {', '.join(MIXERS)}")
  return MIXERS[name].Config


def build(config: Any, *, width: int, norm_eps: float, dtype, rngs: nnx.Rngs) -> nnx.Module:
  """A new mixer for the residual width `width` that computes in `dtype`."""
  return MIXERS[name_of(config)](config, width=width, norm_eps=norm_eps, dtype=dtype, rngs=rngs)


def set_layers(mixers: Sequence[nnx.Module], layers: Sequence[Sequence[int]], depth: int) -> None:
  """Tells the mixers of a model of `depth` layers where they stand, before the model runs them.

  The arrays of each mixer have a leading layer axis, and its entry of `layers` gives the layer numbers along that axis,
  counted from 0. The mixers are copies made for this call. Values that are set on them have the same leading axis and
  are neither parameters nor state. A class that defines `set_layers` is called once with all of its mixers.
  """
  for cls in dict.fromkeys(map(type, mixers)):
    if hasattr(cls, "set_layers"):
      own = [i for i, mixer in enumerate(mixers) if type(mixer) is cls]
      cls.set_layers([mixers[i] for i in own], [layers[i] for i in own], depth)


for _module in pkgutil.iter_modules(__path__):
  importlib.import_module(f"{__name__}.{_module.name}")
