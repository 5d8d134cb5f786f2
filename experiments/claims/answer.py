"""The opening of the page of claims: in a few sentences, what was reproduced, what was contradicted, what stays open.

The numbers and the heading of each sentence follow from the records. A sentence whose records are missing is left out.
"""

import re
import textwrap

from . import language, lengths, speed
from .claim import Claim, Finding, Results
from .points import classified

_HEADINGS = {"reproduced": "The runs here reproduce that", "contradicted": "They contradict that",
             "in part": "They reproduce in part that", "undecided": "They do not decide whether"}
# For claims that the opening has, by the beginning of their sentence: that sentence in short. A name in braces is a
# sweep and one of its models, whose bits per byte it becomes.
_SHORT = {
    "The finer the decay the better": "a decay matters (none {gates.no_decay}, constant {gates.constant_decay}, one "
                                      "per token {gates.scalar_decay})",
    "Short convolutions make DeltaNet": "short convolutions help DeltaNet ({convolutions.deltanet_no_conv} to "
                                        "{convolutions.deltanet}; from N(0, 0.02) to {main_normal.deltanet_normal})",
    "Gated DeltaNet models text better": "Gated DeltaNet is better than DeltaNet ({main.gated_deltanet}, "
                                         "{main.deltanet}; from N(0, 0.02) {main_normal.gated_deltanet_normal}, "
                                         "{main_normal.deltanet_normal}; after 118M tokens {long.gated_deltanet}, "
                                         "{long.deltanet})",
    "Under 1 + ELU": "under 1 + ELU, keys of L2 norm are better than keys of L1 norm ({norms.deltanet_l2_elu1}, "
                     "{norms.deltanet_l1_elu1})",
    "GLA, RetNet and TransNormerLLM stay": "GLA, RetNet and TransNormerLLM stay as good up to 32 times the trained "
                                           "length, and softmax attention does not (losses {length.gla}, "
                                           "{length.retnet}, {length.tnl} and {length.transformer} times as high)",
    "GLA trains faster than Transformer++": "GLA at 1.3B trains {speed.gla_fig6.gla_1b3.transformer_1b3.16384} times "
                                            "as fast as Transformer++ at 16K tokens",
    "TransNormerLLM trains faster": "TransNormerLLM trains {speed.tnl.tnl_385m.transformer_385m.65536} times as fast "
                                    "as the Transformer at 64K tokens",
    "Short convolutions do not make GLA": "short convolutions do not help GLA (without {convolutions.gla}, with "
                                          "{convolutions.gla_conv}; from N(0, 0.02) {main_normal.gla_normal}, "
                                          "{main_normal.gla_conv_normal})",
    "TransNormerLLM models text better": "TransNormerLLM is better than Transformer++ ({main.tnl}, "
                                         "{main.transformer}; after 118M tokens {long.tnl}, {long.transformer})",
    "GLA is level with Transformer++": "GLA is level with Transformer++ and Mamba ({main.gla}, {main.transformer}, "
                                       "{main.mamba}; after 118M tokens {long.gla}, {long.transformer}, {long.mamba})",
    "Without short convolutions, too": "DeltaNet without convolutions is better than RetNet "
                                       "({convolutions.deltanet_no_conv}, {convolutions.retnet})",
    "DeltaNet models text better": "DeltaNet is better than RetNet and GLA and level with Mamba and Transformer++ "
                                   "({main.deltanet}, {main.retnet}, {main.gla}, {main.mamba}, {main.transformer}; "
                                   "from N(0, 0.02) {main_normal.deltanet_normal}, {main_normal.retnet_normal}, "
                                   "{main_normal.gla_normal}, {main.mamba}, {main_normal.transformer_normal})",
    "GLA models text better": "GLA is better than RetNet (after 118M tokens {long.gla}, {long.retnet}; after 29.5M "
                              "{main.gla}, {main.retnet}; from N(0, 0.02) {main_normal.gla_normal}, "
                              "{main_normal.retnet_normal})",
    "A decay per key channel": "a decay per key channel is better than one per token ({gates.gla}, "
                               "{gates.scalar_decay})",
    "Both hybrids": "hybrids beat DeltaNet and Transformer++ (with windows {main.deltanet_swa}, with two attention "
                    "layers {main.deltanet_global}, DeltaNet {main.deltanet}, Transformer++ {main.transformer}; from "
                    "N(0, 0.02), in the same order, {main_normal.deltanet_swa_normal}, "
                    "{main_normal.deltanet_global_normal}, {main_normal.deltanet_normal} and "
                    "{main_normal.transformer_normal})"}
