"""What a sweep of experiments has left to run."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Unfinished:
  """A sweep, or a part of one, that is not done: its name and command, its runs that are left, their minutes on one
  GPU, and the claim or question that it decides."""

  name: str
  command: str
  runs_left: int
  minutes: float
  decides: str
