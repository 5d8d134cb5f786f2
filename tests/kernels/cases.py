"""Cases of the ops' tests: inputs, and the comparison with the scan over tokens."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from tests.close import assert_close, tolerance
from tests.kernels import recurrence

TIMES = (1, 15, 63, 64, 65, 100, 200, 500, 1000, 1024, 2048)
WIDTHS = (32, 60, 64, 100, 128, 256)
PACKED = (15, 85, 200, 900, 800)


# Draws of log_decay from a numpy generator; numpy, because it compiles nothing.
GATES = {
    "zero": lambda rng, shape: np.zeros(shape),
    "near_zero": lambda rng, shape: -1e-3 * rng.random(shape),
    # From nearly open to nearly shut side by side, in time and over channels.
    "mixed": lambda rng, shape: -(10 ** rng.uniform(-4, 1, shape)),
    # The gate of the GLA layer, sigmoid(x)^(1/16), around x = -20 and -30: a chunk of 64 decays by e^-80 and e^-120.
    "logit_-20": lambda rng, shape: -np.logaddexp(0, 20 + rng.standard_normal(shape)) / 16,
    "logit_-30": lambda rng, shape: -np.logaddexp(0, 30 + rng.standard_normal(shape)) / 16,
    "-20": lambda rng, shape: rng.standard_normal(shape) - 20,
    "-30": lambda rng, shape: rng.standard_normal(shape) - 30,
}

# Draws of the delta rule's beta: DeltaNet's range, that with negative eigenvalues, and their ends.
BETAS = {
    "unit": lambda rng, shape: rng.random(shape),
    "double": lambda rng, shape: 2 * rng.random(shape),
    "0": lambda rng, shape: np.zeros(shape),
    "1": lambda rng, shape: np.ones(shape),
    "2": lambda rng, shape: np.full(shape, 2.0),
}
# The delta rule's keys from standard normal ones `[B, T, G, K]`, before they get norm 1.
KEYS = {
    "normal": lambda k: k,
    "correlated": lambda k: 2 * k[:, :1] + k,
    "near_parallel": lambda k: k[:, :1] + 0.05 * k,
    "repeated": lambda k: np.repeat(k[:, :1], k.shape[1], axis=1),
}


@dataclasses.dataclass(frozen=True)
class Case:
  """One input. `segments` are lengths that sum to T; row b has them rotated by b places.

  `decay`: the form of log_decay, "channel", which is `[B, T, G, K]` in gla and `[B, T, H, K]` in the delta rule,
  "token" `[B, T, H]`, "constant" `[H]`, or "none". `beta`: a case of the delta rule; the inputs then have keys of
  norm 1, unless the op normalises them and the queries.
  """

  B: int = 2
  T: int = 100
  H: int = 2
  K: int = 32
  V: int = 32
  dtype: str = "float32"
  gate: str = "mixed"
  key_heads: int | None = None
  initial_state: bool = True
  segments: tuple[int, ...] = ()
  chunk_size: int | None = None
  decay: str = "channel"
  beta: str | None = None
  keys: str = "normal"
  normalize_qk: bool = False

  def __str__(self):
    default = Case()
    changed = [f"{f.name}{getattr(self, f.name)}" for f in dataclasses.fields(self)
               if f.name in "BTHKV" or getattr(self, f.name) != getattr(default, f.name)]
    return "-".join(changed).replace(" ", "")


@dataclasses.dataclass(frozen=True)
class Inputs:
  """Arguments of the op and the cotangents of its two results."""

  arrays: dict  # q, k, v, log_decay, initial_state, and beta if the op has one; all are differentiated
  segment_ids: jax.Array | None
  cotangents: tuple
  normalize_qk: bool = False


def make_inputs(case: Case, seed: int = 0) -> Inputs:
  """Standard normal arrays of the case's shapes and dtypes, but for the keys and gates that it names."""
  B, T, H, G = case.B, case.T, case.H, case.key_heads or case.H
  rng = np.random.default_rng(seed)
  rounded = lambda x, dtype="float32": jnp.asarray(x.astype(jnp.dtype(dtype)))
  normal = lambda *shape, dtype="float32": rounded(rng.standard_normal(shape), dtype)
  channels = B, T, G if case.beta is None else H, case.K
  decay_shape = {"channel": channels, "token": (B, T, H), "constant": (H,), "none": None}[case.decay]
  arrays = {
      "q": normal(B, T, G, case.K, dtype=case.dtype),
      "k": rounded(_keys(case, rng.standard_normal((B, T, G, case.K))), case.dtype),
      "v": normal(B, T, H, case.V, dtype=case.dtype),
      "log_decay": None if decay_shape is None else jnp.asarray(GATES[case.gate](rng, decay_shape), jnp.float32),
      "initial_state": normal(B, H, case.K, case.V) if case.initial_state else None,
  }
  cotangents = normal(B, T, H, case.V, dtype=case.dtype), normal(B, H, case.K, case.V)
  if case.beta is not None:
    arrays["beta"] = rounded(BETAS[case.beta](rng, (B, T, H)))
  return Inputs(arrays, segment_ids(case.segments, B) if case.segments else None, cotangents, case.normalize_qk)


