"""The points of findings in words: how many hold, and which ones decided a verdict."""

from collections.abc import Sequence

from .claim import FAILS, HOLDS, NOT_COUNTED, NOT_RUN, UNDECIDED, Finding

CLASSES = "reproduced", "contradicted", "in part", "undecided", "not run"


def classified(findings: Sequence[Finding]) -> str:
  """Returns the one of `CLASSES` for a sentence, given its findings, one per setting. Settings that are not run
  do not count. The others decide nothing if most of them are undecided, or if they contradict each other."""
  verdicts = [verdict for finding in findings if (verdict := finding.verdict) != NOT_RUN]
  decided = [verdict for verdict in verdicts if verdict != UNDECIDED]
  if 2 * len(decided) < len(verdicts) or not verdicts:
    return "undecided" if verdicts else "not run"
  return {frozenset((HOLDS,)): "reproduced", frozenset((FAILS,)): "contradicted",
          frozenset((HOLDS, FAILS)): "undecided"}.get(frozenset(decided), "in part")


def counted(findings: Sequence[Finding]) -> str:
  """Says how many points of all the findings hold, such as "2 of 4, 1 undecided"."""
  total = {kind: sum(finding.counts()[kind] for finding in findings) for kind in (HOLDS, FAILS, UNDECIDED, NOT_COUNTED)}
  known = sum(total.values()) - total[NOT_COUNTED]
  rest = [f"{total[kind]} {kind}" for kind in (UNDECIDED, NOT_COUNTED) if total[kind]]
  return ", ".join([f"{total[HOLDS]} of {known}", *rest])


def decided_by(finding: Finding) -> str:
  """Names the points that hold, that do not, and that are too close, if the claim has names for them."""
  parts = [f"{word}: {', '.join(found)}" for holds, word in ((True, "yes"), (False, "no"), (None, "too close"))
           if (found := finding.named(holds))]
  if len(finding.points) < 2 or finding.verdict in (HOLDS, NOT_RUN) or not parts:
    return counted([finding])
  return f"{counted([finding])}; {'; '.join(parts)}"


