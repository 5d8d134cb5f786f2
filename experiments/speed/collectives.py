"""The communication of a compiled program: how many collectives of each kind run, and how many bytes they give."""

import collections
import math
import re

# A collective with its result: an array, a tuple of arrays, or for the start of an asynchronous one a tuple of operands
# and results.
_COLLECTIVE = re.compile(
    r" = (.*?) (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(-start)?\(")
_ARRAY = re.compile(r"([a-z]+)(\d*)\w*\[([\d,]*)\]")
_COMPUTATION = re.compile(r"(?:ENTRY )?%([\w.-]+) \(")
_CALL = re.compile(r"(?:body|calls|to_apply)=%([\w.-]+)(?:.*?known_trip_count\D+(\d+))?")


def collectives(program: str) -> dict[str, tuple[int, int]]:
  """Returns by kind the number of collectives that one device takes part in, and the bytes of their results.

  `program` is the text of a compiled program of several devices, `compiled.as_text()`. A collective in a loop counts as
  often as the loop repeats. Results of a single number (losses, counts, norms) add no bytes, and a collective of
  nothing else is left out.
  """
  found, callers, times = [], {}, {}
  computation = ""
  for line in program.splitlines():
    if header := _COMPUTATION.match(line):
      computation = header[1]
    for callee, trips in _CALL.findall(line):
      callers[callee], times[callee] = computation, int(trips or 1)
    if match := _COLLECTIVE.search(line):
      found.append((computation, match[2], _bytes(match[1], started=match[3])))

  def repetitions(computation):
    caller = callers.get(computation)
    return times[computation] * repetitions(caller) if caller else 1

  totals = collections.defaultdict(lambda: (0, 0))
  for computation, kind, size in found:
    if size:
      count, before = totals[kind]
      repeated = repetitions(computation)
      totals[kind] = count + repeated, before + repeated * size
  return dict(totals)


def _bytes(result, started):
  """Bytes of the arrays of a result, of more than a single number each."""
  arrays = _ARRAY.findall(result)
  if started:
    arrays = arrays[len(arrays) // 2:]  # the operands come first
  shapes = [(int(bits or 8), [int(n) for n in shape.split(",") if n]) for _, bits, shape in arrays]
  return sum(math.prod(shape) * bits // 8 for bits, shape in shapes if shape)