def _keys(case, k):
  if case.beta is None:
    return k
  k = KEYS[case.keys](k)
  return k if case.normalize_qk else k / np.linalg.norm(k, axis=-1, keepdims=True)


def segment_ids(lengths, B):
  """Ids `[B, T]` from 1 of segments of these lengths, rotated by b places in row b."""
  ids = np.arange(1, len(lengths) + 1)
  return jnp.asarray(np.stack([np.repeat(ids, np.roll(lengths, -b)) for b in range(B)]), jnp.int32)


def _results(fn, arrays, segment_ids, cotangents, chunk_size=None, normalize_qk=False) -> dict:
  """Outputs and gradients by name, of `fn` with the signature of its op."""
  options = {"normalize_qk": True} if normalize_qk else {}
  call = lambda x: fn(**x, segment_ids=segment_ids, chunk_size=chunk_size, **options)
  (output, final_state), vjp = jax.vjp(call, arrays)
  gradients = {f"d{name}": x for name, x in vjp(cotangents)[0].items() if x is not None}
  return {"output": output, "final_state": final_state, **gradients}


results = jax.jit(_results, static_argnames=("fn", "chunk_size", "normalize_qk"))
# How many numbers of states NumPy computes in less time than XLA compiles a scan. Inputs beyond it are tests of GPUs.
NUMPY_STATES = 10**7


def expected(inputs: Inputs) -> dict:
  """Results of the scan on the same inputs, by NumPy in float64 or by JAX: see `NUMPY_STATES`."""
  B, T, H, V = inputs.arrays["v"].shape
  if B * T * H * V * inputs.arrays["q"].shape[3] <= NUMPY_STATES:
    return recurrence.results(inputs.arrays, inputs.segment_ids, inputs.cotangents, inputs.normalize_qk)
  return compiled_scan(inputs)


def compiled_scan(inputs: Inputs) -> dict:
  """Results of the scan on the same inputs, widened to float32."""
  log_decay = inputs.arrays["log_decay"]
  # exp of a constant decay is off by one rounding, the same at every token: a scan in float32 would compound it.
  constant = log_decay is not None and log_decay.ndim == 1
  with jax.enable_x64(constant), jax.default_matmul_precision("highest"):
    wide = jax.tree.map(lambda x: x.astype("float64" if constant else "float32"), (inputs.arrays, inputs.cotangents))
    return results(_scan, wide[0], inputs.segment_ids, wide[1], normalize_qk=inputs.normalize_qk)


def _scan(q, k, v, log_decay, *, beta=None, initial_state, segment_ids, chunk_size, normalize_qk=False):
  """The definition without the op's own front: heads repeated, and a state set to zero where a segment starts."""
  B, T, H, V = v.shape
  q, k = (jnp.repeat(x, H // x.shape[2], axis=2) for x in (q, k))
  if normalize_qk:
    q, k = (x / jnp.sqrt(jnp.sum(x**2, axis=-1, keepdims=True) + 1e-6) for x in (q, k))
  log_decay = per_channel(log_decay, q.shape)
  state = jnp.zeros((B, H, q.shape[-1], V)) if initial_state is None else initial_state
  ids = jnp.ones((B, T), jnp.int32) if segment_ids is None else segment_ids
  same = jnp.concatenate([jnp.ones((B, 1), bool), ids[:, 1:] == ids[:, :-1]], axis=1)

  def step(state, x):
    (same, q, k, v, g), beta = x
    state = jnp.where(same[:, None, None, None], state, 0.0)
    state = jnp.exp(g)[..., None] * state
    if beta is not None:
      v = beta[..., None] * (v - jnp.einsum("bhk,bhkv->bhv", k, state, precision="highest"))
    state = state + k[..., None] * v[..., None, :]
    return state, jnp.einsum("bhk,bhkv->bhv", q, state, precision="highest")

  by_time = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), ((same, q, k, v, log_decay), beta))
  state, output = jax.lax.scan(step, state, by_time)
  return q.shape[-1]**-0.5 * jnp.moveaxis(output, 0, 1), state