WITH_CARE = """
- The models have an eighth of the papers' smallest size, and saw 500 times fewer tokens, at one to five learning
  rates. Where the highest was the best, as in the sweeps `norms` and `convolutions`, a higher one may be better.
- RetNet and the constant decay have two heads here, with time constants of 32 and 64 tokens. The paper's four heads
  reach 256.
- GLA's gates start at a time constant of 23 tokens, as its authors' do, and 900 steps can move a bias only so far. Its
  output gate starts quieter than theirs, but for the runs from N(0, 0.02).
- Short convolutions start with a deviation of 0.29, but for the runs from N(0, 0.02), which is where the released
  models' code starts them and what a new config has. From there GLA with convolutions and Gated DeltaNet are better by
  0.10, DeltaNet by 0.03 and its hybrids by 0.02 to 0.04, by one or two seeds. Models without convolutions gain
  nothing.
- The curves against tokens have one seed per model, and differences below 0.024 say nothing. Each model's rate was
  chosen after 30M tokens. Longer runs often want a lower one: half of it was tried for Transformer++, where it is
  worse, and for GLA, where it is level. The other two models have not tried it.
- Under L1 keys the outputs are so short that the head norm's eps switches it off, where L1 wins (SiLU, no activation).
- A model that ignores all beyond 128 tokens is flat at any length. No run resets the state as a control.
- Rows that carried their state have a higher loss everywhere, also where they go on to other text one after the other.
- The chunkwise delta rule is compared with a scan of this repository, and in a row of its own with a recurrent kernel,
  as in the paper. That kernel's gradient of the queries is too far off in three of nine cases, which do not count.
- Synthetic tasks have a quarter of the papers' epochs.
"""


def opening(results: Results, found: dict[Claim, Finding]) -> list[str]:
  """Returns the paragraphs."""
  texts = {name: [] for name in _HEADINGS}
  for start, short in _SHORT.items():
    findings = [finding for claim, finding in found.items() if claim.text.startswith(start)]
    try:
      text = _filled(short, results)
    except KeyError:  # its records are not there
      continue
    if (name := classified(findings)) in texts:
      texts[name].append(text)
  return [_wrapped("Language models here have 42M parameters and saw 29.5M tokens of English, or 118M where it says "
                   "so. The papers' tables have 340M and 15B. Numbers are bits per byte where nothing else is said. "
                   "*From N(0, 0.02)* marks runs whose kernels, but for Mamba's, start from that distribution, as in "
                   "the released models' code. The others have this library's earlier start."),
          *("\n".join([f"**{_HEADINGS[name]}**\n", *(_wrapped(f"- {part}", "  ") for part in parts)])
            for name, parts in texts.items() if parts)]


def _filled(short, results):
  """The sentence with its numbers. Raises KeyError where one has no records."""
  return re.sub(r"\{([^}]+)\}", lambda name: _number(results, *name[1].split(".")), short)


def _number(results, kind, *parts):
  if kind == "speed":
    sweep, model, other, length = parts
    _, rows = speed.training(results, sweep)
    return f"{rows[model, int(length)]['tokens_per_s'] / rows[other, int(length)]['tokens_per_s']:.2f}"
  model, = parts
  if kind == "length":
    if (ratio := lengths.growth(results, model)) is None:
      raise KeyError(model)
    return f"{ratio:.2f}"
  return f"{language.rows(results, kind)[model]['bits_per_byte']:.3f}"


def _wrapped(text, indent=""):
  return textwrap.fill(text, width=120, break_on_hyphens=False, subsequent_indent=indent)
