"""Where the time of a training step goes: groups of kernels, and parts of the model, from the events of a trace.

A group follows from the kernel's name and its HLO instruction. A part follows from the path of named scopes at which
the instruction was traced, `jit(train_step)/transpose(jvp())/.../checkpoint/mixer/...` for instance.
"""

import collections
import dataclasses
import re
from collections.abc import Sequence

OTHER = "other"
UNKNOWN = "no instruction named"
# Our own kernels, each of which is a group.
_FUSED = re.compile(r"^(rms_norm|short_convolution|skip_gate_norm)_")
_OURS = re.compile(rf"^((gla|linear_attention|delta_rule|selective_scan|{_FUSED.pattern[2:-2]})_[a-z_]*[a-z])")
# The first pattern that occurs in the kernel's name or the opcode gives the group of every other kernel.
_GROUPS = {
    "attention": r"fmha|cudnn|flash|sdpa",
    "communication": r"nccl|all-?reduce|all-?gather|reduce-?scatter|all-?to-?all|collective",
    "matrix products": r"gemm|nvjet|cublas|cutlass|xmma|gemv|splitk|\bdot\b|dot_general|_dot_|^dot|ynn_fusion",
    "copies": r"memcpy|memset",
    "reductions": r"reduce(?![-_]?precision)",
    "elementwise": r"fusion|loop|wrapped|elementwise",
}
# Words in the names of fusions that only move data, between words that every fusion may have.
_MOVES = {"copy", "transpose", "bitcast", "concatenate", "slice", "gather", "scatter", "pad", "reverse"}
_NEUTRAL = {"fusion", "loop", "input", "wrapped", "dynamic", "update"}
_SCOPES = re.compile(r"\b(mixer|mlp|head|embed)\b")


@dataclasses.dataclass(frozen=True)
class Event:
  """A kernel's run on the device: times in nanoseconds, opcode and scopes of its HLO instruction or ""."""

  kernel: str
  start: float
  duration: float
  opcode: str = ""
  scopes: str = ""


def group(event: Event) -> str:
  """Returns the group of an event's kernel. Recurrent and fused kernels of this library have a group each."""
  name = event.kernel
  if match := _OURS.match(name):
    return f"{'fused' if _FUSED.match(name) else 'recurrent'}: {match[1]}"
  words = set(re.findall("[a-z]+", name.lower())) - _NEUTRAL
  if words and words <= _MOVES:
    return "copies"
  text = f"{name} {event.opcode}".lower()
  return next((found for found, pattern in _GROUPS.items() if re.search(pattern, text)), OTHER)


def part(event: Event) -> tuple[str, str]:
  """Returns the part of the model and the pass of an event.

  Parts are mixer, mlp, head (with the loss), embed, "layers" for what the gradient contains outside of these, and
  "optimizer" for what stands outside of the gradient: the update, clipping, and casts of weights.
  """
  if not event.scopes:
    return ("mixer" if group(event).startswith("recurrent") else UNKNOWN), "unknown"
  found = _SCOPES.findall(event.scopes)
  if "jvp(" not in event.scopes:
    return "optimizer", "update"
  when = "recomputed" if "rematted_computation" in event.scopes else (
      "backward" if "transpose(" in event.scopes else "forward")
  return (found[0] if found else "layers"), when


def busy(events: Sequence[Event]) -> float:
  """Returns the nanoseconds in which at least one kernel ran."""
  total, end = 0.0, float("-inf")
  for event in sorted(events, key=lambda event: event.start):
    stop = event.start + event.duration
    total += max(0.0, stop - max(end, event.start))
    end = max(end, stop)
  return total


def summary(events: Sequence[Event], steps: int) -> dict:
  """Returns milliseconds per step by group, by part and pass, and by kernel, with launches per step of each group.

  `busy_ms` is the time in which a kernel ran, which is less than the sum where kernels overlap. `gaps_ms` is the rest
  of the time from the first kernel's start to the last one's end.
  """
  milliseconds = lambda nanoseconds: round(nanoseconds / steps / 1e6, 3)
  groups, parts, kernels, launches = (collections.Counter() for _ in range(4))
  for event in events:
    name = group(event)
    groups[name] += event.duration
    launches[name] += 1
    parts[" ".join(part(event))] += event.duration
    kernels[event.kernel] += event.duration
  span = max(event.start + event.duration for event in events) - min(event.start for event in events)
  ordered = lambda counter: {name: milliseconds(value) for name, value in counter.most_common()}
  return {"busy_ms": milliseconds(busy(events)), "gaps_ms": milliseconds(span - busy(events)),
          "groups_ms": ordered(groups), "launches": {name: round(n / steps, 1) for name, n in launches.most_common()},
          "parts_ms": ordered(parts), "kernels_ms": dict(list(ordered(kernels).items())[:40])}


def table(found: dict, largest: int) -> str:
  """Returns the summary as text, with as many of the largest kernels as `largest` says."""
  total = sum(found["groups_ms"].values()) or 1.0
  lines = []
  for title, field in (("kernel group", "groups_ms"), ("part of the model and pass", "parts_ms"),
                       ("largest kernels", "kernels_ms")):
    rows = list(found[field].items())
    lines += ["", f"{title:46} {'ms':>9} {'share':>7}" + " launches" * (field == "groups_ms")]
    for name, ms in rows[:largest] if field == "kernels_ms" else rows:
      count = f" {found['launches'][name]:8.1f}" if field == "groups_ms" else ""
      lines.append(f"  {name[:44]:44} {ms:9.2f} {ms / total:7.1%}{count}")
  return "\n".join(lines[1:])
