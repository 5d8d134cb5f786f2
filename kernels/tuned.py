"""Measured configurations of the kernels, as data: one file per device, `tuned/<device>.json`.

A device without a file takes the file of one with the same multiprocessors (`RELATED`), because its code is the same.

`experiments/retune.py` writes the files on a GPU, and nothing is measured at run time. An entry holds the op, the forms
of log_decay that it serves, K, V, dtype, the fields of the op's `Config`, and the milliseconds that it took. It names
the `device` of the measurement where that is not the file's.
"""

import dataclasses
import functools
import json
import pathlib
import re
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp

FOLDER = pathlib.Path(__file__).parent / "tuned"
# Names of devices that differ from a measured one in memory, clock or number of multiprocessors only.
RELATED = {r"nvidia_(h100|h200|h800|gh200)(_.*)?": "nvidia_h100_80gb_hbm3"}


@dataclasses.dataclass(frozen=True)
class Tile:
  """One kernel's tile width and launch parameters."""

  block: int
  num_warps: int = 4
  num_stages: int = 2


def lookup[C](op: str, config_class: type[C], *, gate: str, K: int, V: int, dtype) -> C | None:
  """The configuration measured on the device that the program is compiled for, or on one with the same
  multiprocessors, for these heads or for the `nearest` wider ones; None where nothing near is listed.

  Args:
    gate: the form of log_decay, see `gate_key`.
    config_class: dataclass of `op` whose fields are integers, `Tile`s or None.
  Raises:
    ValueError: the device's file is broken, or written for other kernels.
  """
  device = device_kind()
  path = device and file_of(device)
  if not path or not path.exists():
    return None
  entries = {(k, v): config for (*kind, k, v, listed_dtype), config in read(path).items()
             if (*kind, listed_dtype) == (op, gate, dtype_key(dtype))}
  widths = nearest(K, V, entries)
  where = f"{path}: {op} {gate} {'x'.join(map(str, widths or ()))} {dtype_key(dtype)}"
  return to_config(config_class, entries[widths], where) if widths else None


def nearest(K: int, V: int, widths: Iterable[tuple[int, int]]) -> tuple[int, int] | None:
  """The smallest of `widths` that holds K key and V value channels, each less than doubled; None if there is none.

  The kernels pad heads to the width of their tiles, so such heads run in the very kernels that were measured.
  """
  return min(((k, v) for k, v in widths if K <= k < 2 * K and V <= v < 2 * V), key=lambda width: width[0] * width[1],
             default=None)


def gate_key(log_decay) -> str:
  """The form of log_decay under which entries are listed: none, constant per head, or one gate per token or channel."""
  return "none" if log_decay is None else {1: "constant", 3: "token", 4: "channel"}[log_decay.ndim]


def listed(op: str, device: str) -> list[tuple[str, int, int, str]]:
  """Gate, K, V and dtype of everything that is listed for `op` on `device`."""
  path = file_of(device)
  return [key[1:] for key in read(path) if key[0] == op] if path.exists() else []


def device_kind() -> str | None:
  """The GPU that programs are compiled for: the current mesh's abstract device, else the host's first GPU, if any."""
  abstract = jax.sharding.get_abstract_mesh().abstract_device
  if abstract is not None:
    return abstract.device_kind
  return jax.devices()[0].device_kind if jax.default_backend() == "gpu" else None


def slug(device: str) -> str:
  """The name of a device's file: 'NVIDIA H100 80GB HBM3' gives nvidia_h100_80gb_hbm3."""
  return re.sub(r"\W+", "_", device.lower()).strip("_")


def dtype_key(dtype) -> str:
  """The dtype under which entries are listed: both 16-bit types run the same kernels."""
  return "bfloat16" if jnp.dtype(dtype).itemsize == 2 else jnp.dtype(dtype).name


def file_of(device):
  """The device's file, or the one that stands in for it. Neither need exist."""
  path = FOLDER / f"{slug(device)}.json"
  stand_in = next((name for pattern, name in RELATED.items() if re.fullmatch(pattern, slug(device))), None)
  return path if path.exists() or stand_in is None else FOLDER / f"{stand_in}.json"


@functools.cache
def read(path: pathlib.Path) -> Mapping[tuple[str, str, int, int, str], dict]:
  """Fields of the configurations in a device's file, by (op, gate, K, V, dtype). Raises ValueError."""
  try:
    entries = json.loads(path.read_text())["configs"]
    found = [((entry["op"], gate, entry["K"], entry["V"], entry["dtype"]), entry["config"])
             for entry in entries for gate in entry["gates"]]
  except (ValueError, KeyError, TypeError) as e:
    raise ValueError(f"{path}: must be JSON with 'configs', each with op, gates, K, V, dtype and config; {e!r}") from e
  if len(dict(found)) < len(found):
    raise ValueError(f"{path}: lists an op, gate, K, V and dtype twice; each may occur once")
  return dict(found)


def to_config[C](config_class: type[C], fields: dict, where: str) -> C:
  """The dataclass that `dataclasses.asdict` made `fields` of. Raises ValueError naming `where`."""
  names = [field.name for field in dataclasses.fields(config_class)]
  if not isinstance(fields, dict) or sorted(fields) != sorted(names):
    raise ValueError(f"{where}: config={fields!r} must have exactly the fields {', '.join(names)}")
  try:
    return config_class(**{name: Tile(**x) if isinstance(x, dict) else x for name, x in fields.items()})
  except TypeError as e:
    raise ValueError(f"{where}: config={fields!r} must hold integers, tiles with block, num_warps and num_stages, "
                     "or null") from e
