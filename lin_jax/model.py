"""The language model: embedding, `depth` blocks, final norm, head. `B` batch, `T` time, `D` width.

  pre-norm block:   x = x + mixer(norm(x));  x = x + mlp(norm(x))
  post-norm block:  x = x + norm(mixer(x));  x = x + norm(mlp(x))

Layers that repeat, singly or as a short pattern of several, are stored with a leading axis of repetitions and applied
by `lax.scan`, so that compile time does not grow with depth unless `unroll` asks for it. Parameters are float32.
Activations have the config's dtype, and the residual stream stays split over the batch axes of the mesh in use. The
recurrent state is an explicit pytree with one stacked mixer state per layer of each run's pattern.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Bool, Float, Int

from kernels.derivatives import RESIDUALS
from lin_jax import mixers
from lin_jax.config import ModelConfig
from lin_jax.decoding import Decoder, in_order, stacked
from lin_jax.layers import NORMAL, SGLU, Linear, RMSNorm, ShortConvolution, SimpleRMSNorm, SwiGLU, param
from lin_jax.sharding import shard_batch


@dataclasses.dataclass(frozen=True)
class Remat:
  """Checkpoint policies of a block's mixer branch and of the whole block. None saves all that autodiff asks for."""

  mixer: Callable | None = None
  block: Callable | None = None


def products(primitive, *args, **params) -> bool:
  """The checkpoint policy that saves the results of products with weights, of the mixing op, and of its forward kernels
  for its backward pass. Elementwise results are recomputed, and no kernel of a forward pass runs twice."""
  policies = jax.checkpoint_policies
  return (policies.dots_with_no_batch_dims_saveable(primitive, *args, **params)
          or policies.save_only_these_names("mixer_output", RESIDUALS)(primitive, *args, **params)
          or primitive.name.startswith("dot_product_attention_fwd"))  # cuDNN's, which gives its residuals no name

# From most memory and least work to least memory and most work.
REMAT = {
    "none": Remat(),
    "mixer": Remat(mixer=products),  # norms, gates and activations of the mixer branch are recomputed
    "dots": Remat(block=products),  # the same in both branches
    "full": Remat(block=jax.checkpoint_policies.nothing_saveable),  # everything but the block's input
}


MLPS = {"swiglu": SwiGLU, "sglu": SGLU}


