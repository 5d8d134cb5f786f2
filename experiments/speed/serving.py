"""Throughput of a server on the first device, with prompts and answers of mixed lengths. The weights are untrained."""

import dataclasses
import statistics
import time
from typing import ClassVar

import numpy as np

from lin_jax.generate import Sampling
from lin_jax.serving import Request, Server

from . import decoding


@dataclasses.dataclass(frozen=True)
class Serving:
  """The time in which `rows` rows answer `requests` requests, which are all there at the beginning.

  The lengths of prompts and answers are drawn between 1/64 of the longest and the longest, evenly in their logarithm.
  The answers are greedy, and none ends before its length.
  """

  name: str
  tiny: bool
  rows: int
  requests: int
  longest_prompt: int
  longest_answer: int
  piece: int
  stride: int
  repeats: int
  results: ClassVar[tuple[str, ...]] = ("tokens_per_s", "prompt_tokens_per_s", "seconds", "rows_in_use",
                                        "recurrent_mib_per_row", "cache_mib_per_row", "state_mib")

  def measure(self) -> dict:
    model = decoding.untrained_model(self.name, self.tiny)
    server = Server(model, rows=self.rows, max_length=self.longest_prompt + self.longest_answer, piece=self.piece,
                    stride=self.stride)
    requests = self.drawn(model.embedding.shape[0])
    server.warm_up(len(request.prompt) for request in requests)
    runs = [_seconds(server, requests) for _ in range(self.repeats)]
    seconds, calls = statistics.median(seconds for seconds, _ in runs), runs[0][1]
    read, answered = (sum(sizes) for sizes in zip(*((len(r.prompt), r.max_tokens) for r in requests), strict=True))
    recurrent, cache = (round(part / 2**20, 4) for part in server.row_bytes)
    return {"tokens_per_s": round(answered / seconds, 1), "prompt_tokens_per_s": round(read / seconds, 1),
            "seconds": round(seconds, 4), "rows_in_use": round(answered / (calls * self.rows * self.stride), 4),
            "recurrent_mib_per_row": recurrent, "cache_mib_per_row": cache,
            "state_mib": round(server.total_bytes / 2**20, 4)}

  def drawn(self, vocabulary: int) -> list[Request]:
    """The requests, which are the same in every run."""
    random = np.random.default_rng(0)
    sizes = 64.0 ** -random.random((self.requests, 2)) * (self.longest_prompt, self.longest_answer)
    return [Request(random.integers(vocabulary, size=prompt).tolist(), answer, Sampling(temperature=0))
            for prompt, answer in np.ceil(sizes).astype(int).tolist()]


def line(row: dict) -> str:
  """Formats a record."""
  made = row["setting"]
  return (f"{made['rows']:>3} rows, {made['requests']} requests: {row['tokens_per_s']:,.0f} tokens per s drawn and "
          f"{row['prompt_tokens_per_s']:,.0f} read, {100 * row['rows_in_use']:.0f}% of the rows in use, state per row "
          f"{row['recurrent_mib_per_row']:,.2f} MiB recurrent and {row['cache_mib_per_row']:,.2f} in caches")


def _seconds(server, requests):
  """The time of all answers, and the number of decoding calls that they took."""
  begin, calls = time.perf_counter(), 0
  for request in requests:
    server.submit(request)
  while server.busy:
    calls += bool(server.step())
  return time.perf_counter() - begin, calls
