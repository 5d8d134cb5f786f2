"""The models that are compared, by name: 42M parameters each, 16.4M of them the embedding of 32,000 tokens. Only the
models of `WIDE` have 134M to 139M, 32.8M of them the embedding.

The width is 512. There are eight blocks, but fifteen of Mamba, which has no MLP. Heads are as wide as in the papers'
340M models, because the kernels are tuned for that width; so there are half as many heads at half the model's width. A
mixer that has more parameters than the 4 D^2 of attention, GLA and DeltaNet gets a narrower MLP. Gated DeltaNet has
DeltaNet's heads, and so its state, in place of its authors' keys of three quarters of the width. The sliding window is
half the training context of 1024. RetNet's and the constant decays are 1 - 2^-5 and 1 - 2^-6 here, the fast two of the
paper's four, and the models with "slow" in their names have 1 - 2^-5 and 1 - 2^-8, which span the paper's range.
"""

import dataclasses
from collections.abc import Callable

from configs.deltanet import deltanet_340m, deltanet_global_340m
from configs.gla_paper import gla_340m, retnet_340m, transformer_340m
from lin_jax.config import ModelConfig
from lin_jax.linearize import linearized
from lin_jax.mixers.attention import AttentionConfig
from lin_jax.mixers.delta_net import ACTIVATIONS, NORMS, DeltaNetConfig
from lin_jax.mixers.gated_delta_net import GatedDeltaNetConfig
from lin_jax.mixers.gla import GLAConfig
from lin_jax.mixers.kda import KDAConfig
from lin_jax.mixers.lightning_attention import LightningAttentionConfig
from lin_jax.mixers.mamba import MambaConfig
from lin_jax.mixers.retention import RetentionConfig
from lin_jax.mixers.simple_gla import SimpleGLAConfig

WIDTH, DEPTH, MLP_WIDTH, VOCAB = 512, 8, 1408, 32000
WINDOW = 512


def _model(mixer, *, depth=DEPTH, mlp_width=MLP_WIDTH, start="layers", **fields):
  return lambda: ModelConfig(mixer=mixer, vocab_size=VOCAB, width=WIDTH, depth=depth, mlp_width=mlp_width, start=start,
                             **fields)


def _hybrid(layers, **fields):
  return _model(DeltaNetConfig(heads=4), hybrid_mixer=AttentionConfig(heads=8, **fields), hybrid_layers=layers)


