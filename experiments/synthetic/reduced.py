"""The sweeps that were made first, as lists of runs: the papers' grids, reduced so that one GPU takes hours.

`sweeps.py` has the authors' protocols, which differ in more than their length. These sweeps stay because many records
belong to them. They have three learning rates and one weight decay, the library's own starts, and a quarter of the
epochs (but all 200 of memorization). MQAR has seven mixers. MAD has the baselines and the hardest change of each task.
RegBench has one size of model, whose best test and best rate are chosen on the examples that score it.
"""

from .runs import Run

MIXERS = "attention", "linear_attention", "retention", "gla", "mamba", "delta_net", "gated_delta_net"

# MAD's tasks, each with its hardest change.
HARDEST = {"in_context_recall": {"vocab_size": 128}, "noisy_recall": {"noise_fraction": 0.8},
           "fuzzy_recall": {"vocab_size": 128}, "selective_copying": {"copies": 96},
           "compression": {"sequence_length": 256}, "memorization": {"vocab_size": 8192}}


def mqar_reduced() -> list[Run]:
  """GLA's figure 4 and DeltaNet's MQAR figure: blocks without MLP, 100,000 examples, DeltaNet without convolutions."""
  # The papers' grid is 1e-4, 4.6e-4, 2.2e-3, 1e-2. At width 64 GLA recalls less than a twelfth of 16 pairs at
  # both ends, and so does RetNet at the lower end. In their place stands the rate between the other two.
  rates = 4.6e-4, 1e-3, 2.2e-3
  return [Run("mqar", mixer, {"sequence_length": length, "pairs": pairs},
              {"conv_width": 0} if mixer == "delta_net" else {}, width=width, dtype="bfloat16", learning_rate=rate,
              batch_size=batch, steps=16 * 100_000 // batch, examples=100_000, test_examples=3000, evaluate_every=250)
          for length, pairs, batch in ((256, 16, 256), (512, 64, 128)) for width in (64, 128, 256) for mixer in MIXERS
          for rate in rates]


def mad_reduced() -> list[Run]:
  """MAD's tasks at their baselines and at the hardest value of one field, with width 128 and two blocks with an MLP."""
  fields = {mixer: {"heads": 8} for mixer in MIXERS} | {"attention": {"heads": 16}, "linear_attention": {"heads": 16},
                                                        "mamba": {"state_size": 4}}
  return [Run(task, mixer, change, fields[mixer], width=128, mlp_width=256, dtype="bfloat16", learning_rate=rate,
              batch_size=128, steps=400 if task == "memorization" else 5000, final_fraction=1e-6 / rate,
              evaluate_every=100, stop_accuracy=0.999)
          for task, harder in HARDEST.items() for change in ({}, harder) for mixer in MIXERS
          for rate in (1e-3, 5e-4, 1e-4)]


def regbench_reduced() -> list[Run]:
  """RegBench against the number of training sequences, with width 128, four blocks with an MLP and two heads."""
  return [Run("regbench", mixer, {"train_examples": examples}, {} if mixer == "mamba" else {"heads": 2}, width=128,
              depth=4, mlp_width=344, dtype="bfloat16", learning_rate=rate, warmup_steps=examples // 32 * 5,
              final_fraction=0.1, batch_size=32, steps=examples // 32 * 50, test_examples=500,
              evaluate_every=examples // 32, stop_accuracy=1.0, embedding_dropout=0.1)
          for examples in (1000, 2500, 5000, 10_000) for mixer in MIXERS for rate in (5e-4, 2.5e-4, 1e-3)]
