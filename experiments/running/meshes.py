"""Meshes as text, such as fsdp=2,context=4, and the flag --mesh of commands that load a model for use."""

import contextlib
import dataclasses
import math
from collections.abc import Iterator

import jax
from absl import flags

from lin_jax import sharding
from lin_jax.config import MeshConfig

ONE = MeshConfig(1, 1, 1, 1)


def parse(text: str, flag: str = "mesh") -> MeshConfig:
  """Reads a mesh such as "fsdp=2,context=4", in which other axes have size 1. Raises ValueError, which names `flag`."""
  sizes = {}
  for word in text.split(","):
    axis, _, size = word.partition("=")
    if axis not in sharding.AXES or axis in sizes or not size.isdecimal() or not int(size):
      raise ValueError(f"--{flag}={text}: must be sizes of different axes of {', '.join(sharding.AXES)}, as in "
                       "fsdp=2,context=4")
    sizes[axis] = int(size)
  return dataclasses.replace(ONE, **sizes)


def name_of(mesh: MeshConfig) -> str:
  """Returns the axes with several devices, as `parse` reads them, or "one device"."""
  return ",".join(f"{axis}={size}" for axis in sharding.AXES if (size := getattr(mesh, axis)) > 1) or "one device"


def size_of(mesh: MeshConfig) -> int:
  """Returns the number of devices."""
  return math.prod(dataclasses.astuple(mesh))


def define() -> flags.FlagHolder[str]:
  """Defines the flag --mesh, whose value `using` reads."""
  return flags.DEFINE_string("mesh", "", "Sizes of the axes data, fsdp, tensor and context, as in fsdp=8, for a model "
                             "that is too large for one device. context=8 splits the tokens of each text. By default "
                             "the first device alone.")


@contextlib.contextmanager
def using(value: str) -> Iterator[jax.sharding.Mesh | None]:
  """The mesh of a value of --mesh, in use while the context lasts, or None. Raises ValueError."""
  if not value:
    yield None
    return
  mesh = sharding.make_mesh(parse(value))
  with jax.set_mesh(mesh):
    yield mesh
