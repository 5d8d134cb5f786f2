"""A type checker for jaxtyping's import hook that looks at arrays alone: their dtypes and shapes, and nothing else.

Other types are not its business: wrong ones in configs and files have error messages of their own, which tests expect.
"""

import functools
import inspect
import types
import typing

import jax
import jaxtyping
import numpy as np


def check(function):
  """`function`, which raises TypeError for an array argument or result that is not as its annotation says."""
  signature = inspect.signature(function)
  if not any(map(_has_arrays, (signature.return_annotation, *(p.annotation for p in signature.parameters.values())))):
    return function

  @functools.wraps(function)
  def checked(*args, **kwargs):
    for name, value in signature.bind(*args, **kwargs).arguments.items():
      _require(value, signature.parameters[name].annotation, name)
    result = function(*args, **kwargs)
    _require(result, signature.return_annotation, "result")
    return result

  return checked


def _is_array(hint):
  return isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray)


def _is_union(hint):
  return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _has_arrays(hint):
  return _is_array(hint) or any(map(_has_arrays, typing.get_args(hint)))


def _require(value, hint, name):
  if typing.get_origin(hint) is tuple and isinstance(value, tuple):
    for i, (part, inner) in enumerate(zip(value, typing.get_args(hint))):
      _require(part, inner, f"{name}[{i}]")
  options = [option for option in (typing.get_args(hint) if _is_union(hint) else (hint,)) if _is_array(option)]
  if options and (_is_array(hint) or isinstance(value, jax.Array | np.ndarray)):
    if not any(_fits(value, option) for option in options):
      raise TypeError(f"{name} is {getattr(value, 'dtype', type(value))}{getattr(value, 'shape', '')}, not {hint}")


def _fits(value, hint):
  """Whether it is such an array; one of numpy stands for one of JAX."""
  return isinstance(value, hint.dtype[np.ndarray, hint.dim_str] if isinstance(value, np.ndarray) else hint)
