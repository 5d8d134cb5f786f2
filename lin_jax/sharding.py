"""Placement of parameters and activations on a mesh with axes ("data", "fsdp", "context", "tensor").

`data` and `fsdp` split the batch. `fsdp` also splits every matrix along the model width, `context` splits the tokens of
each sequence (`lin_jax.context`), and `tensor` splits heads, MLP width and vocabulary. Parameters are placed by jit's
`out_shardings`, activations by `shard_batch`, and ops whose kernels the compiler cannot partition run on local blocks
through `map_over_heads`. The last two act only under `jax.set_mesh`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from lin_jax.config import MeshConfig, TrainConfig

AXES = ("data", "fsdp", "context", "tensor")
BATCH_AXES = ("data", "fsdp")
TIME_AXIS = "context"
LOGICAL_AXES = {"embed": "fsdp", "heads": "tensor", "mlp": "tensor", "vocab": "tensor", None: None}


def mesh_shape(config: MeshConfig, device_count: int) -> tuple[int, int, int, int]:
  """Sizes of `AXES`, with -1 resolved. Raises ValueError if their product is not `device_count`."""
  sizes = [getattr(config, axis) for axis in AXES]
  text = " x ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
  if sizes.count(-1) > 1:
    raise ValueError(f"config.mesh {text}: at most one axis may be -1")
  known = math.prod(size for size in sizes if size != -1)
  if known < 1 or device_count % known or (-1 not in sizes and known != device_count):
    raise ValueError(f"config.mesh {text} does not fit {device_count} devices: the sizes must multiply to that number")
  return tuple(device_count // known if size == -1 else size for size in sizes)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """A mesh of all devices, or of the given ones, with compiler-propagated (Auto) axes."""
  devices = jax.devices() if devices is None else list(devices)
  return jax.make_mesh(mesh_shape(config, len(devices)), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def validate_mesh(config: TrainConfig, device_count: int) -> None:
  """Raises ValueError if the mesh does not fit the devices, or the batch, its sequences or the heads not the mesh."""
  data, fsdp, context, tensor = mesh_shape(config.mesh, device_count)
  rows = config.data.batch_size // config.optim.accumulation
  if rows % (data * fsdp):
    raise ValueError(f"config.data.batch_size={config.data.batch_size} over config.optim.accumulation="
                     f"{config.optim.accumulation} leaves {rows} sequences a microbatch: not divisible by "
                     f"data * fsdp = {data} * {fsdp}")
  if config.data.sequence_length % context:
    raise ValueError(f"config.data.sequence_length={config.data.sequence_length}: not divisible by "
                     f"config.mesh.context={context}")
  processes = jax.process_count()
  if data * fsdp % processes and (processes % (data * fsdp) or config.data.carried_windows > 1):
    raise ValueError(f"config.mesh: data * fsdp = {data} * {fsdp} must be divisible by the {processes} processes, or "
                     "divide them where rows carry no state, so that all of them read equally many rows")
  for name in ("mixer", "hybrid_mixer"):
    mixer = getattr(config.model, name)
    # Where there are more value heads than key heads, `map_over_heads` repeats key heads as the mesh needs it.
    for field in ("value_heads",) if getattr(mixer, "value_heads", 0) else ("heads", "kv_heads"):
      heads = getattr(mixer, field, 0)
      if heads % tensor:
        raise ValueError(f"config.model.{name}.{field}={heads}: not divisible by config.mesh.tensor={tensor}")


def param_shardings(tree: Any, mesh: Mesh) -> Any:
  """NamedShardings in the structure of `tree`: parameters by their logical axes, every other leaf replicated.

  `tree` may be a module, an `nnx.State`, an optimizer state built from one, or an abstract form of these. Stacked
  parameters have unnamed leading axes. A dimension that its mesh axis does not divide stays whole.
  """

  def place(leaf):
    if not isinstance(leaf, nnx.Variable):
      return NamedSharding(mesh, P())
    names = leaf.get_metadata().get("out_sharding", ())
    axes = (None,) * (len(leaf.shape) - len(names)) + tuple(LOGICAL_AXES[name] for name in names)
    fits = [axis and size % mesh.shape[axis] == 0 for axis, size in zip(axes, leaf.shape, strict=True)]
    return leaf.replace(NamedSharding(mesh, P(*(axis if fit else None for axis, fit in zip(axes, fits, strict=True)))))

  return jax.tree.map(place, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def placements(tree: Any, mesh: Mesh | None) -> Any:
  """`param_shardings` on the mesh, or the first device for every leaf if there is none."""
  if mesh is not None:
    return param_shardings(tree, mesh)
  first = SingleDeviceSharding(jax.devices()[0])
  return jax.tree.map(lambda _: first, tree)


def batch_part(mesh: Mesh) -> tuple[int, int]:
  """Returns (i, n): the devices of this process hold the i-th of n equal parts of each batch's rows.

  n is less than the number of processes where the axes `context` and `tensor` span several of them.
  """
  groups = mesh.devices.reshape(_batch_shards(mesh), -1)
  held = [i for i, group in enumerate(groups) if any(d.process_index == jax.process_index() for d in group)]
  return held[0] // len(held), len(groups) // len(held)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Sharding of arrays with a leading batch axis."""
  return NamedSharding(mesh, P(BATCH_AXES))


def shard_batch(x: Array) -> Array:
  """Constrains the leading axis of `x` to the batch axes of the mesh in use, the time axis of `x` `[B, T, D]` to
  `context`, and every other axis to be whole."""
  mesh = jax.sharding.get_abstract_mesh()
  if not is_partitioned(mesh) or x.shape[0] % _batch_shards(mesh):
    return x
  time = TIME_AXIS if x.ndim == 3 and x.shape[1] % mesh.shape[TIME_AXIS] == 0 else None
  return jax.lax.with_sharding_constraint(x, P(BATCH_AXES, time, *(None,) * (x.ndim - 2)))


