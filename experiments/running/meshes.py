"""The flag --mesh of commands that load a model for use, and the mesh that it describes."""

import contextlib
from collections.abc import Iterator

import jax
from absl import flags

from lin_jax.config import MeshConfig
from lin_jax.sharding import make_mesh

_AXES = ("data", "fsdp", "tensor", "context")


def define() -> flags.FlagHolder[str]:
  """Defines the flag --mesh, whose value `using` reads."""
  return flags.DEFINE_string("mesh", "", "Devices on the axes data, fsdp and tensor, as in 1,8,1, for a model that is "
                             "too large for one device. A fourth number, as in 1,1,1,8, splits the tokens of each text "
                             "over the axis context. By default the first device alone.")


@contextlib.contextmanager
def using(value: str) -> Iterator[jax.sharding.Mesh | None]:
  """The mesh of a value of --mesh, in use while the context lasts, or None. Raises ValueError."""
  if not value:
    yield None
    return
  sizes = value.split(",")
  if len(sizes) not in (3, 4) or not all(size.isdecimal() and int(size) for size in sizes):
    raise ValueError(f"--mesh={value}: must be the numbers of devices on the axes {', '.join(_AXES)}, as in 1,8,1 or "
                     "1,1,1,8")
  mesh = make_mesh(MeshConfig(**dict(zip(_AXES, map(int, sizes), strict=False))))
  with jax.set_mesh(mesh):
    yield mesh