def _shallow(model):
  """The model with eight layers, and with its attention in the second and the middle one, if it has any."""
  return dataclasses.replace(model, depth=DEPTH, hybrid_layers=model.hybrid_layers and (1, DEPTH // 2))


MODELS: dict[str, Callable[[], ModelConfig]] = {
    "transformer": _model(AttentionConfig(heads=8)),
    "retnet": _model(RetentionConfig(heads=2, decays="consecutive"), mlp_width=736),
    "tnl": _model(LightningAttentionConfig(heads=4), mlp_width=1248, hybrid_layers=(0,), norm="simple_rms", mlp="sglu",
                  hybrid_mixer=LightningAttentionConfig(heads=4, lrpe=True), scale_embeddings=True),
    "gla": _model(GLAConfig(heads=2)),
    "mamba": _model(MambaConfig(), depth=15, mlp_width=0),
    "deltanet": _model(DeltaNetConfig(heads=4)),
    "gated_deltanet": _model(GatedDeltaNetConfig(heads=4, head_dim=128, expand_v=1.0), mlp_width=1248),
    "deltanet_swa": _hybrid(tuple(range(1, DEPTH, 2)), window=WINDOW),
    "deltanet_global": _hybrid((1, DEPTH // 2)),
}
COMPARED = tuple(MODELS)

# These are GLA's layer with another decay; "gla" has one per key channel.
DECAYS = {"no_decay": "none", "constant_decay": "constant", "scalar_decay": "token"}
MODELS |= {name: _model(SimpleGLAConfig(heads=2, decay=decay, decays="consecutive")) for name, decay in DECAYS.items()}

# These add short convolutions to GLA, and remove DeltaNet's.
CONVOLUTIONS = {"deltanet_no_conv": DeltaNetConfig(heads=4, conv_width=0), "gla_conv": GLAConfig(heads=2, conv_width=4)}
MODELS |= {name: _model(mixer) for name, mixer in CONVOLUTIONS.items()}

NORM_AND_ACTIVATION = {
    "deltanet" if (norm, activation) == ("l2", "silu") else f"deltanet_{norm}_{activation}":
        DeltaNetConfig(heads=4, qk_norm=norm, qk_activation=activation) for norm in NORMS for activation in ACTIVATIONS}
MODELS |= {name: _model(mixer) for name, mixer in NORM_AND_ACTIVATION.items()}

# The slow decays that two heads lack, and gate biases for time constants of 16 to 1024 tokens.
SLOW = {"retnet_slow": _model(RetentionConfig(heads=2), mlp_width=736),
        "constant_decay_slow": _model(SimpleGLAConfig(heads=2, decay="constant"))}
SPREAD = {"gla_spread": _model(GLAConfig(heads=2, longest_memory=1024.0))}
MODELS |= SLOW | SPREAD | {"kda": _model(KDAConfig(heads=4, head_dim=128), mlp_width=1248)}


def _started_normal(name):
  return lambda: dataclasses.replace(MODELS[name](), start="normal")


# All kernels from N(0, 0.02), as flash-linear-attention ends up with and `ModelConfig` has it. Without that, short
# convolutions start uniform with a deviation of 0.29, and the projections of GLA and RetNet by Xavier's rule. Mamba
# keeps what its layers draw, and the kernels of DeltaNet without convolutions start so anyway.
MODELS |= {f"{name}_normal": _started_normal(name) for name in (
    *COMPARED, "gla_conv", "gla_spread", "retnet_slow", "kda") if name != "mamba"}


def from_normal(name: str) -> str:
  """Returns the name of the model `name` with all kernels from N(0, 0.02), which is its own if they start so anyway."""
  started = f"{name}_normal"
  return started if started in MODELS else name


# Keys of L1 norm leave outputs of 3e-5 to 1e-4, where the usual eps of 1e-6 under the root switches the head norm off.
SMALL_EPS = {f"{name}_eps": _model(mixer, norm_eps=1e-12) for name, mixer in NORM_AND_ACTIVATION.items()}
MODELS |= SMALL_EPS

# These are the same layers, trained in another way.
CARRIED = {"gla_carried": "gla", "retnet_carried": "retnet"}
STAGGERED = {"gla_staggered": "gla", "retnet_slow_staggered": "retnet_slow"}
MODELS |= {name: MODELS[plain] for name, plain in (CARRIED | STAGGERED).items()}

# The layers of the papers' 340M models at their own width of 1024, eight of 24.
WIDE = {"wide_transformer": transformer_340m, "wide_gla": gla_340m, "wide_deltanet": deltanet_340m,
        "wide_deltanet_global": deltanet_global_340m, "wide_retnet": retnet_340m}
MODELS |= {name: lambda function=function: _shallow(function().model) for name, function in WIDE.items()}

# SUPRA's layer from the start, and Transformers whose attention becomes that layer before they are trained further.
MODELS |= dict.fromkeys(("supra", "linearized_5", "linearized_20"), lambda: linearized(MODELS["transformer"]()))


def tiny(model: ModelConfig, vocab_size: int) -> ModelConfig:
  """Returns the same layers at width 32 with two blocks, in float32, for tests of the code that trains these models."""
  def shrunk(mixer):
    fields = {"head_dim": 8} if isinstance(mixer, GatedDeltaNetConfig) else {}
    return mixer and dataclasses.replace(mixer, **fields)

  return dataclasses.replace(
      model, mixer=shrunk(model.mixer), hybrid_mixer=shrunk(model.hybrid_mixer),
      hybrid_layers=model.hybrid_layers and (1,), vocab_size=vocab_size, width=32, depth=2,
      mlp_width=min(model.mlp_width, 64), dtype="float32")
