"""The tensor of flash-linear-attention for each parameter here, and its option for each field of a config.

A layout names the tensors of one layer by the parameters that they hold. A tuple of several parameters stands for their
concatenation along the outputs. Kernels of linear layers are stored transposed, and kernels of short convolutions as
[channels, 1, taps].
"""

import dataclasses
import math
from typing import Any

_PROJECTIONS = {"query.kernel": "q_proj.weight", "key.kernel": "k_proj.weight", "value.kernel": "v_proj.weight",
                "output.kernel": "o_proj.weight"}
_CONVOLUTIONS = {f"convolutions.{i}.kernel": f"{name}_conv1d.weight" for i, name in enumerate("qkv")}
_DELTA = _PROJECTIONS | _CONVOLUTIONS | {
    "beta.kernel": "b_proj.weight", "gate.kernel": "g_proj.weight", "norm.scale": "o_norm.weight"}

MLP = {"mlp_norm.scale": "mlp_norm.weight", "mlp.gate.kernel": "mlp.gate_proj.weight",
       "mlp.up.kernel": "mlp.up_proj.weight", "mlp.down.kernel": "mlp.down_proj.weight"}
# Tensors of the whole model. "{base}" stands for the family's name of its base model.
MODEL = {"embedding": "{base}.embeddings.weight", "norm.scale": "{base}.{final_norm}.weight", "head": "lm_head.weight"}


@dataclasses.dataclass(frozen=True)
class Family:
  """One model type of flash-linear-attention.

  Attributes:
    mixer: the registered name of its mixer here.
    fields: field of the mixer's config -> (option there, its default there). None there is 0 here.
    values: field -> {value there: value here}, where the two differ.
    options: option there -> the values that mean what the mixer here does. The first is the default and is written.
    constants: field here -> the one value that every model there has.
    short_convolution: the default of `use_short_conv` there, or None if its models never have such a convolution.
    tensors: parameter of the mixer, or a tuple of parameters -> tensor of the mixer there.
    unfused: tensors that have another name in a model with `fuse_norm` false.
    defaults: options of the model whose default differs from `COMMON`.
  """

  mixer: str
  fields: dict[str, tuple[str, Any]]
  tensors: dict[str | tuple[str, ...], str]
  values: dict[str, dict] = dataclasses.field(default_factory=dict)
  options: dict[str, tuple] = dataclasses.field(default_factory=dict)
  constants: dict[str, Any] = dataclasses.field(default_factory=dict)
  short_convolution: bool | None = None
  unfused: dict[str, str] = dataclasses.field(default_factory=dict)
  defaults: dict[str, Any] = dataclasses.field(default_factory=dict)
  base: str = "model"
  mixer_name: str = "attn"
  mixer_norm: str = "attn_norm"
  final_norm: str = "norm"
  mlp: bool = True


# The model's own options as (option there, default), and the options of which one value is served.
COMMON = {"width": ("hidden_size", 2048), "depth": ("num_hidden_layers", 24), "vocab_size": ("vocab_size", 32000),
          "norm_eps": ("norm_eps", 1e-6), "tie_embeddings": ("tie_word_embeddings", False)}
COMMON_OPTIONS = {"hidden_act": ("swish",), "attnres_block_size": (None,)}
ATTENTION_OPTIONS = {"qkv_bias": (False,), "qk_norm": (False,)}
_AFFINE = {"elementwise_affine": (True,)}
_HEAD_GATE = {"g_norm_swish_gate.weight": "g_norm.weight"}

