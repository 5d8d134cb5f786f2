"""Sweeps by name: lists of runs, and the runs that follow from their results (`plan.py`).

FLOPs count forward and backward pass (`lin_jax.flops`). `experiments/next_runs.py` says how many minutes of one GPU a
sweep has left.

  main     27 runs of 29.5M tokens at three rates, 2.1e17 FLOPs, then rates and seeds that follow
  main_normal  22 runs of 29.5M tokens at two rates, then what follows; shares Mamba with main
  gates    12 runs of 29.5M tokens, 9e16 FLOPs; shares GLA with main
  norms    16 runs of 19.7M tokens, 8e16 FLOPs
  lengths  14 runs of 29.5M tokens, 1.1e17 FLOPs
  convolutions  6 runs of 29.5M tokens more than main has, 4.7e16 FLOPs
  long     12 runs of 118M tokens, 3.7e17 FLOPs
  linearized  16 runs of 29.5M tokens, of which eight share two Transformers; its records are in linearized.jsonl
  starts, norms_eps, carried  mended protocols beside the first ones, runs of 29.5M and 19.7M tokens
  gap      per model three rates at 30M tokens, then branches up to 500M: 640M tokens, and for four models 270M or 370M
           more for another rate; its records are in gap.jsonl
  papers_layer  5 runs of 400M tokens with 136M parameters; its records are in papers_layer.jsonl
"""

import dataclasses

from . import models
from .models import CARRIED, COMPARED, CONVOLUTIONS, DECAYS, NORM_AND_ACTIVATION, SLOW, SMALL_EPS, SPREAD, STAGGERED
from .runs import TOKENS_PER_STEP, Run

RATES = 2e-3, 1e-3, 4e-3  # most promising first, so that a sweep that is cut short has it for all models
# Pairs of models and a factor: the first is claimed to have fewer bits than the second times the factor.
LEVEL = 1.01
MAIN_PAIRS = (("gla", "retnet", 1.0), ("gla", "transformer", LEVEL), ("gla", "mamba", LEVEL),
              ("tnl", "transformer", 1.0), ("deltanet", "retnet", 1.0), ("deltanet", "gla", 1.0),
              ("deltanet", "mamba", LEVEL), ("deltanet", "transformer", LEVEL),
              ("deltanet_swa", "deltanet", 1.0), ("deltanet_swa", "transformer", 1.0),
              ("deltanet_global", "deltanet", 1.0), ("deltanet_global", "transformer", 1.0),
              ("gated_deltanet", "deltanet", 1.0))


@dataclasses.dataclass(frozen=True)
class Sweep:
  """The runs that try each model's learning rates with seed 0, and what follows from their results."""

  runs: list[Run]
  further_seeds: int = 0  # at each model's best rate
  bracket: bool = False  # doubles a model's highest rate while it is its best, and halves the lowest
  pairs: tuple[tuple[str, str, float], ...] = ()  # comparisons; models of close ones get more seeds
  longer: tuple[tuple[int, int], ...] = ()  # steps and decay steps of branches at the best rate, model after model
  ends: tuple[str, ...] = ()  # models that get a second seed at the shortest and the longest branch
  slower: tuple[tuple[int, int], ...] = ()  # branches of the models in `ends` at half their best rate
  decides: str = ""  # what its runs are for, in the queue


def main() -> Sweep:
  """The language modelling tables of GLA (2312.06635), TNL (2405.17381) and DeltaNet (2406.06484), at small size."""
  return Sweep([Run(model, rate) for rate in RATES for model in COMPARED], further_seeds=1, bracket=True,
               pairs=MAIN_PAIRS, decides="the main tables' claims at 29.5M tokens, with best rates that are bracketed")


def main_normal() -> Sweep:
  """`main`, GLA with convolutions and DeltaNet without, from the start that `ModelConfig` has: kernels from N(0, 0.02).
  """
  compared = [models.from_normal(model) for model in (*COMPARED, *CONVOLUTIONS)]
  pairs = *MAIN_PAIRS, ("gla_conv", "transformer", LEVEL), ("deltanet", "gla_conv", 1.0)
  return Sweep([Run(model, rate) for rate in (RATES[0], RATES[2]) for model in compared], further_seeds=1, bracket=True,
               pairs=tuple((*map(models.from_normal, pair), factor) for *pair, factor in pairs),
               decides="the main tables' claims with the start of the released models' code")


def gates() -> Sweep:
  """GLA's ablation: no decay, constant, per token, per key channel. The paper has 23.21, 16.55, 15.56 and 14.77."""
  return Sweep([Run(model, rate) for rate in RATES for model in (*DECAYS, "gla")], further_seeds=1, bracket=True,
               pairs=(("gla", "scalar_decay", 1.0),), decides="whether a decay per channel beats one per token")


def norms() -> Sweep:
  """DeltaNet's ablation of the keys' norm and activation, in all eight combinations; the paper prints four."""
  return Sweep([Run(model, rate, steps=600) for rate in RATES[:2] for model in NORM_AND_ACTIVATION], further_seeds=1,
               bracket=True, decides="L2 or L1 norm of keys, at rates that are bracketed")


def norms_eps() -> Sweep:
  """`norms` with an eps that leaves the head norm on for the short outputs of L1 keys."""
  return Sweep([Run(model, rate, steps=600) for rate in (RATES[0], RATES[2]) for model in SMALL_EPS], further_seeds=1,
               decides="whether L1 keys win only where eps switches the head norm off")


