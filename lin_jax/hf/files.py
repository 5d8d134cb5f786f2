"""The files of a checkpoint directory: `config.json`, and one safetensors file or several with an index."""

import logging
import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from lin_jax.hf.layout import Layout
from lin_jax.typed_json import read_object, shown

_log = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
_DTYPES = ("F32", "F16", "BF16")
_LISTED = 12  # most names of each kind that a refusal lists
_FLOATS = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}


def read_json(path: pathlib.Path) -> dict:
  """The object in a JSON file. Raises ValueError if there is none."""

  def convert(value) -> Any:
    # Infinity has no spelling in JSON, so transformers writes it as an object.
    spelled = value.get("__float__") if len(value) == 1 else None
    return _FLOATS.get(spelled, value) if isinstance(spelled, str) else value

  return read_object(path, "a readable JSON file", convert)


class Tensors:
  """The tensors of a checkpoint directory by name. They can be read while the context lasts."""

  def __init__(self, path: pathlib.Path):
    self._path, self._files, self._where = path, [], {}

  def __enter__(self):
    """Opens the files. Raises ValueError that names the wrong file, or the wrong entry of the index."""
    try:
      index = _weight_map(self._path)
      for name in sorted(set(index.values())) or [WEIGHTS]:
        self._open(name)
      for tensor, name in index.items():
        if self._where.get(tensor, (None, None))[0] != name:
          raise ValueError(f"{self._path / INDEX}: {shown(tensor)} is not in {name}, where weight_map says it is")
    except BaseException:
      self.__exit__()
      raise
    return self

  def __exit__(self, *error):
    for file in self._files:
      file.__exit__(*error or (None, None, None))

  def _open(self, name):
    try:
      file = safe_open(self._path / name, framework="numpy")
      self._files.append(file.__enter__())
      tensors = list(file.keys())
    except (OSError, SafetensorError, ValueError) as e:
      raise ValueError(f"{self._path / name}: not a readable safetensors file ({' '.join(str(e).split())})") from e
    for tensor in tensors:
      if tensor in self._where:
        raise ValueError(f"{self._path / name}: {shown(tensor)} is in {self._where[tensor][0]} as well")
      self._where[tensor] = name, file

  def shapes(self) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor."""
    return {name: tuple(file.get_slice(name).get_shape()) for name, (_, file) in self._where.items()}

  def require(self, shapes: Mapping[str, tuple[int, ...]], layout: Layout) -> None:
    """Raises ValueError unless the tensors are exactly the ones in `shapes`, apart from optional and skipped ones.

    One line of the log says which tensors are skipped.
    """
    skipped = [name for name in self._where if any(re.search(pattern, name) for pattern in layout.skipped)]
    found = {name: self._where[name][1].get_slice(name) for name in shapes if name in self._where}
    sizes = {name: tuple(part.get_shape()) for name, part in found.items()}
    problems = {
        "missing": sorted(set(shapes) - set(found)),
        "left over": sorted(set(self._where) - set(shapes) - set(layout.optional) - set(skipped)),
        "of another shape": [f"{name} {sizes[name]} in place of {shapes[name]}{_mended(name, layout)}"
                             for name in sorted(found) if sizes[name] != shapes[name]],
        f"of another dtype than {', '.join(_DTYPES)}": [
            f"{name} {part.get_dtype()} in {self._where[name][0]}" for name, part in sorted(found.items())
            if part.get_dtype() not in _DTYPES]}
    if any(problems.values()):
      raise ValueError(f"{self._path} is not a checkpoint of the model that its {CONFIG} describes: " + "; ".join(
          f"{kind}: {_listed(names)}" for kind, names in problems.items() if names))
    if skipped:
      _log.warning("%s: %d tensors are no part of the model and are not read: %s", self._path, len(skipped),
                   _listed(sorted(skipped), most=3))

  def read(self, name: str, rows: slice, others: Sequence[slice]) -> np.ndarray:
    """The slices of a tensor's first axis and of its last axes. Only they are read from the file."""
    part = self._where[name][1].get_slice(name)
    between = (slice(None),) * (len(part.get_shape()) - 1 - len(others))
    return part[(rows, *between, *others)]

  def whole(self, name: str) -> np.ndarray:
    return self._where[name][1].get_tensor(name)


def _mended(name, layout):
  """Names the options of the config that set the tensor's shape."""
  option = layout.sizes.get(name.removesuffix(".weight").rsplit(".", 1)[-1])
  return f" (set by {option})" if option else ""


def _weight_map(path) -> dict[str, str]:
  """The file of each tensor, as the index gives it. The result is empty without an index."""
  index = path / INDEX
  if not index.exists():
    pickled = sorted(file.name for kind in ("*.bin", "*.pt", "*.pth") for file in path.glob(kind))
    if pickled and not (path / WEIGHTS).exists():
      raise ValueError(f"{path}: has {pickled[0]} but no {WEIGHTS}: PyTorch's pickles are not read. Where PyTorch is "
                       "installed, save_file({k: v.clone() for k, v in torch.load(file, weights_only=True).items()}, "
                       f"'{WEIGHTS}') of safetensors.torch converts one file")
    return {}
  names = read_json(index).get("weight_map")
  if not isinstance(names, dict) or not names:
    raise ValueError(f"{index}: weight_map={shown(names)}: must be an object that gives each tensor's file")
  for tensor, name in names.items():
    # A file in another folder is not part of this checkpoint.
    if not isinstance(name, str) or pathlib.PurePath(name).name != name or not name.endswith(".safetensors"):
      raise ValueError(f"{index}: weight_map has {shown(tensor)} in {shown(name)}: must be the name of a .safetensors "
                       "file beside the index")
  return names


def _listed(names, most=_LISTED):
  more = len(names) - most
  return ", ".join(map(_plain, names[:most])) + (f" and {more} more" if more > 0 else "")


def _plain(text):
  return text if text.isprintable() and len(text) < 200 else shown(text)
