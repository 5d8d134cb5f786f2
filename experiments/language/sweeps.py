"""Sweeps by name: lists of runs, and the runs that follow from their results.

FLOPs count forward and backward pass (`lin_jax.flops`). The minutes are for training and for compilation. They are
predicted for one H100 and not measured, from 0.65M tokens per second on average (Mamba a third of that) and 10 to 20
seconds to compile a program that is not in the cache.

  main     36 runs of 29.5M tokens, 2.8e17 FLOPs: 27 minutes, and 9 for 27 programs
  gates    16 runs of 29.5M tokens, 1.2e17 FLOPs: 11 minutes, and 4; 3 of them fewer after main, whose GLA it shares
  norms    24 runs of 19.7M tokens, 1.2e17 FLOPs: 12 minutes, and 5
  lengths  14 runs of 29.5M tokens, 1.1e17 FLOPs: 10 minutes, and 3
  convolutions  8 runs of 29.5M tokens, 6.2e16 FLOPs: 6 minutes, and 2; after main, with which it shares 12 more
  long     12 runs of 118M tokens, 3.7e17 FLOPs: 46 minutes, and 4
  linearized  16 runs of 29.5M tokens, of which eight share two Transformers: 314M tokens, 8 minutes, and 4 for 13
              programs; its records are in linearized.jsonl, with the loss on repeated pairs of tokens
"""

import dataclasses
import math
from collections.abc import Callable

from .models import CARRIED, COMPARED, CONVOLUTIONS, DECAYS, NORM_AND_ACTIVATION
from .runs import Run

RATES = 2e-3, 1e-3, 4e-3  # most promising first, so that a sweep that is cut short has it for all models


@dataclasses.dataclass(frozen=True)
class Sweep:
  """Runs with seed 0, and `further_seeds` more at each model's best learning rate among them."""

  runs: list[Run]
  further_seeds: int


def main() -> Sweep:
  """The language modelling tables of GLA (2312.06635), TNL (2405.17381) and DeltaNet (2406.06484), at small size."""
  return Sweep([Run(model, rate) for rate in RATES for model in COMPARED], further_seeds=1)


def gates() -> Sweep:
  """GLA's ablation: no decay, constant, per token, per key channel. The paper has 23.21, 16.55, 15.56 and 14.77."""
  return Sweep([Run(model, rate) for rate in RATES for model in (*DECAYS, "gla")], further_seeds=1)


def norms() -> Sweep:
  """DeltaNet's ablation of the keys' norm and activation, in all eight combinations; the paper prints four."""
  return Sweep([Run(model, rate, steps=600) for rate in RATES[:2] for model in NORM_AND_ACTIVATION], further_seeds=1)


def convolutions() -> Sweep:
  """DeltaNet without its short convolutions and GLA with some, beside the models that they come from and RetNet.

  In DeltaNet's paper, at 340M: DeltaNet 28.24 and 29.08 without, GLA 28.65 and 29.47 with convolutions, RetNet 32.33.
  """
  models = *CONVOLUTIONS, "deltanet", "gla", "retnet"
  return Sweep([Run(model, rate) for rate in RATES for model in models], further_seeds=1)


def lengths() -> Sweep:
  """Models with a context of 512, to be evaluated on longer texts. Two carry the state over 12 windows in a row."""
  models = "gla", "retnet", "tnl", "transformer", "deltanet"
  return Sweep([Run(model, RATES[0], sequence_length=512) for model in models]
               + [Run(model, RATES[0], sequence_length=512, carried_windows=12) for model in CARRIED], further_seeds=1)


def long() -> Sweep:
  """`main` at four times the tokens, to see whether its order lasts when models have seen more text.

  The runs have `main`'s first learning rate, and another one where that was better there by more than its seeds differ.
  """
  faster = "gla", "tnl", "mamba"
  return Sweep([Run(model, RATES[0], steps=3600) for model in COMPARED]
               + [Run(model, RATES[2], steps=3600) for model in faster], further_seeds=0)


def linearized() -> Sweep:
  """Transformers that SUPRA (2405.06640) makes linear, uptrained on 5 and 20% of their tokens; all for the same total.

  Transformer++ and GLA have their best rates of `main`. The uptraining, which the paper gives the rate of its start,
  has lower ones besides, and other seeds, with which it reads the text in another order.
  """
  scratch = [Run("transformer", 2e-3), Run("gla", 4e-3), *(Run("supra", rate) for rate in RATES)]
  uptrained = [Run(f"linearized_{share}", rate, seed=1, steps=steps, start=Run("transformer", 2e-3, steps=900 - steps))
               for rate in (2e-3, 1e-3, 5e-4) for share, steps in UPTRAINED.items()]
  return Sweep(scratch + uptrained, further_seeds=1)


UPTRAINED = {5: 43, 20: 150}  # steps by their percentage of the steps before, which are 900 without these

SWEEPS = {function.__name__: function for function in (main, gates, norms, convolutions, lengths, long, linearized)}


def further(sweep: Sweep, bits_per_byte: Callable[[Run], float | None]) -> list[Run]:
  """Returns the runs with other seeds, for models whose learning rates are all done.

  `bits_per_byte` of a run is None until it is done, and infinite if it diverged.
  """
  found = []
  for model in dict.fromkeys(run.model for run in sweep.runs):
    scores = {run: bits_per_byte(run) for run in sweep.runs if run.model == model}
    if None in scores.values() or math.isinf(min(scores.values())):
      continue
    best = min(scores, key=scores.get)
    found += [dataclasses.replace(best, seed=best.seed + 1 + i) for i in range(sweep.further_seeds)]
  # One seed of every model comes before the next seed, so that a sweep that is cut short has one for all.
  return sorted(found, key=lambda run: run.seed)
