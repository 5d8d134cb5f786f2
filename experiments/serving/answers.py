"""Answers as texts, for a file of requests and for a person who types prompts."""

import dataclasses
import sys
import time
from collections.abc import Iterator, Sequence
from typing import BinaryIO

from lin_jax.chat import ChatTemplate
from lin_jax.serving import Request, Server
from lin_jax.tokenizer import Tokenizer, stream_decode

from .requests import TextRequest, to_ids


@dataclasses.dataclass
class Counts:
  """What a server has done, in tokens and seconds."""

  read: int = 0
  drawn: int = 0
  seconds: float = 0.0

  def line(self, server: Server) -> str:
    """Says so, with the rate and the memory of the rows."""
    recurrent, cache = server.row_bytes
    return (f"{self.read:,} tokens read and {self.drawn:,} generated in {self.seconds:.2f} s "
            f"({self.drawn / max(self.seconds, 1e-9):,.0f} tokens/s); state of {recurrent + cache:,} bytes per row "
            f"({recurrent:,} recurrent, {cache:,} in caches), {server.total_bytes:,} bytes in all (rows: "
            f"{server.rows}, and one for the prompt being read)")


def answer(server: Server, tokenizer: Tokenizer, requests: Sequence[tuple[TextRequest, Request]], counts: Counts,
           chat: ChatTemplate | None = None) -> Iterator[dict]:
  """Yields the result of each request when it ends: its id, the text, the number of tokens and why it ended.

  A stop text and the end of the document count as "stop", and the end of `max_tokens` as "length".
  """
  server.warm_up(len(request.prompt) for _, request in requests)
  begin, answers = time.perf_counter(), {}
  for asked, request in requests:
    answers[server.submit(request)] = asked, []
    counts.read += len(request.prompt)
  for progress in server.finish():
    asked, ids = answers[progress.id]
    ids += progress.tokens
    counts.drawn += len(progress.tokens)
    counts.seconds = time.perf_counter() - begin
    if asked.stop or progress.ended:
      text = "".join(stream_decode(tokenizer, ids, first=bool(chat) or not asked.prompt))
      ends = [at for stop in asked.stop if (at := text.find(stop)) >= 0]
      if ends:
        server.cancel(progress.id)
      if ends or progress.ended:
        yield {"id": asked.id, "text": text[:min(ends, default=None)], "tokens": len(ids),
               "ended": "stop" if ends else progress.ended}


def converse(server: Server, tokenizer: Tokenizer, defaults: TextRequest, lines: BinaryIO, counts: Counts,
             chat: ChatTemplate | None = None) -> None:
  """Answers each of `lines` on its own, and prints the text as it is drawn. A line that it cannot answer is an error
  on one line of standard error, and the next one follows."""
  server.warm_up([1])
  for number, line in enumerate(lines, 1):
    try:
      asked = dataclasses.replace(defaults, prompt=line.decode("utf-8").rstrip("\r\n"))
      request = to_ids(asked, tokenizer, chat)
      server.submit(request)
    except ValueError as e:
      print(f"line {number}: {e}", file=sys.stderr, flush=True)
      continue
    begin, ids = time.perf_counter(), []
    drawn = (ids.append(token) or token for progress in server.finish() for token in progress.tokens)
    for text in stream_decode(tokenizer, drawn, first=bool(chat) or not asked.prompt):
      print(text, end="", flush=True)
    print(flush=True)
    counts.read += len(request.prompt)
    counts.drawn += len(ids)
    counts.seconds += time.perf_counter() - begin
