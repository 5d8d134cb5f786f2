"""TransNormerLLM (TNL) at the sizes of arXiv:2405.17381: 385M, 1B, 3B and 7B.

Layout (sections 4.1 and 4.2): lightning attention with ALiBi's slopes, learnable angles in the first layer alone,
SGLU, norms without parameters, embeddings scaled by sqrt(width), heads of 128 channels. The paper prints neither
vocabulary nor MLP widths. At width 1024 the MLP's width is 2816, as in the authors' code. The other MLP widths are
chosen so that the sizes come out that the paper does print: 385M, 1.0B and 6.8B. So is the vocabulary of 50272 tokens
in one matrix for embedding and head. It is the GPT-2 dictionary of Metaseq, in which the paper's models were trained.
The authors' released code has 64000 tokens instead.

Neither learning rate nor batch is published, and the corpus of 2T tokens is not public. The recipes here come from
`gla_340m` and `gla_1b3`, so these runs need not reach the authors' numbers under Expected. The paper's losses are in
bits.
"""

from lin_jax.config import MeshConfig, TrainConfig
from lin_jax.mixers.lightning_attention import LightningAttentionConfig

from .gla_paper import at_1b3, at_340m


def tnl_385m() -> TrainConfig:
  """TNL, 24 layers of width 1024 with 8 heads: 385M parameters.

  Source: arXiv:2405.17381 sections 4 and 5, tables 2 and 4 to 9.
  Command: python experiments/train.py --config=tnl_385m --workdir=runs/tnl_385m
  Expected: the paper's after 100,000 updates: loss 2.248, perplexity 4.770; after 1.0T tokens: BoolQ 62.14, PIQA 66.70,
    HellaSwag 46.27, WinoGrande 54.46, ARC 55.43 and 27.99.
  Obtained: not run yet.
  """
  return at_340m(**_layers(heads=8))


def tnl_1b() -> TrainConfig:
  """TNL, 16 layers of width 2048 with 16 heads: 0.99B parameters.

  Source: arXiv:2405.17381 sections 4 and 5, tables 2 and 11.
  Command: python experiments/train.py --config=tnl_1b --workdir=runs/tnl_1b
  Expected: the paper's after 100,000 updates: loss 1.896, perplexity 3.729; after 1.2T tokens: BoolQ 63.27, PIQA 72.09,
    HellaSwag 56.49, WinoGrande 60.38, ARC 63.68 and 35.24.
  Obtained: not run yet.
  """
  return at_1b3(depth=16, **_layers(heads=16))


def tnl_3b() -> TrainConfig:
  """TNL, 32 layers of width 2560 with 20 heads: 2.88B parameters, which are sharded over all GPUs.

  Source: arXiv:2405.17381 figure 1 (speed, and loss over 30B tokens).
  Command: python experiments/train.py --config=tnl_3b --workdir=runs/tnl_3b
  Expected: the paper has this size in curves alone.
  Obtained: not run yet.
  """
  return _large(width=2560, depth=32, mlp_width=6912, heads=20)


def tnl_7b() -> TrainConfig:
  """TNL, 30 layers of width 4096 with 32 heads: 6.78B parameters, which are sharded over all GPUs.

  Source: arXiv:2405.17381 section 5, table 2.
  Command: python experiments/train.py --config=tnl_7b --workdir=runs/tnl_7b
  Expected: the paper's after 1.4T tokens: BoolQ 75.87, PIQA 80.09, HellaSwag 75.21, WinoGrande 66.06, ARC 75.42 and
    44.40.
  Obtained: not run yet.
  """
  return _large(width=4096, depth=30, mlp_width=11008, heads=32)


def _layers(heads):
  """Returns the fields of a ModelConfig that all sizes share."""
  return dict(mixer=LightningAttentionConfig(heads=heads), hybrid_layers=(0,),
              hybrid_mixer=LightningAttentionConfig(heads=heads, lrpe=True), norm="simple_rms", mlp="sglu",
              scale_embeddings=True, vocab_size=50272)


def _large(width, depth, mlp_width, heads):
  """Returns the 1.3B recipe at a size that one GPU does not hold."""
  config = at_1b3(depth=depth, mlp_width=mlp_width, **_layers(heads))
  config.model.width = width
  config.remat, config.unroll = "full", 1  # under the scan no more than a layer's parameters are gathered at a time
  config.mesh = MeshConfig(data=1, fsdp=-1)
  return config
