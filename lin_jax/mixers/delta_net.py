"""DeltaNet (Yang et al. 2024, arXiv:2406.06484, section 3), with the rule of Schlag et al. 2021 (arXiv:2102.11174).

Per head, with rows q_t, k_t in R^K, v_t in R^V, and conv a short causal convolution:
  S_t = S_{t-1} + b_t k_t^T (v_t - k_t S_{t-1}),   o_t = q_t S_t / sqrt(K),   b_t = sigmoid(x_t W_b)
  q_t, k_t = norm(f(conv(x W)_t)),   v_t = silu(conv(x W_v)_t),   y_t = RMSNorm(o_t) W_o
where f is SiLU and norm is L2 per head unless the config names another choice from the paper's ablation. Where the
paper is silent, the layer follows flash-linear-attention, which trains the published checkpoints. It has no biases,
1e-6 under the L2 norm's root, one head norm scale shared by all heads, SiLU on values whatever f is, and an optional
swish gate on the normalised output. Doubling beta to (0, 2) gives the state's transition negative eigenvalues
(Grazzi et al. 2024, arXiv:2411.12537).
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from kernels.delta_rule import step as delta_step
from lin_jax.context import delta_rule
from lin_jax.layers import Linear, RMSNorm
from lin_jax.mixers import head_widths, register, require
from lin_jax.mixers.matrix_memory import MatrixMemory, OpConfig, by_heads, short_convolutions

# elu1 is formed as in flash-linear-attention and in the recorded runs. In bfloat16 it rounds to 0 below -5, which the
# function of the same name in `lin_jax.mixers.linear_attention` avoids.
ACTIVATIONS = {"silu": jax.nn.silu, "relu": jax.nn.relu, "elu1": lambda x: jax.nn.elu(x) + 1, "identity": lambda x: x}
NORMS = ("l2", "l1")


@dataclasses.dataclass
class DeltaNetConfig(OpConfig):
  """The defaults are the paper's 340M model: heads of 128 at width 1024, convolutions of 4 taps, no output gate."""

  heads: int = 8
  expand_k: float = 1.0  # key width of all heads / model width
  expand_v: float = 1.0
  conv_width: int = 4  # taps of the short convolution on q, k and v; 0 means no convolution
  qk_activation: str = "silu"  # a name in ACTIVATIONS
  qk_norm: str = "l2"  # "l1" divides by the sum of absolute values
  output_gate: bool = False  # swish gate on the normalised output
  allow_neg_eigval: bool = False  # beta in (0, 2) instead of (0, 1)

  @staticmethod
  def examples() -> list["DeltaNetConfig"]:
    return [DeltaNetConfig(heads=2),
            DeltaNetConfig(heads=4, expand_k=0.5, expand_v=2.0, conv_width=0, qk_activation="elu1", qk_norm="l1",
                           output_gate=True, allow_neg_eigval=True)]


@register("delta_net")
class DeltaNet(MatrixMemory):
  """The DeltaNet layer. Its state is the float32 matrix memory and, with convolutions, their last inputs."""

  Config = DeltaNetConfig
  layout = "bthk,bthk,bthv,bth"
  flops_per_entry = 6  # two reads and a write

  def __init__(self, config: DeltaNetConfig, *, width: int, norm_eps: float, dtype, rngs: nnx.Rngs):
    for field, known in (("qk_activation", ACTIVATIONS), ("qk_norm", NORMS)):
      require(config, field, getattr(config, field) in known, f"must be one of {', '.join(known)}")
    key_width, value_width = head_widths(config, width)
    super().__init__(config, (config.heads, key_width // config.heads, value_width // config.heads))
    self.heads = config.heads
    self.qk_activation, self.qk_norm = config.qk_activation, config.qk_norm
    self.beta_scale = 2.0 if config.allow_neg_eigval else 1.0
    linear = dict(dtype=dtype, rngs=rngs)
    self.query = Linear(width, key_width, ("embed", "heads"), **linear)
    self.key = Linear(width, key_width, ("embed", "heads"), **linear)
    self.value = Linear(width, value_width, ("embed", "heads"), **linear)
    self.beta = Linear(width, config.heads, ("embed", "heads"), output_dtype=jnp.float32, **linear)
    self.gate = Linear(width, value_width, ("embed", "heads"), **linear) if config.output_gate else None
    self.norm = RMSNorm(value_width // config.heads, eps=norm_eps, rngs=rngs)
    self.output = Linear(value_width, width, ("heads", "embed"), **linear)
    channels = (key_width, key_width, value_width)
    self.convolutions = short_convolutions(channels, config.conv_width, **linear)

  def project(self, x, state, segment_ids):
    silu = self.qk_activation == "silu"
    qkv, kept = self.convolved((self.query, self.key, self.value), x, state, segment_ids, (silu, silu, True))
    q, k, v = (by_heads(a, self.heads) for a in qkv)
    if not silu:
      q, k = (ACTIVATIONS[self.qk_activation](a) for a in (q, k))
    if self.qk_norm == "l1":  # the op divides by the L2 norm itself
      q, k = _normalize_l1(q), _normalize_l1(k)
    return (q, k, v, self._beta(x)), kept

  def mix(self, *arrays, **options):
    return delta_rule(*arrays, normalize_qk=self.qk_norm == "l2", **options)

  def mix_step(self, memory, *arrays):
    return delta_step(memory, *arrays, normalize_qk=self.qk_norm == "l2")

  def _beta(self, x):
    return self.beta_scale * jax.nn.sigmoid(self.beta(x))


def _normalize_l1(x):
  wide = x.astype(jnp.float32)
  # A head that ReLU has zeroed stays zero.
  return (wide / (jnp.sum(jnp.abs(wide), axis=-1, keepdims=True) + 1e-6)).astype(x.dtype)
