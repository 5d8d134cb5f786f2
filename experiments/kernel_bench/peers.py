"""Other libraries' kernels for the same calls. They are imported only here, and only when a benchmark asks for them.

`fla` is flash-linear-attention (PyTorch, Triton), which tunes itself on the first call of a shape and takes minutes for
it. `jla` is jax-linear-attention (JAX, with Mosaic GPU on Hopper and plain JAX on a CPU). `cudnn` is softmax attention.
`fla_recurrent` is flash-linear-attention's kernel that takes one token of the delta rule after the other. It is no
rival, but what DeltaNet's paper compares the chunkwise form with.
"""

import importlib
import importlib.metadata
import importlib.util
import sys
import threading

import jax
import jax.numpy as jnp

from . import cases, timing
from .cases import Case
from .timing import Program

# Ops of each peer, modules that it needs, and packages that decide its speed.
OPS = {"fla": ("gla", "linear_attention", "delta_rule"), "jla": ("gla", "linear_attention", "delta_rule"),
       "cudnn": ("attention",), "fla_recurrent": ("delta_rule",)}
RIVALS = "fla", "jla", "cudnn"
_MODULES = {"fla": ("torch", "fla"), "jla": ("jla",), "cudnn": (), "fla_recurrent": ("torch", "fla")}
_FLA = "fla-core", "torch", "triton"
PACKAGES = {"fla": _FLA, "jla": ("jax-linear-attention", "jax", "jaxlib"),
            "cudnn": ("jax", "jaxlib", "nvidia-cudnn-cu13"), "fla_recurrent": _FLA}
_IMPORT = threading.Lock()


def missing(peer: str) -> str | None:
  """Says why `peer` cannot run on this machine at all; None if it can."""
  absent = [name for name in _MODULES[peer] if importlib.util.find_spec(name) is None]
  if absent:
    return f"not installed: {', '.join(absent)}"
  if peer != "jla" and jax.default_backend() != "gpu":
    return f"needs a GPU, the default backend is {jax.default_backend()}"
  return None


def versions(packages: tuple[str, ...]) -> dict[str, str]:
  found = {}
  for name in packages:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      pass
  return found


def jax_function(peer: str, case: Case):
  """Returns a function from the op's arguments by name to the output of a peer in JAX; None for a peer in PyTorch."""
  functions = {"jla": _jla, "cudnn": _cudnn}
  return functions[peer](case) if peer in functions else None


def release() -> None:
  """Returns to the device the memory that PyTorch keeps for later calls."""
  if (torch := sys.modules.get("torch")) and torch.cuda.is_available():
    torch.cuda.empty_cache()


def _cudnn(case):
  def attention(arguments):
    q, k, v = (arguments[name] for name in "qkv")
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")

  return attention


def _jla(case):
  from jla.ops import linear_attention

  # The backend is named, because the peer's own choice falls back to plain JAX silently.
  implementation = "mosaic_gpu" if jax.default_backend() == "gpu" else "chunked"
  if implementation == "mosaic_gpu":
    with _IMPORT:  # an import registers kernels, and several threads may import at once
      importlib.import_module("jla.ops.mosaic_gpu")

  def attend(arguments):
    q, k, v = (arguments[name] for name in "qkv")
    # Without the barrier the compiler spends minutes on folding a constant array of gates.
    gate = arguments.get("log_decay", jax.lax.optimization_barrier(jnp.float32(0)))
    if case.op == "gla":
      return linear_attention("gla", q, k, v, g=gate, impl=implementation)[0]
    if case.op == "delta_rule":
      kind = {"none": "deltanet", "token": "gated_deltanet", "channel": "kda"}[case.gate]
      gates = {} if case.gate == "none" else {"g": gate}
      return linear_attention(kind, q, k, v, beta=arguments["beta"], **gates, impl=implementation)[0]
    return linear_attention("simple_gla", q, k, v, g=jnp.broadcast_to(gate, v.shape[:3]), impl=implementation)[0]

  return attend