class Block(nnx.Module):
  """One layer: mixer branch, then MLP branch. A config with an `mlp_width` of 0 has no MLP branch."""

  def __init__(self, config: ModelConfig, mixer: Any, *, rngs: nnx.Rngs):
    dtype = jnp.dtype(config.dtype)
    self.post_norm = config.post_norm == "all" or (config.post_norm == "hybrid" and mixer == config.hybrid_mixer)
    self.mixer_norm = _norm(config, rngs)
    self.mixer = mixers.build(mixer, width=config.width, norm_eps=config.norm_eps, dtype=dtype, rngs=rngs)
    self.mlp_norm = _norm(config, rngs) if config.mlp_width else None
    self.mlp = MLPS[config.mlp](config.width, config.mlp_width, dtype=dtype, rngs=rngs) if config.mlp_width else None

  def __call__(self, x: Float[Array, "B T D"], state: Any, segment_ids: Int[Array, "B T"] | None,
               remat: Remat = Remat(), looped: bool = True) -> tuple[Float[Array, "B T D"], Any]:
    """x and the state after the block. `looped` says that the block is compiled as the body of a loop over layers."""

    def mix(block, x, state, segment_ids):
      with jax.named_scope("mixer"):
        y, state = block.mixer(x if block.post_norm else block.mixer_norm(x), state, segment_ids)
        return block.mixer_norm(y) if block.post_norm else y, state

    def apply(block, x, state, segment_ids):
      y, state = _checkpoint(mix, remat.mixer, looped)(block, x, state, segment_ids)
      return block.mlp_branch(shard_batch(x + y)), state

    return _checkpoint(apply, remat.block, looped)(self, x, state, segment_ids)

  def mlp_branch(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
    """x plus its MLP branch, or x itself in a block without an MLP."""
    if self.mlp is None:
      return x
    with jax.named_scope("mlp"):
      return shard_batch(x + (self.mlp_norm(self.mlp(x)) if self.post_norm else self.mlp(self.mlp_norm(x))))


class LanguageModel(nnx.Module):
  """A causal language model. It has a parallel call for training and prefill, and a recurrent `step` for decoding.

  `unroll` repetitions of the layers are compiled together in one step of their scan, and 0 stands for all of them.
  With 0, the residuals of the backward pass stay where they were written, instead of being copied into stacks and out
  of them, and a training step keeps the layers' parameters apart (`layer_stacks.py`). Compilation takes longer with
  every repetition. On an H200, GLA of 24 layers with 1.3B parameters and 16,384 tokens per step trained at 53,900
  tokens/s in 40 GiB under the scan with remat "dots". With all layers unrolled it trains at 60,900 in 45 GiB, or with
  remat "none" at 63,000 in 55 GiB, and compiles in 31 to 76 s. Remat "none" does not pay under the scan, because most
  residuals are stacked there.
  """

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, remat: str = "none", unroll: int = 1):
    if remat not in REMAT:
      raise ValueError(f"remat={remat!r}: must be one of {', '.join(REMAT)}")
    self.remat, self.unroll = remat, unroll
    self.dtype = jnp.dtype(config.dtype)
    self.embedding_scale = config.width**0.5 if config.scale_embeddings else None
    self.embedding = param(rngs, NORMAL, (config.vocab_size, config.width), ("vocab", "embed"))
    runs = layer_runs(layer_mixers(config))
    self.layers = layer_numbers(runs)
    self.runs = nnx.List([nnx.List([_stack(config, mixer, count, rngs) for mixer in pattern])
                          for pattern, count in runs])
    self.norm = _norm(config, rngs)
    head_shape, head_axes = (config.width, config.vocab_size), ("embed", "vocab")
    self.head = None if config.tie_embeddings else param(rngs, NORMAL, head_shape, head_axes)

  def hidden(self, tokens: Int[Array, "B T"], state: Any = None, segment_ids: Int[Array, "B T"] | None = None,
             ) -> tuple[Float[Array, "B T D"], Any]:
    """Normed activations before the head, and the state after the last token (None if no state was given).

    Args:
      tokens: ids in [0, vocab_size).
      state: from `init_state` or from an earlier call, whose sequence this call continues.
      segment_ids: documents packed in a row. Nothing passes where the id changes. The first segment continues `state`.
    """
    return self.hidden_from_embeddings(self.embed(tokens), state, segment_ids)

  def hidden_from_embeddings(self, x: Float[Array, "B T D"], state: Any = None,
                             segment_ids: Int[Array, "B T"] | None = None) -> tuple[Float[Array, "B T D"], Any]:
    """`hidden` of embedded tokens, for callers that change the embeddings in between, for instance by dropout."""
    states, given = [], [None] * len(self.runs) if state is None else state
    for run, layers, run_state in zip(self.placed_runs(), self.layers, given, strict=True):
      count = len(layers[0])
      unroll = self.unroll or count

      def body(x, pattern, looped=count > unroll and count % unroll == 0):
        after = []
        for block, block_state in zip(pattern[0], pattern[1] or [None] * len(pattern[0]), strict=True):
          x, block_state = block(x, block_state, segment_ids, REMAT[self.remat], looped)
          after.append(block_state)
        return x, after

      x, run_state = jax.lax.scan(body, x, (run, run_state), unroll=unroll)
      states.append(run_state)
    return self.norm(x), None if state is None else states

  def __call__(self, tokens: Int[Array, "B T"], state: Any = None, segment_ids: Int[Array, "B T"] | None = None,
               ) -> tuple[Float[Array, "B T V"], Any]:
    """Float32 logits of the next token, and the state. The arguments are the same as in `hidden`."""
    x, state = self.hidden(tokens, state, segment_ids)
    return self.logits(x), state

  def step(self, tokens: Int[Array, "B"], state: Any) -> tuple[Float[Array, "B V"], Any]:
    """Float32 logits after one more token per row, and the state. `generate.decode` prepares the weights only once."""
    logits, layers = Decoder(self).step(tokens, in_order(state))
    return logits, stacked(layers, state)

  def init_state(self, batch: int, max_length: int) -> list:
    """The empty state for `batch` rows of up to `max_length` tokens."""
    empty = jax.vmap(lambda block: block.mixer.init_state(batch, max_length))
    return [[empty(blocks) for blocks in run] for run in self.runs]

  def embed(self, tokens: Int[Array, "*batch"]) -> Float[Array, "*batch D"]:
    """The vector of each token that the first layer reads."""
    with jax.named_scope("embed"):
      # Rows are cast after the look-up, so that its gradient sums repeated tokens in float32.
      rows = self.embedding[...][tokens]
      return shard_batch((rows * self.embedding_scale if self.embedding_scale else rows).astype(self.dtype))

  def unembedding(self) -> Float[Array, "D V"]:
    """The float32 output matrix, which is the transposed embedding if the two are tied."""
    return self.embedding[...].T if self.head is None else self.head[...]

  def flops_per_token(self, sequence_length: int) -> int:
    """Matmul and mixing FLOPs of the forward pass per token, averaged over a sequence, without embedding look-ups."""
    total = 2 * self.embedding.shape[0] * self.embedding.shape[1]
    for blocks, layers in self._stacks(self.runs):
      total += len(layers) * blocks.mixer.flops_per_token(sequence_length)
      total += len(layers) * blocks.mlp.flops_per_token() if blocks.mlp else 0
    return total

  def _stacks(self, runs):
    """The stacked blocks of `runs`, each with the numbers of its layers."""
    return [pair for run, layers in zip(runs, self.layers, strict=True) for pair in zip(run, layers, strict=True)]

  def placed_runs(self):
    """Copies of the stacked blocks, whose mixers know their layers."""
    runs = jax.tree.map(lambda leaf: leaf, self.runs)
    blocks, layers = zip(*self._stacks(runs), strict=True)
    mixers.set_layers([block.mixer for block in blocks], layers, sum(map(len, layers)))
    return runs

  def logits(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
    """Float32 logits of normed activations."""
    with jax.named_scope("head"):
      return jnp.einsum("...d,dv->...v", x, self.unembedding().astype(self.dtype),
                        preferred_element_type=jnp.float32)


def keep_rows(kept: Bool[Array, "B"], state: Any, empty: Any) -> Any:
  """The model state with the rows of `state` that are `kept`, and the rows of `empty` (from `init_state`) elsewhere."""
  return jax.tree.map(lambda x, e: jnp.where(kept.reshape(1, -1, *(1,) * (x.ndim - 2)), x, e), state, empty)


def parameter_count(config: ModelConfig) -> int:
  """The number of parameters, found without allocating any."""
  return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(abstract_model(config), nnx.Param)))


