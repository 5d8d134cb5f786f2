"""The grids of MQAR, MAD and RegBench by the protocols of their authors, as lists of runs.

The most decisive runs come first, and runs that differ in `RATES` alone follow each other. MQAR and MAD choose the best
run, and MAD its weight decay, on the examples that score it, as their authors do. RegBench has a validation set.

What is not the authors' own: MQAR's activations are bfloat16, because the delta rule's published kernel takes nothing
wider, its norms are RMSNorm, and attention has rotary positions; width 512 is left out. Weight decay spares norms,
biases and convolutions. RegBench has one size of model, and SwiGLU in place of an MLP of the same number of parameters.
Its grid of rates reaches further up, because DeltaNet's and Mamba's best rates stood at its edge.
"""

from . import TASKS
from .reduced import HARDEST
from .runs import Run

CLAIMED = "delta_net", "attention", "gla", "mamba"  # the mixers that the claims on MAD and RegBench compare
_SHORT, _LONG, _WIDTHS = (256, 16), (512, 64), (64, 128, 256)
_MAD_TASKS = ("fuzzy_recall", "memorization", "in_context_recall", "noisy_recall", "selective_copying", "compression")
_MAD_FIELDS = {"attention": {"heads": 16}, "gla": {"heads": 8, "expand_k": 1.0}, "mamba": {"state_size": 4},
               "delta_net": {"heads": 8}}


def mqar() -> list[Run]:
  """The settings of GLA's figure 4 and DeltaNet's MQAR figure that decide a claim: zoology's starts, dropout and rates,
  64 epochs of 100,000 examples, blocks without MLP, DeltaNet without convolutions."""
  settings = [("delta_net", _LONG, width) for width in _WIDTHS]
  settings += [(mixer, _SHORT, width) for width in _WIDTHS for mixer in ("gla", "retention")]
  settings += [("mamba", _LONG, width) for width in _WIDTHS[:2]]
  settings += [("attention", task, width) for task in (_SHORT, _LONG) for width in _WIDTHS]
  settings += [(mixer, _LONG, width) for width in _WIDTHS for mixer in ("gla", "retention")]
  return [run for setting in settings for run in _mqar_runs(*setting)]


def _mqar_runs(mixer, task, width):
  (length, pairs), batch = task, 256 if task == _SHORT else 128
  return [Run("mqar", mixer, {"sequence_length": length, "pairs": pairs},
              {"conv_width": 0} if mixer == "delta_net" else {}, width=width, dtype="bfloat16", norm_eps=1e-5,
              start="zoology", embedding_dropout=0.1, learning_rate=rate, batch_size=batch,
              steps=64 * 100_000 // batch, examples=100_000, test_examples=3000, evaluate_every=250)
          for rate in (1e-4, 4.6e-4, 2.2e-3, 1e-2)]


def mad() -> list[Run]:
  """MAD's baselines and the hardest change of each task, 200 epochs, with the authors' starts, head, decoder and sizes.
  The tasks of claims come before those that only an average needs."""
  return [run for task in _MAD_TASKS for fields in ({}, HARDEST[task]) for mixer in CLAIMED
          for run in _mad_runs(task, mixer, fields)]


def mad_rest() -> list[Run]:
  """The other changes of MAD's tasks. The authors' score of a task is the mean over all."""
  return [run for task in _MAD_TASKS for name, values in TASKS[task].changes.items() for value in values
          if {name: value} != HARDEST[task] for mixer in CLAIMED for run in _mad_runs(task, mixer, {name: value})]


def _mad_runs(task, mixer, fields):
  steps = 200 * (Run(task, mixer, fields).training_examples() // 128)
  return [Run(task, mixer, fields, _MAD_FIELDS[mixer], width=128, mlp_width=352, dtype="bfloat16", norm_eps=1e-5,
              start="mad", output="mad", learning_rate=rate, weight_decay=decay, batch_size=128, steps=steps,
              final_fraction=1e-6 / rate, evaluate_every=100, stop_accuracy=0.999)
          for rate in (1e-3, 5e-4, 1e-4) for decay in (0.0, 0.1)]


def regbench() -> list[Run]:
  """RegBench against the number of training sequences: 200 epochs, 250 sequences for validation and 250 for the test,
  width 128, four blocks with an MLP and two heads, but Mamba without MLP."""
  return [Run("regbench", mixer, {"train_examples": examples}, {} if mixer == "mamba" else {"heads": 2}, width=128,
              depth=4, mlp_width=0 if mixer == "mamba" else 344, dtype="bfloat16", norm_eps=1e-5, learning_rate=rate,
              warmup_steps=examples // 32 * 20, final_fraction=0.1, batch_size=32, steps=examples // 32 * 200,
              test_examples=250, validation_examples=250, evaluate_every=examples // 32, stop_accuracy=1.0,
              embedding_dropout=0.1)
          for examples in (1000, 2500, 5000, 10_000) for mixer in CLAIMED for rate in (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3)]