def fla_program(peer: str, case: Case, label: str, sets: list) -> Program:
  """Returns the pass `label` of flash-linear-attention. Raises whatever that raises on a call that it cannot run."""
  import torch

  attend = _fla_recurrent(case) if peer == "fla_recurrent" else _fla_function(case)
  arrays = [(jax.tree.map(torch.from_dlpack, arguments), torch.from_dlpack(doutput)) for arguments, doutput in sets]
  names = cases.differentiated(case)

  def forward(i):
    with torch.no_grad():
      return {"output": attend(arrays[i % len(sets)][0])}

  def backward(i):
    arguments, doutput = arrays[i % len(sets)]
    leaves = [arguments[name].requires_grad_() for name in names]
    output = attend(arguments)
    gradients = torch.autograd.grad(output, leaves, doutput)
    return {"output": output.detach(), **{f"d{name}": x for name, x in zip(names, gradients)}}

  call = forward if label == "forward" else backward
  read = sets[0][0] if label == "forward" else sets[0]
  peak = _torch_peak(torch, call) + sum(x.nbytes for x in jax.tree.leaves(read))
  calls = {"eager": call}
  try:
    calls["CUDA graph"] = _captured(torch, call, len(sets))
  except Exception as e:  # whatever prevents a capture, the eager call remains
    print(f"  fla: no CUDA graph, {timing.reason(e)}")
    torch.cuda.synchronize()
  return Program(calls, lambda _: torch.cuda.synchronize(), lambda x: x.float().cpu().numpy(), peak)


def _fla_function(case):
  if case.op == "gla":
    from fla.ops.gla import chunk_gla

    return lambda arguments: chunk_gla(arguments["q"], arguments["k"], arguments["v"], arguments["log_decay"])[0]
  if case.op == "delta_rule":
    from fla.ops.delta_rule import chunk_delta_rule
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    from fla.ops.kda import chunk_kda

    run = {"none": chunk_delta_rule, "token": chunk_gated_delta_rule, "channel": chunk_kda}[case.gate]
    gates = {"beta": "beta"} if case.gate == "none" else {"beta": "beta", "g": "log_decay"}
    # Its kernels take a beta of the keys' dtype.
    return lambda arguments: run(
        **{name: arguments[name] for name in "qkv"},
        **{name: arguments[source].to(arguments["q"].dtype) if name == "beta" else arguments[source]
           for name, source in gates.items()})[0]
  from fla.ops.simple_gla import chunk_simple_gla

  gate = {"none": None, "constant": "g_gamma", "token": "g"}[case.gate]

  def simple_gla(arguments):
    gates = {gate: arguments["log_decay"]} if gate else {}
    return chunk_simple_gla(arguments["q"], arguments["k"], arguments["v"], **gates)[0]

  return simple_gla


def _fla_recurrent(case):
  from fla.ops.delta_rule import fused_recurrent_delta_rule

  if case.gate != "none":
    raise NotImplementedError(f"gate={case.gate!r}: its kernel with a backward pass has no decay")
  return lambda arguments: fused_recurrent_delta_rule(
      *(arguments[name] for name in "qkv"), arguments["beta"].to(arguments["q"].dtype))[0]


def _torch_peak(torch, call):
  call(0)  # the tuning tries configurations that need more memory than the one that it keeps
  torch.cuda.synchronize()
  before = torch.cuda.memory_allocated()
  torch.cuda.reset_peak_memory_stats()
  call(0)
  torch.cuda.synchronize()
  return torch.cuda.max_memory_allocated() - before


def _captured(torch, call, sets):
  """Captures `call` as one CUDA graph per input set, so that a launch costs as much as a compiled program's."""
  stream = torch.cuda.Stream()
  stream.wait_stream(torch.cuda.current_stream())
  with torch.cuda.stream(stream):
    for i in range(sets):
      call(i)
  torch.cuda.synchronize()
  graphs, results, pool = [], [], torch.cuda.graph_pool_handle()
  for i in range(sets):
    graphs.append(torch.cuda.CUDAGraph())
    with torch.cuda.graph(graphs[-1], pool=pool, capture_error_mode="thread_local"):
      results.append(call(i))

  def replay(i):
    graphs[i % sets].replay()
    return results[i % sets]

  return replay
