"""The calls of the kernel benchmark: named sets of shapes, their inputs, the bytes that they must move, and the check.

Every call is one layer's as training makes it: without an initial state, and with the final state unused.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

import kernels
from kernels import accuracy, chunks

PASSES = ("forward", "forward_backward")
# The ops that are timed, and their gates. `attention` is causal softmax attention, which has no implementation here and
# is a yardstick for the same shapes.
TIMED = {"gla": ("channel",), "linear_attention": ("none", "constant", "token"), "delta_rule": ("none", "token"),
         "attention": ("none",)}
_PIECE = 1024  # tokens whose states the scan's backward pass keeps at a time
_SCORES = 4096  # tokens whose scores attention in float32 can hold


@dataclasses.dataclass(frozen=True)
class Case:
  """One call: op, gate ("none", "constant" [H], "token" [B,T,H] or "channel" [B,T,G,K], float32), shape, dtype.

  In the delta rule a gate per channel has value heads, [B,T,H,K].
  `G` is the number of key heads, 0 for one per head.
  """

  op: str
  gate: str
  B: int
  T: int
  H: int
  K: int
  V: int
  dtype: str
  G: int = 0

  @property
  def shape(self) -> str:
    """The shape as text; heads that share key heads as H16/32, with the key heads in front."""
    return f"B{self.B} T{self.T} H{f'{self.G}/' if self.G else ''}{self.H} K{self.K} V{self.V}"

  def __str__(self):
    return f"{self.op} {self.gate} {self.shape} {self.dtype}"


def _named_sets():
  """Maps a name to a dtype and a list of (op, gate or None for all, B, T, H, K, V) and G if heads share key heads.

  `paper` has the layers of GLA 340M and 1.3B, RetNet 1.3B, TransNormerLLM, DeltaNet and Gated DeltaNet 1.3B. `grid`
  goes from one long sequence to many short ones, and `length` is time against length. In each of these three, all calls
  have the same number of tokens. `figures` has the papers' own plots against length: GLA's figure 2 and the table of
  TransNormerLLM's code at a fixed number of sequences, and DeltaNet's speed-up over its token scan at a fixed number of
  tokens. `widths` has the other widths of heads that people use, with as many heads as `retune.py` takes. `grouped` has
  heads that share key heads: Mamba-2 1.3B's, and 16 key heads for 32 and for 48 heads of gated delta rules. `hopper`
  has the delta rule at widths and numbers of heads where its two implementations for Hopper GPUs differ. `kda` has the
  delta rule with a decay per key channel at the sizes that are published for it. `cpu` is for a CPU.
  """
  paper = [("gla", "channel", 16, 2048, 4, 128, 256), ("gla", "channel", 16, 2048, 4, 256, 512),
           ("linear_attention", "constant", 16, 2048, 8, 256, 512)]
  paper += [("linear_attention", "constant", 16, 2048, H, 128, 128) for H in (8, 16, 32)]
  paper += [("delta_rule", "none", 16, 2048, 16, 128, 128), ("delta_rule", "token", 16, 2048, 6, 256, 512)]
  grid = [(op, None, B, T, 16, D, D) for B, T in ((16, 2048), (4, 8192), (1, 32768)) for D in (64, 128) for op in TIMED]
  length = [(op, None, 2**17 // T, T, 16, 128, 128) for T in (2**n for n in range(10, 18)) for op in TIMED]
  figures = [(op, None, 32, 2**n, 16, 64, 64) for n in range(10, 15) for op in ("gla", "attention")]
  figures += [(op, gate, 4, 2**n, 32, 128, 128) for n in range(9, 16)
              for op, gate in (("linear_attention", "constant"), ("attention", None))]
  figures += [("delta_rule", "none", 2**14 // T, T, 2048 // D, D, D)
              for D in (64, 128, 256) for T in (2048, 4096, 8192)]
  widths = [(op, None, 16, 2048, max(4, min(16, 2048 // max(K, V))), K, V) for K in (64, 96, 128, 192, 256)
            for V in (64, 96, 128, 192, 256, 512) if (K, V) not in ((64, 64), (128, 128), (256, 512)) for op in TIMED]
  grouped = [("linear_attention", "token", 8, 2048, 64, 128, 64, 1)]
  grouped += [("delta_rule", "token", 8, 2048, H, 128, 128, 16) for H in (32, 48)]
  hopper = [("delta_rule", None, 16, 2048, 16, 128, 128), ("delta_rule", "token", 4, 4096, 64, 128, 128),
            ("delta_rule", "token", 8, 2048, 6, 256, 512), ("delta_rule", "none", 8, 2048, 32, 256, 256),
            ("delta_rule", "token", 1, 32768, 16, 128, 128), ("delta_rule", "token", 4, 8192, 16, 128, 128),
            ("delta_rule", "token", 16, 2048, 16, 64, 128), ("delta_rule", "token", 16, 2048, 16, 128, 64)]
  kda = [("delta_rule", "channel", 1, 8192, H, 128, 128) for H in (64, 96)]
  kda += [("delta_rule", "channel", 16, 2048, 16, 128, 128), ("delta_rule", "channel", 8, 2048, 32, 64, 64),
          ("delta_rule", "channel", 8, 2048, 16, 128, 256)]
  cpu = [(op, None, 1, 2048, 4, 64, 64) for op in TIMED]
  return {"paper": ("bfloat16", paper), "grid": ("bfloat16", grid), "length": ("bfloat16", length),
          "figures": ("bfloat16", figures), "widths": ("bfloat16", widths), "grouped": ("bfloat16", grouped),
          "hopper": ("bfloat16", hopper), "kda": ("bfloat16", kda), "cpu": ("float32", cpu)}


SETS = _named_sets()


def named(name: str, ops: list[str], dtype: str | None = None) -> list[Case]:
  """The cases of the set `name` that belong to `ops`, in the set's dtype unless `dtype` names another.

  Raises:
    ValueError: the set or an op is unknown.
  """
  if name not in SETS:
    raise ValueError(f"--shapes={name}: unknown; known: {', '.join(SETS)}, all")
  return [case for op, gate, *shape in SETS[name][1] for case in of_shape(shape, [op], dtype or SETS[name][0], gate)
          if op in ops]


def of_shape(shape, ops: list[str], dtype: str, gate: str | None = None) -> list[Case]:
  """A case for each op and each of its gates (or `gate` only) at the shape B, T, H, K, V and G if given.

  Raises ValueError.
  """
  for op in ops:
    if op not in TIMED:
      raise ValueError(f"--ops={op}: unknown; known: {', '.join(TIMED)}")
  if len(shape) > 5 and shape[5] and shape[2] % shape[5]:
    raise ValueError(f"--key_heads={shape[5]}: must divide --heads={shape[2]}")
  _, _, _, K, V, *_ = shape
  return [Case(op, name, *shape[:5], dtype, *shape[5:]) for op in ops for name in ([gate] if gate else TIMED[op])
          if op != "attention" or K == V and not any(shape[5:])]


def inputs(case: Case, seed: int) -> tuple[dict, jax.Array]:
  """Returns the op's arguments by name, and the output's cotangent, with gates in the range of a trained layer.

  The arrays are normal. A decay per token or channel is log sigmoid(normal) / 16 (GLA), and a constant one is
  log(1 - 2^(-5-h)) (RetNet). The delta rule's keys have norm 1, and its beta is sigmoid(normal) (DeltaNet).
  """
  keys = jax.random.split(jax.random.key(seed), 5)
  heads = case.B, case.T, case.H
  q, k = (jax.random.normal(key, (case.B, case.T, case.G or case.H, case.K), case.dtype) for key in keys[:2])
  v, doutput = (jax.random.normal(key, (*heads, case.V), case.dtype) for key in keys[2:4])
  arguments = {"q": q, "k": k, "v": v}
  if case.op == "delta_rule":
    arguments["k"] = chunks.normalize(k).astype(case.dtype)
    arguments["beta"] = jax.nn.sigmoid(jax.random.normal(jax.random.fold_in(jax.random.key(seed), 1), heads))
  if case.gate == "constant":
    arguments["log_decay"] = jnp.log1p(-jnp.exp2(-5.0 - jnp.arange(case.H, dtype=jnp.float32)))
  elif case.gate != "none":
    shape = heads if case.gate == "token" else (*heads, case.K) if case.op == "delta_rule" else q.shape
    arguments["log_decay"] = jax.nn.log_sigmoid(jax.random.normal(keys[4], shape)) / 16
  return arguments, doutput


def differentiated(case: Case) -> list[str]:
  """Arguments that get a gradient: all but a decay that is a constant of the architecture."""
  shapes, _ = jax.eval_shape(lambda: inputs(case, 0))
  return [name for name in shapes if not (name == "log_decay" and case.gate == "constant")]


def floor_bytes(case: Case, label: str) -> int:
  """Returns the least traffic of one pass, which reads each argument once and writes each result once.

  The backward pass reads the arguments again and the output's cotangent, and writes the gradients.
  """
  arguments, output = jax.eval_shape(lambda: inputs(case, 0))
  size = lambda x: x.size * x.dtype.itemsize
  read = sum(size(x) for x in arguments.values())
  forward = read + size(output)
  if label == "forward":
    return forward
  return forward + read + size(output) + sum(size(arguments[name]) for name in differentiated(case))


def arrays(case: Case) -> list[jax.ShapeDtypeStruct]:
  """Returns shapes and dtypes of the op's arrays, in the op's order."""
  arguments, _ = jax.eval_shape(lambda: inputs(case, 0))
  return [arguments[name] for name in ("q", "k", "v", "beta", "log_decay") if name in arguments]


def corners(case: Case, x):
  """Takes the first and last row of `x`, and the heads of the first and last key head.

  Rows and key heads are independent, so these stand for the whole call.
  """
  key_heads = case.G or case.H
  group = x.shape[0 if x.ndim == 1 else 2] // key_heads
  heads = np.concatenate([np.arange(group) + group * head for head in sorted({0, key_heads - 1})])
  return x[heads] if x.ndim == 1 else x[::max(case.B - 1, 1), :, heads]


def expected(case: Case, arguments: dict, doutput: jax.Array) -> dict[str, np.ndarray]:
  """Returns output and gradients at the `corners`, computed by the float32 scan.

  `attention` is compared with XLA's in float32. Where a sequence is longer than that can hold, only the beginning of
  the output is compared.
  """
  arguments, doutput = jax.tree.map(lambda x: corners(case, x).astype(jnp.float32), (arguments, doutput))
  names = differentiated(case)
  if case.op == "attention" and case.T > _SCORES:
    arguments = jax.tree.map(lambda x: x[:, :_SCORES], arguments)
    return {"output": np.asarray(jax.jit(lambda arguments: _define(case, arguments))(arguments))}

  @jax.jit
  def run(arguments, doutput):
    output, pullback = jax.vjp(lambda chosen: _define(case, {**arguments, **chosen}),
                               {name: arguments[name] for name in names})
    return {"output": output, **{f"d{name}": gradient for name, gradient in pullback(doutput)[0].items()}}

  return jax.tree.map(np.asarray, run(arguments, doutput))


def _define(case, arguments):
  if case.op == "attention":
    with jax.default_matmul_precision("highest"):
      q, k, v = (arguments[name] for name in "qkv")
      return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="xla")
  op = getattr(kernels, case.op)
  by_time = {name: x for name, x in arguments.items() if x.ndim > 1}
  constant = {name: x for name, x in arguments.items() if x.ndim == 1}
  (B, T, H, V), K = arguments["v"].shape, case.K
  piece = _PIECE if T % _PIECE == 0 else T
  pieces = {name: jnp.moveaxis(x.reshape(B, T // piece, piece, *x.shape[2:]), 1, 0) for name, x in by_time.items()}

  @jax.checkpoint
  def scan(state, piece):
    output, state = op(**piece, **constant, initial_state=state, implementation="reference")
    return state, output

  _, output = jax.lax.scan(scan, jnp.zeros((B, H, K, V)), pieces)
  return jnp.moveaxis(output, 0, 1).reshape(B, T, H, V)


def errors(actual: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> dict[str, float]:
  """Relative RMS error of each tensor that both have, over the tokens of `wanted`; infinite for a NaN."""
  return {name: accuracy.relative_error(x[:, :wanted[name].shape[1]], wanted[name])
          for name, x in actual.items() if name in wanted}


def within_bounds(case: Case, found: dict[str, float]) -> bool:
  """Whether `found` keeps the bounds of `kernels.accuracy`, in float32 the bounds for products in several passes."""
  return all(error <= accuracy.tolerance(name, case.dtype, multi_pass=True) for name, error in found.items())
