"""A progress line on stderr, which a terminal rewrites in place and a log gets as a new line now and then."""

import sys
import time


class Progress:
  """`label  done/total  detail  elapsed`, at most twice per second (terminal) or once per ten seconds (log)."""

  def __init__(self, label: str, total: int | None = None):
    self._label, self._total = label, total
    self._terminal = sys.stderr.isatty()
    self._start = self._shown = time.monotonic()
    self._drawn = False

  def update(self, done: int, detail: str = "") -> None:
    """Shows `done` of the total, unless it showed a line a moment ago."""
    now = time.monotonic()
    if now - self._shown >= (0.5 if self._terminal else 10):
      self._shown = now
      self._draw(done, detail)

  def close(self, done: int, detail: str = "") -> None:
    """Shows the last line."""
    self._draw(done, detail)
    if self._terminal:
      print(file=sys.stderr, flush=True)

  def _draw(self, done, detail):
    count = f"{done:,}" if self._total is None else f"{done:,}/{self._total:,} ({100 * done // max(self._total, 1)}%)"
    line = f"{self._label}  {count}  {detail}  {time.monotonic() - self._start:.0f} s"
    start, end = ("\r\033[K", "") if self._terminal else ("", "\n")
    print(start + line, end=end, file=sys.stderr, flush=True)
