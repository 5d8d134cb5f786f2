"""A recurrent model out of one with softmax attention, by SUPRA (Mercat et al. 2024, arXiv:2405.06640, section 2.3).

Every attention layer becomes a layer of `lin_jax.mixers.supra`, which keeps its query, key, value and output
projections and its rotary positions. The model must be trained further, because its new feature maps start at random
and the norm of each head changes the size of its output. The paper trains all parameters, old and new, on 20 to 100
billion tokens, which is about 5% of the tokens that the model had seen. Its rate has 1,000 steps of warmup to 3e-5 for
7B parameters or 3e-4 for 1B, and a cosine decay to 1e-5.
"""

import dataclasses

import jax
from flax import nnx

from lin_jax import mixers
from lin_jax.config import ModelConfig
from lin_jax.mixers.attention import AttentionConfig
from lin_jax.mixers.supra import SupraConfig
from lin_jax.model import LanguageModel

_KEPT = tuple(field.name for field in dataclasses.fields(SupraConfig) if hasattr(AttentionConfig, field.name))


def linearize(config: ModelConfig, model: LanguageModel, seed: int = 0) -> tuple[ModelConfig, LanguageModel]:
  """Returns the config and the model in which recurrent layers take the place of all softmax attention.

  Args:
    config: has softmax attention as its mixer, its hybrid mixer, or both.
    model: of that config. Its parameters are shared with the result, not copied.
    seed: of the new feature maps.
  Raises:
    ValueError: no layer is softmax attention, one has an option that the recurrent layer does not have, or the model
      has parameters, such as adapters, that the linear one would lose.
  """
  linear = linearized(config)
  graph, abstract = nnx.split(nnx.eval_shape(lambda: LanguageModel(linear, rngs=nnx.Rngs(0))), nnx.Param)
  old, wanted = dict(nnx.to_flat_state(nnx.state(model, nnx.Param))), nnx.to_flat_state(abstract)
  new = [path for path, _ in wanted if path not in old]
  if lost := sorted(".".join(map(str, path)) for path in old.keys() - {path for path, _ in wanted}):
    raise ValueError(f"the linear model has no place for {', '.join(lost)}: merge adapters first")

  @jax.jit
  def start(key):
    # The compiler leaves out all parameters that are not returned.
    fresh = nnx.to_flat_state(nnx.state(LanguageModel(linear, rngs=nnx.Rngs(key)), nnx.Param))
    return [parameter for path, parameter in fresh if path in new]

  parameters = old | dict(zip(new, start(jax.random.key(seed)), strict=True))
  return linear, nnx.merge(graph, nnx.from_flat_state((path, parameters[path]) for path, _ in wanted))


def linearized(config: ModelConfig) -> ModelConfig:
  """`config` with recurrent layers in the place of softmax attention. Raises ValueError as `linearize` does."""
  attention = {field: mixer for field in ("mixer", "hybrid_mixer")
               if isinstance(mixer := getattr(config, field), AttentionConfig)}
  if not attention:
    raise ValueError(f"config.model.mixer is {mixers.name_of(config.mixer)!r}: only softmax attention ('attention') "
                     "becomes linear")
  linear = dataclasses.replace(config, **{
      field: _recurrent(mixer, f"config.model.{field}", config.width) for field, mixer in attention.items()})
  if linear.mixer == linear.hybrid_mixer and config.mixer != config.hybrid_mixer:
    raise ValueError("config.model.hybrid_mixer and config.model.mixer would become the same layer: give both the same "
                     "head_dim")  # parameters are stacked where layers are equal
  return linear


def _recurrent(attention, where, width):
  if attention.head_dim == width // attention.heads:
    attention = dataclasses.replace(attention, head_dim=0)
  if not attention.rope_base:
    raise ValueError(f"{where}.rope_base={attention.rope_base}: attention without positions does not become linear")
  for field in dataclasses.fields(attention):
    value = getattr(attention, field.name)
    if field.name not in _KEPT and value != field.default:
      raise ValueError(f"{where}.{field.name}={value!r}: attention becomes linear only with {field.default!r}")
  return SupraConfig(**{name: getattr(attention, name) for name in _KEPT})