def rows_of(x: Array) -> Array:
  """x with one axis before its last, because XLA on a CPU copies and transposes both operands of a gradient over two.

  Where tokens are split over devices, x stays as it is: no device holds consecutive rows of it.
  """
  return x if context_shards() > 1 else x.reshape(-1, x.shape[-1])


def map_over_heads(fn: Callable, layouts: str) -> Callable:
  """`fn` applied to each device's batch rows, tokens and heads, or plain `fn` if no mesh is in use.

  `layouts` names the dimensions of every argument and result, as in "btgk,bthv->bthv". `b` is split over the batch
  axes, `t` over "context", `h` over "tensor", and dimensions with other letters stay whole. `g` is key heads of
  arguments, each for a group of consecutive heads `h`. They are split over "tensor" too. Where the mesh does not divide
  them, each is repeated as often as it takes to divide them, so that every device has the key heads of its heads and
  few others. An argument may be None. A batch that the mesh does not divide (a single prompt, say) and a single token
  are computed by every device. Tokens or heads that it does not divide raise ValueError. A function in which tokens
  meet learns from `time_parts` whether it holds a part of each sequence.
  """
  inputs, outputs = (side.split(",") for side in layouts.replace(" ", "").split("->"))

  def call(*args):
    mesh = jax.sharding.get_abstract_mesh()
    if not is_partitioned(mesh):
      return fn(*args)
    sizes = [(name, size) for layout, arg in zip(inputs, args, strict=True) if arg is not None
             for name, size in zip(layout, arg.shape, strict=True)]
    axes = _split_axes(mesh, sizes)
    args = [arg if arg is None else _repeat_key_heads(arg, layout, mesh.shape["tensor"])
            for layout, arg in zip(inputs, args, strict=True)]
    specs = {layout: P(*map(axes.get, layout)) for layout in (*inputs, *outputs)}
    in_specs = tuple(None if arg is None else specs[layout] for layout, arg in zip(inputs, args, strict=True))
    out_specs = tuple(specs[layout] for layout in outputs) if len(outputs) > 1 else specs[outputs[0]]
    # Where tokens are not split, `time_parts` must not find their axis.
    manual = set(AXES) if "t" in axes or mesh.shape[TIME_AXIS] == 1 else set(AXES) - {TIME_AXIS}
    # The varying-axes check does not see through kernels and custom derivatives.
    return jax.shard_map(fn, in_specs=in_specs, out_specs=out_specs, axis_names=manual, check_vma=False)(*args)

  return call


def _split_axes(mesh, sizes):
  """The mesh axes over which `map_over_heads` splits each letter, given the size of each letter's dimensions."""
  axes = {"h": "tensor", "g": "tensor"}
  if dict(sizes).get("t", 1) > 1:
    axes["t"] = TIME_AXIS
  for name, size in sizes:
    if name != "g" and name in axes and size % mesh.shape[axes[name]]:
      things = "heads" if name == "h" else "tokens"
      raise ValueError(f"{size} {things}: not divisible by the mesh axis {axes[name]}={mesh.shape[axes[name]]}")
  if dict(sizes)["b"] % _batch_shards(mesh) == 0:
    axes["b"] = BATCH_AXES
  return axes


def _repeat_key_heads(x, layout, shards):
  """`x` with its key heads, if the layout has any, repeated to the least number that `shards` divides.

  That number divides the heads too, because both the key heads and the shards divide them.
  """
  if "g" not in layout or x.shape[layout.index("g")] % shards == 0:
    return x
  axis = layout.index("g")
  return jnp.repeat(x, math.lcm(x.shape[axis], shards) // x.shape[axis], axis=axis)


def time_parts() -> int:
  """Number of parts of each sequence, of which a function under `map_over_heads` or another shard_map holds one."""
  mesh = jax.sharding.get_abstract_mesh()
  return mesh.shape[TIME_AXIS] if TIME_AXIS in mesh.manual_axes else 1


def context_shards() -> int:
  """Number of devices over which the mesh in use splits the tokens of a sequence."""
  mesh = jax.sharding.get_abstract_mesh()
  return mesh.shape[TIME_AXIS] if is_partitioned(mesh) else 1


def tensor_shards() -> int:
  """Number of devices over which the mesh in use splits heads."""
  mesh = jax.sharding.get_abstract_mesh()
  return mesh.shape["tensor"] if is_partitioned(mesh) else 1


def microbatches(tree: Any, count: int, axis: int = 0) -> Any:
  """Splits `axis` from B rows to B / count, after a new first axis. Each part takes every count-th row, so that no row
  leaves its device."""

  def regroup(x):
    x = jnp.moveaxis(x.reshape(*x.shape[:axis], -1, count, *x.shape[axis + 1:]), axis + 1, 0)
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty else jax.lax.with_sharding_constraint(x, P(*(None,) * (axis + 1), BATCH_AXES))

  return jax.tree.map(regroup, tree)


def join_microbatches(tree: Any, axis: int) -> Any:
  """Inverse of `microbatches`."""
  tree = jax.tree.map(lambda x: jnp.moveaxis(x, 0, axis + 1), tree)
  return jax.tree.map(lambda x: x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2:]), tree)


def is_partitioned(mesh) -> bool:
  """Whether a mesh of several devices is in use and is not already manual (inside another shard_map)."""
  return not mesh.empty and mesh.size > 1 and set(AXES) <= set(mesh.auto_axes)


def _batch_shards(mesh) -> int:
  return math.prod(mesh.shape[axis] for axis in BATCH_AXES)
