"""The papers' claims, judged by this repository's records: `CLAIMS` in the order of the results page."""

from . import gap, kernels, language, lengths, linearized, speed, synthetic
from .claim import Claim, Finding, Results

__all__ = ["CLAIMS", "KINDS", "Claim", "Finding", "Results"]

KINDS = {"Language modelling at matched size and tokens": language.claims() + gap.claims() + linearized.claims(),
         "Texts longer than in training": lengths.claims(),
         "Synthetic tasks": synthetic.claims(),
         "Speed of kernels": kernels.claims(),
         "Speed of training and decoding": speed.claims()}
CLAIMS = [claim for claims in KINDS.values() for claim in claims]
