"""Options of rotary positions as `rope_base` and `rope_fraction` and back.

Newer files hold them in `rope_parameters`, older ones beside the other options, with a scaling in `rope_scaling`. Only
positions without scaling are served.
"""

from typing import Any

from lin_jax.typed_json import require_type, shown

OPTIONS = ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor")
# They place the parts of images. Text has the same positions without them.
_OF_IMAGES = ("mrope_section", "mrope_interleaved")
_MOST = 1e12


def read(values: dict, *, fraction: float = 1.0) -> dict[str, float]:
  """The fields of rotary positions. `fraction` is the default of `partial_rotary_factor`, or 1 for models without it.

  Raises ValueError, which names the option, for scaled positions and for values of another type or range.
  """
  parameters = _parameters(values)
  base = parameters.get("rope_theta", values.get("rope_theta", 10000.0))
  part = parameters.get("partial_rotary_factor", values.get("partial_rotary_factor", fraction))
  for option, value, most in (("rope_theta", base, _MOST), ("partial_rotary_factor", part, 1)):
    require_type(value, float, option)
    if not 0 < value <= most:
      raise ValueError(f"{option}={shown(value)}: must be positive and at most {most:,.0f}")
  if fraction == 1 and part != 1:
    raise ValueError(f"partial_rotary_factor={shown(part)}: models of this type rotate all channels")
  return {"rope_base": float(base), "rope_fraction": float(part)}


def read_or_none(values: dict) -> dict[str, float]:
  """The fields of positions that may be absent, as in Olmo Hybrid: then `rope_theta` is null, explicitly.

  Raises ValueError as `read` does, and if no option says whether there are positions. The authors' code then has none,
  and transformers 5.24 rotates with a base of 10,000.
  """
  parameters = _parameters(values)
  given = [options["rope_theta"] for options in (parameters, values) if "rope_theta" in options]
  if not given:
    raise ValueError(f"rope_parameters={shown(values.get('rope_parameters'))}: must give rope_theta, as null for a "
                     "model without positions, because readers disagree on what its absence means")
  return {"rope_base": 0.0, "rope_fraction": 1.0} if given[0] is None else read(values)


def write(base: float, fraction: float | None = None) -> dict[str, Any]:
  """The options, with the base also where older readers look for it. Without a `fraction` no option gives it.

  Where models may rotate a part of the channels, readers disagree on the part that no option gives.
  """
  parameters = {"rope_type": "default", "rope_theta": base or None}
  part = {} if fraction is None else {"partial_rotary_factor": fraction}
  return {"rope_parameters": parameters | part, "rope_theta": base or None} | part


def _parameters(values):
  parameters = values.get("rope_scaling") or values.get("rope_parameters") or {}
  name = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
  if not isinstance(parameters, dict):
    raise ValueError(f"{name}={shown(parameters)}: must be an object")
  kind = parameters.get("rope_type", parameters.get("type", "default"))
  if kind not in ("default", None):
    raise ValueError(f"{name}.rope_type={shown(kind)}: scaled positions have no equivalent here (served: 'default')")
  known = ("rope_type", "type", "rope_theta", "partial_rotary_factor", *_OF_IMAGES)
  for option, value in parameters.items():
    if option not in known and value is not None:
      raise ValueError(f"{name} with {shown(option)}={shown(value)}: has no equivalent here")
  return parameters