def per_channel(log_decay, shape):
  """The log_decay `[B, T, H, K]` of gla that equals any form of it."""
  if log_decay is None:
    return jnp.zeros(shape)
  if log_decay.ndim == 4:
    return jnp.repeat(log_decay, shape[2] // log_decay.shape[2], axis=2)
  return jnp.broadcast_to(log_decay[..., None], shape)


def check(case: Case, fn, *, multi_pass: bool = False) -> None:
  """Asserts every output and gradient of `fn` against the scan; `multi_pass` as in `tests.close.tolerance`."""
  inputs = make_inputs(case)
  actual = results(fn, inputs.arrays, inputs.segment_ids, inputs.cotangents, case.chunk_size, case.normalize_qk)
  for name, x in expected(inputs).items():
    assert_close(name, actual[name], x, tolerance(name, case.dtype, multi_pass=multi_pass))


def grid(decay="channel", widths=WIDTHS, dtypes=("bfloat16", "float16", "float32"), beta=None) -> list[Case]:
  """Every value of every axis, around small centres: times, widths, heads, gates, segments, chunk sizes.

  `beta`: of a grid of the delta rule; it also gets every value of beta, and kinds of keys.
  """
  by_time = [Case(T=T, H=3, K=32, V=64) for T in TIMES]
  by_width = [Case(B=1, T=100, K=K, V=V) for K, V in itertools.product(widths, (*widths, 512))]
  by_heads = [Case(H=H, K=64, V=64, gate="near_zero") for H in (1, 3, 4)] + [Case(H=4, key_heads=2)]
  by_gate = [Case(T=200, K=64, gate=gate, initial_state=state)
             for gate, state in itertools.product(GATES, (True, False))]
  by_segment = [Case(T=sum(lengths), gate=gate, segments=lengths)
                for lengths, gate in itertools.product((PACKED, (1,) * 70, (1, 62, 1, 1, 64, 1)), ("mixed", "-20"))]
  by_chunk = [Case(T=200, K=64, V=64, chunk_size=C) for C in (16, 32, 64, 128)]
  by_rule = [] if beta is None else delta_rules(T=200, K=64, V=64)
  return _with(decay, dtypes, by_time + by_width + by_heads + by_gate + by_segment + by_chunk + by_rule, beta)


def delta_rules(**fields) -> list[Case]:
  """Cases that only the delta rule has, with these `fields`: every beta, kinds of keys, and their normalisation."""
  # Repeated keys under a beta of 2 have no bound to keep: the state there turns back and forth undamped, and the
  # rounding of |k|^2, the same at each token, adds up.
  rules = [*(dict(beta=beta) for beta in BETAS),
           *(dict(beta=beta, keys=keys, normalize_qk=normalize_qk)
             for keys, beta in (("correlated", "double"), ("near_parallel", "double"), ("near_parallel", "1"),
                                ("repeated", "1")) for normalize_qk in (False, True)),
           *(dict(beta="unit", gate=gate, normalize_qk=True) for gate in ("mixed", "-20"))]
  return [Case(**{"gate": "near_zero"} | rule | fields) for rule in rules]


def around(K, V, dtypes, decay="channel", beta=None) -> list[Case]:
  """Times, gates and segments at one width."""
  by_time = [Case(B=1, T=T, K=K, V=V) for T in (1, 63, 65, 1000)]
  by_gate = [Case(T=200, K=K, V=V, gate=gate) for gate in GATES] + [Case(T=200, K=K, V=V, initial_state=False)]
  by_segment = [Case(T=sum(PACKED), H=1, K=K, V=V, segments=PACKED),
                Case(T=70, K=K, V=V, gate="-20", segments=(1, 30, 1, 1, 32, 4, 1))]
  return _with(decay, dtypes, by_time + by_gate + by_segment, beta)


def _with(decay, dtypes, cases, beta):
  """The cases for each dtype under this form of decay, each once: where there is no decay, no gate tells them apart."""
  gate = {"gate": "zero"} if decay == "none" else {}
  return list(dict.fromkeys(dataclasses.replace(case, dtype=dtype, decay=decay, beta=case.beta or beta, **gate)
                            for dtype, case in itertools.product(dtypes, cases)))