def convolutions() -> Sweep:
  """DeltaNet without its short convolutions and GLA with some, beside the models that they come from and RetNet.

  In DeltaNet's paper, at 340M: DeltaNet 28.24 and 29.08 without, GLA 28.65 and 29.47 with convolutions, RetNet 32.33.
  """
  compared = *CONVOLUTIONS, "deltanet", "gla", "retnet"
  return Sweep([Run(model, rate) for rate in RATES for model in compared], further_seeds=1, bracket=True,
               decides="what short convolutions are worth, at rates that are bracketed")


def starts() -> Sweep:
  """Slow decays for few heads, and GLA's gates spread over slow time constants, also from N(0, 0.02)."""
  compared = *SLOW, *SPREAD, "gla_normal", "gla_spread_normal", "retnet_slow_normal"
  return Sweep([Run(model, rate) for rate in (RATES[2], RATES[0]) for model in compared], further_seeds=1,
               bracket=True, decides="whether slow heads and GLA's start explain that GLA and RetNet are level")


def lengths() -> Sweep:
  """Models with a context of 512, to be evaluated on longer texts. Two carry the state over 12 windows in a row."""
  single = "gla", "retnet", "tnl", "transformer", "deltanet"
  return Sweep([Run(model, RATES[0], sequence_length=512) for model in single]
               + [Run(model, RATES[0], sequence_length=512, carried_windows=12) for model in CARRIED], further_seeds=1,
               decides="texts beyond the length of training")


def carried() -> Sweep:
  """States carried over 12 windows by rows that change their text at different steps. `lengths` has GLA without."""
  return Sweep([Run(model, RATES[0], sequence_length=512, carried_windows=12, staggered=True) for model in STAGGERED]
               + [Run("retnet_slow", RATES[0], sequence_length=512)], further_seeds=1,
               decides="whether carrying the state costs because all rows changed their text at once")


def long() -> Sweep:
  """`main` at four times the tokens, to see whether its order lasts when models have seen more text.

  The runs have `main`'s first learning rate, and another one where that was better there by more than its seeds differ.
  """
  faster = "gla", "tnl", "mamba"
  return Sweep([Run(model, RATES[0], steps=3600) for model in COMPARED]
               + [Run(model, RATES[2], steps=3600) for model in faster], pairs=MAIN_PAIRS,
               decides="the main tables' claims at 118M tokens: Mamba's rate, and seeds of close pairs")


def linearized() -> Sweep:
  """Transformers that SUPRA (2405.06640) makes linear, uptrained on 5 and 20% of their tokens; all for the same total.

  Transformer++ and GLA have their best rates of `main`. The uptraining, which the paper gives the rate of its start,
  has lower ones besides, and other seeds, with which it reads the text in another order.
  """
  scratch = [Run("transformer", 2e-3), Run("gla", 4e-3), *(Run("supra", rate) for rate in RATES)]
  uptrained = [Run(f"linearized_{share}", rate, seed=1, steps=steps, start=Run("transformer", 2e-3, steps=900 - steps))
               for rate in (2e-3, 1e-3, 5e-4) for share, steps in UPTRAINED.items()]
  return Sweep(scratch + uptrained, further_seeds=1, decides="SUPRA's claims")


UPTRAINED = {5: 43, 20: 150}  # steps by their percentage of the steps before, which are 900 without these

GAP_MODELS = tuple(models.from_normal(name) for name in (
    "transformer", "gla", "gated_deltanet", "gla_conv", "deltanet", "retnet_slow", "tnl", "deltanet_no_conv", "kda"))
GAP_TOKENS = 30, 60, 120, 250, 500  # millions


def gap() -> Sweep:
  """The gap to Transformer++ against the number of tokens, at a constant rate that falls in the last fifth of a branch.

  The models' rates are chosen at the shortest length. Four models have half of that rate besides at 120M and 250M,
  because longer runs often want a lower one, and at 500M the rate that is better at 250M. Models come one after the
  other, so that a sweep that is cut short has whole curves. The text is `data/english_code`, where 500M tokens are less
  than 2.5 epochs.
  """
  steps = [round(tokens * 1e6 / TOKENS_PER_STEP) for tokens in GAP_TOKENS]
  first, *longer = ((count, count // 5) for count in steps)
  return Sweep([Run(model, rate, steps=first[0], decay_steps=first[1]) for model in GAP_MODELS for rate in RATES],
               bracket=True, longer=tuple(longer), ends=GAP_MODELS[:4], slower=tuple(longer[1:3]),
               decides="whether the gap to Transformer++ closes with tokens")


def papers_layer() -> Sweep:
  """The papers' layers at their own width and context, 400M tokens each, with losses by the place in a document and the
  recall of facts from held-out pages.

  The control with resets says whether a model that stays flat over long texts uses them or ignores them. Recall says
  how far back it still finds what it has read.
  """
  return Sweep([Run(model, 1e-3, steps=12207, sequence_length=2048, by_place=True) for model in models.WIDE],
               decides="the main tables' order with the papers' own layers, and whether flat models use and recall "
                       "long context")


SWEEPS = {function.__name__: function for function in (
    main, main_normal, gates, norms, convolutions, lengths, long, linearized, starts, norms_eps, carried, gap,
    papers_layer)}
# The records of a sweep, and its dataset, where they are not language.jsonl and data/english.
FILES = {"linearized": "linearized.jsonl", "gap": "gap.jsonl", "papers_layer": "papers_layer.jsonl"}
DATA = dict.fromkeys(("gap", "papers_layer"), "data/english_code")
CURVES = ("gap",)  # sweeps of one model at several lengths, which a picture shows