FAMILIES = {
    "gla": Family(
        mixer="gla",
        fields={"heads": ("num_heads", 4), "expand_k": ("expand_k", 0.5), "expand_v": ("expand_v", 1.0)},
        options={"num_kv_heads": (None, "num_heads"), "feature_map": (None,), "use_output_gate": (True,),
                 "clamp_min": (None,), "use_gk": (True,), "use_gv": (False,), **_AFFINE},
        constants={"gate_rank": 16, "gate_temperature": 16.0},
        short_convolution=False,
        tensors=_PROJECTIONS | _CONVOLUTIONS | {
            "gate.kernel": "g_proj.weight", "decay_in.kernel": "gk_proj.0.weight",
            "decay_out.kernel": "gk_proj.1.weight", "decay_out.bias": "gk_proj.1.bias",
            "norm.scale": "g_norm_swish_gate.weight"},
        unfused=_HEAD_GATE),
    "delta_net": Family(
        mixer="delta_net",
        fields={"heads": ("num_heads", 16), "expand_k": ("expand_k", 1.0), "expand_v": ("expand_v", 1.0),
                "output_gate": ("use_gate", False), "allow_neg_eigval": ("allow_neg_eigval", False),
                "qk_norm": ("qk_norm", "l2"), "qk_activation": ("qk_activation", "silu")},
        values={"qk_norm": {"l2": "l2", "sum": "l1"},
                "qk_activation": {"silu": "silu", "relu": "relu", "elu": "elu1", "identity": "identity"}},
        options={"use_beta": (True,), "use_output_norm": (True,)},
        short_convolution=True, tensors=_DELTA),
    "gated_deltanet": Family(
        mixer="gated_delta_net",
        fields={"heads": ("num_heads", 6), "value_heads": ("num_v_heads", None), "head_dim": ("head_dim", 256),
                "expand_v": ("expand_v", 2.0), "output_gate": ("use_gate", True),
                "allow_neg_eigval": ("allow_neg_eigval", False)},
        options={"output_gate_activation": ("swish", "silu")},
        constants={"norm_eps": 0.0},
        short_convolution=True, defaults={"depth": 21},
        tensors=_DELTA | {"decay.kernel": "a_proj.weight", "A_log": "A_log", "dt_bias": "dt_bias"}),
    "retnet": Family(
        mixer="retention",
        fields={"heads": ("num_heads", 8), "expand_k": ("expand_k", 1.0), "expand_v": ("expand_v", 2.0)},
        options={"num_kv_heads": (None, "num_heads"), "feature_map": (None,), "use_output_gate": (True,),
                 "use_short_conv": (False,), **_AFFINE},
        constants={"rope_base": 10000.0, "conv_width": 0, "decays": "consecutive"},
        tensors=_PROJECTIONS | {"gate.kernel": "g_proj.weight", "norm.scale": "g_norm_swish_gate.weight"},
        unfused=_HEAD_GATE, defaults={"hidden_ratio": 2}),
    "hgrn2": Family(
        mixer="hgrn2",
        fields={"heads": ("num_heads", None), "learned_bound": ("use_lower_bound", True)},
        options=_AFFINE,
        constants={"norm_eps": 1e-5},
        short_convolution=False,
        tensors={"query.kernel": "q_proj.weight", "forget.kernel": "f_proj.weight", "input.kernel": "i_proj.weight",
                 "output.kernel": "o_proj.weight", "norm.scale": "g_norm.weight"} | {
                     f"convolutions.{i}.kernel": f"{name}_conv1d.weight" for i, name in enumerate("qfi")}),
    "transformer": Family(
        mixer="attention",
        fields={"heads": ("num_heads", 32), "kv_heads": ("num_kv_heads", None), "window": ("window_size", None),
                "rope_base": ("rope_theta", 10000.0)},
        options={"attn": (None,), **ATTENTION_OPTIONS, **_AFFINE},
        constants={"head_dim": 0, "rope_fraction": 1.0, "qk_norm": "none", "qk_norm_offset": False,
                   "output_gate": False},
        tensors=_PROJECTIONS),
    "mamba2": Family(
        mixer="mamba2",
        fields={"heads": ("num_heads", 64), "groups": ("n_groups", 1), "state_size": ("state_size", 128),
                "expand": ("expand", 2), "conv_width": ("conv_kernel", 4)},
        options={"hidden_act": ("silu", "swish"), "use_bias": (False,), "use_conv_bias": (True,), "rmsnorm": (True,),
                 "norm_before_gate": (False,), "D_has_hdim": (False,), "attn": (None,),
                 "dt_limit": ((0.0, math.inf),)},
        tensors={("gate.kernel", "value.kernel", "key.kernel", "query.kernel", "dt.kernel"): "in_proj.weight",
                 tuple(f"convolutions.{i}.kernel" for i in range(3)): "conv1d.weight",
                 tuple(f"convolutions.{i}.bias" for i in range(3)): "conv1d.bias",
                 "A_log": "A_log", "D": "D", "dt_bias": "dt_bias", "norm_scale": "norm.weight",
                 "output.kernel": "out_proj.weight"},
        defaults={"depth": 48, "norm_eps": 1e-5},
        base="backbone", mixer_name="mixer", mixer_norm="norm", final_norm="norm_f", mlp=False),
}

# Options that change how a model is computed or trained but not its outputs, and the Hub's own keys.
IGNORED = frozenset("""
  _name_or_path architectures auto_map model_type dtype torch_dtype transformers_version use_cache bos_token_id
  eos_token_id pad_token_id initializer_range max_position_embeddings fuse_norm fuse_swiglu fuse_cross_entropy
  fuse_linear_cross_entropy use_l2warp attn_mode chunk_size conv_init A_init_range dt_min dt_max dt_init_floor
  rescale_prenorm_residual residual_in_fp32
""".split())
