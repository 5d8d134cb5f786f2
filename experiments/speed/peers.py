"""Training steps of other libraries at the sizes of ours, each model in a process of its own.

`jla` is jax-linear-attention (JAX, with Mosaic GPU kernels on Hopper). `fla` is flash-linear-attention (PyTorch with
Triton). Processes prepare side by side, without arrays on the device, and train one after the other, so that each has
the whole device while it is timed. Parameters and optimizer states are float32 and compute is bfloat16, unless a
variant says otherwise.

Variants of jla are its settings of rematerialisation: `lean` keeps the residuals of memory-saving layers and
recomputes nothing, `dots` keeps the results of matrix products. Variants of fla are `amp`, float32 weights under
autocast, and `bf16`, weights and optimizer states in bfloat16.
"""

import collections
import contextlib
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence

from kernel_bench import peers

_EXPERIMENTS = pathlib.Path(__file__).resolve().parents[1]
VARIANTS = {"jla": ("lean", "dots"), "fla": ("amp", "bf16")}
_SAME = "as ours"
# The models of each library by the name of ours, with the layout where it differs. The kernels of jla take no head of
# GLA's K 256, so that GLA has more heads there at the same widths.
MODELS = {
    "jla": {"gla_1b3": "16 heads of K 64, V 128", "transformer_1b3": _SAME, "deltanet_1b3": _SAME,
            "gated_deltanet_1b3": _SAME, "mamba2_1b3": _SAME},
    "fla": {"gla_1b3": _SAME, "transformer_1b3": "attention of PyTorch, because flash-attn is not installed",
            "deltanet_1b3": _SAME, "gated_deltanet_1b3": _SAME, "retnet_1b3": _SAME}}
# `kernels` counts the calls of Mosaic GPU kernels in the compiled step of jla, which falls back to plain JAX silently.
# It is None for fla, which raises an error instead.
FIELDS = ("tokens_per_s", "step_ms", "memory_gib", "compile_s", "first_step_s", "parameters", "kernels", "losses")


class Process:
  """One model of another library. It prepares from the start, and `measure` lets it train."""

  def __init__(self, setting: dict, limit: float):
    """`limit` is the number of seconds for preparing, and again for training."""
    self._limit, self._over = limit, False
    self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  it lives as long as the process
    path = os.pathsep.join([str(_EXPERIMENTS), str(_EXPERIMENTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    self._process = subprocess.Popen(
        [sys.executable, "-m", "speed.peer_process", json.dumps(setting)], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=self._errors, text=True, start_new_session=True,
        env=os.environ | {"PYTHONPATH": path, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"})
    self._timer = self._stop_later()

  def wait(self) -> None:
    """Returns when the process has prepared, or has failed, which `measure` will say."""
    self._prepared = self._process.stdout.readline()
    self._timer.cancel()

  def measure(self) -> dict:
    """Returns the results by `FIELDS`. Raises TimeoutError after the limit, RuntimeError for a failure of the model."""
    reply = self._trained(json.loads(self._prepared)) if self._prepared else None
    if reply is None:  # the process has ended or is about to
      self._process.wait()
      self._errors.seek(0)
      lines = self._errors.read().strip().splitlines() or [""]
    self.stop()
    if reply is None and self._over:
      raise TimeoutError(f"stopped after {self._limit:g} s")
    if reply is None:
      raise RuntimeError(f"the process ended with code {self._process.returncode}: {lines[-1]}")
    if "reason" in reply:
      raise RuntimeError(reply["reason"])
    return {name: reply[name] for name in FIELDS}

  def stop(self) -> None:
    self._timer.cancel()
    self._kill()
    self._process.wait()
    for file in (self._process.stdin, self._process.stdout, self._errors):
      file.close()

  def _trained(self, reply):
    if "reason" in reply:
      return reply
    self._timer = self._stop_later()
    self._process.stdin.write("\n")
    self._process.stdin.flush()
    line = self._process.stdout.readline()
    self._timer.cancel()
    return json.loads(line) if line else None

  def _kill(self):
    with contextlib.suppress(ProcessLookupError):  # the group, because compiling may start processes of its own
      os.killpg(self._process.pid, signal.SIGKILL)

  def _stop_later(self):
    def stop():
      self._over = True
      self._kill()

    timer = threading.Timer(self._limit, stop)
    timer.daemon = True
    timer.start()
    return timer


def chosen(libraries: Sequence[str], models: Sequence[str], variants: Sequence[str]) -> list[dict]:
  """Returns the part of a setting that says which model of which library is trained, for all that can run here.

  A library that cannot run costs one printed line. `models` and `variants` select, and nothing selects all. Raises
  ValueError for an unknown library or variant.
  """
  for flag, given, known in (("peers", libraries, VARIANTS), ("variants", variants, sum(VARIANTS.values(), ()))):
    if unknown := set(given) - set(known):
      raise ValueError(f"--{flag}={','.join(given)}: {sorted(unknown)[0]!r} is unknown; known: {', '.join(known)}")
  found = []
  for library in libraries:
    if why := peers.missing(library):
      print(f"{library} is left out: {why}", flush=True)
      continue
    found += [{"library": library, "name": name, "variant": variant, "layout": layout}
              for variant in VARIANTS[library] if variant in (variants or VARIANTS[library])
              for name, layout in MODELS[library].items() if name in (models or MODELS[library])]
  return found


def versions(library: str) -> dict[str, str]:
  """Returns the versions of the packages that decide the library's speed."""
  return {"python": ".".join(map(str, sys.version_info[:3])), **peers.versions(peers.PACKAGES[library])}


@contextlib.contextmanager
def prepared_in_groups(settings: Sequence[dict], count: int, limit: float) -> Iterator[Iterator[Process]]:
  """Yields the prepared processes of all settings, `count` of them side by side, and stops what is left at the end."""
  left = collections.deque()

  def prepared():
    for group in itertools.batched(settings, count):
      left.extend(Process(setting, limit) for setting in group)
      for process in list(left):
        process.wait()
      while left:
        yield left.popleft()

  try:
    yield prepared()
  finally:
    for process in left:
      process.stop()
