"""What the papers claim, and what this repository's records say of it: `CLAIMS` in the order of the results page."""

from . import kernels, language, lengths, speed, synthetic
from .claim import Claim, Finding, Results

__all__ = ["CLAIMS", "Claim", "Finding", "Results"]

CLAIMS = [*language.claims(), *lengths.claims(), *synthetic.claims(), *kernels.claims(), *speed.claims()]