def abstract_model(config: ModelConfig) -> LanguageModel:
  """The model with shapes in place of arrays."""
  return jax.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))


def layer_mixers(config: ModelConfig) -> list:
  """The mixer config of each layer."""
  hybrid = set(config.hybrid_layers)
  return [config.hybrid_mixer if i in hybrid else config.mixer for i in range(config.depth)]


def layer_runs(layers: list) -> list[tuple[list, int]]:
  """Patterns of layers and how often each repeats. The stack is either one pattern or runs of equal layers, whichever
  has fewer layers to compile."""
  equal = [([mixer], len(list(group))) for mixer, group in itertools.groupby(layers)]
  period = next(p for p in range(1, len(layers) + 1) if layers[:p] * (len(layers) // p) == layers)
  return equal if len(equal) <= period else [(layers[:period], len(layers) // period)]


def layer_numbers(runs: list[tuple[list, int]]) -> tuple[tuple[range, ...], ...]:
  """For each run of `layer_runs`, the numbers of the layers that each mixer of its pattern stands for."""
  numbers, first = [], 0
  for pattern, count in runs:
    last = first + len(pattern) * count
    numbers.append(tuple(range(first + i, last, len(pattern)) for i in range(len(pattern))))
    first = last
  return tuple(numbers)


def _norm(config, rngs):
  if config.norm == "simple_rms":
    return SimpleRMSNorm(eps=config.norm_eps)
  return RMSNorm(config.width, eps=config.norm_eps, rngs=rngs, offset=int(config.norm == "rms_offset"))


def _stack(config, mixer, depth, rngs):
  """`depth` blocks, each initialised from its own key, as one module with a leading layer axis."""
  keys = jax.random.split(rngs.params(), depth)
  return jax.vmap(lambda key: _started(config, Block(config, mixer, rngs=nnx.Rngs(key)), key))(keys)


def _started(config, block, key):
  """The block, with "normal" as flash-linear-attention starts it: it draws kernels anew after the layers have.

  A mixer with `keeps_start` keeps what its layers have drawn, such as the range of Mamba's time steps.
  """
  if config.start == "normal":
    rngs, keeps = nnx.Rngs(jax.random.fold_in(key, 1)), getattr(block.mixer, "keeps_start", False)
    for path, layer in nnx.iter_modules(block):
      if isinstance(layer, Linear | ShortConvolution) and not (keeps and path[0] == "mixer"):
        layer.kernel[...] = NORMAL(rngs.params(), layer.kernel.shape, jnp.float32)
  return block


def _checkpoint(fn, policy, looped):
  # The compiler merges the recomputation with the forward pass, unless they are bodies of two loops or a barrier stands
  # between them.
  return fn if policy is None else jax.checkpoint(fn, policy=policy, prevent_cse=not looped)
