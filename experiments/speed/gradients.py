"""The loss and the gradients of one batch on a mesh, compared with one device's.

The reference is one device in float32, with products at full precision. The errors of one device in the model's own
dtype say how much of a mesh's errors is rounding, so a mesh may have at most twice these, or `FLOAT32_ERROR`.
"""

import concurrent.futures
import dataclasses
import functools
import re
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from lin_jax import sharding
from lin_jax.config import MeshConfig, TrainConfig
from lin_jax.train_state import make_state, placement
from lin_jax.trainable import is_parameter, parameter_names
from lin_jax.training import loss_sum
from running import records
from running.meshes import ONE, name_of, size_of
from speed import scaling, training

FLOAT32_ERROR = 2e-5


@dataclasses.dataclass(frozen=True)
class Program:
  """The compiled initialisation and gradients of a config in its own dtype or in float32."""

  config: TrainConfig
  create: Callable
  gradients: Callable
  placed: NamedSharding


@dataclasses.dataclass(frozen=True)
class Found:
  """Loss per token, and for each parameter the name of its group and its gradients: one array, or one per layer."""

  loss: float
  groups: list[str]
  arrays: list[list[jax.Array]]
  memory_gib: float


class Comparison:
  """One model on several meshes and on one device, with the batch of the largest mesh. Raises ValueError."""

  def __init__(self, name: str, make: Callable[[], TrainConfig], meshes: Sequence[MeshConfig], size: scaling.Size,
               length: int):
    rows = size.rows(max(map(size_of, meshes)))
    self.name, self.count = name, len(meshes)
    self._configs = [scaling.configured(make, mesh, size, rows, length) for mesh in (ONE, *meshes)]

  @functools.cached_property
  def programs(self) -> list[Program]:
    """The float32 program on one device, then those in the model's dtype, compiled side by side."""
    one, *_ = self._configs
    with concurrent.futures.ThreadPoolExecutor() as pool:
      return list(pool.map(_compile, [one, *self._configs], ["float32", *[one.model.dtype] * len(self._configs)]))

  @functools.cached_property
  def expected(self) -> tuple[Found, Found]:
    """The reference, and one device in the model's dtype."""
    return _run(self.programs[0]), _run(self.programs[1])

  def row(self, number: int, wait: Callable[[], object]) -> dict:
    """Runs a mesh by its number, and returns the fields of its record. `wait` is called when all is compiled."""
    program = self.programs[2 + number]
    wait()
    exact, one = self.expected
    mesh = _run(program)
    (errors, norms), (rounding, _), (beside, _) = _errors(mesh, exact), _errors(one, exact), _errors(mesh, one)
    shown = lambda values: {group: float(f"{value:.2e}") for group, value in values.items()}
    setting = {"name": self.name, "mesh": name_of(program.config.mesh),
               "devices": size_of(program.config.mesh), **training.description(program.config)}
    return {"run": records.now(), "setting": setting, "loss": mesh.loss, "loss_one_device": one.loss,
            "loss_float32": exact.loss, "norms": shown(norms), "errors": shown(errors),
            "errors_one_device": shown(rounding), "differences_from_one_device": shown(beside),
            "largest_error": max(shown(errors).values()), "largest_error_one_device": max(shown(rounding).values()),
            "memory_gib": mesh.memory_gib, "memory_gib_one_device": one.memory_gib,
            "within_bounds": all(error <= max(2 * rounding[group], FLOAT32_ERROR) for group, error in errors.items())}


def _compile(config, dtype):
  config = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=dtype))
  mesh = training.mesh_of(config)
  with jax.set_mesh(mesh), jax.default_matmul_precision("highest" if dtype == "float32" else None):
    graph, _, abstract, create = make_state(config, mesh)

    @functools.partial(jax.jit, out_shardings=(None, placement(abstract).params))
    def gradients(params, batch):
      (total, _), found = jax.value_and_grad(functools.partial(loss_sum, graph), has_aux=True)(params, batch)
      return total, found

    batch = training.abstract_batch(config, mesh, documents=False)
    create = jax.jit(create, out_shardings=placement(abstract)).lower().compile()
    return Program(config, create, gradients.lower(abstract.params, batch).compile(), sharding.batch_sharding(mesh))


def _run(program):
  data = program.config.data
  batch, = training.drawn_batches(program.config, 1, documents=False)
  batch = jax.device_put(batch, program.placed)
  params = program.create().params
  loss, found = jax.block_until_ready(program.gradients(params, batch))
  return Found(float(loss) / (data.batch_size * data.sequence_length), list(map(_group, parameter_names(found))),
               list(map(jax.tree.leaves, jax.tree.leaves(found, is_leaf=is_parameter))),
               training.gibibytes(program.gradients))


def _group(name):
  """A parameter's name without the numbers of its layers."""
  return re.sub(r"^runs\.\d+\.\d+\.", "", name)


def _errors(found, expected):
  """The relative error of each group of gradients, and the norm of its `expected` ones."""
  differences, squares = {}, {}
  for group, arrays, exact in zip(found.groups, found.arrays, expected.arrays, strict=True):
    exact = jax.device_put(exact, [x.sharding for x in arrays])
    difference, square = _squares(arrays, exact)
    differences[group] = differences.get(group, 0.0) + float(difference)
    squares[group] = squares.get(group, 0.0) + float(square)
  norms = {group: square**0.5 for group, square in squares.items()}
  return {group: differences[group]**0.5 / (norm or 1.0) for group, norm in norms.items()}, norms


@jax.jit
def _squares(arrays, exact):
  """The summed squares of the differences and of the exact values."""
  total = lambda values: sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in values)
  return total([x - y for x, y in zip(arrays, exact, strict=True)]), total(exact)
