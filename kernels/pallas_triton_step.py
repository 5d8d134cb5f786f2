"""One token of a recurrence with a matrix per head, as one Pallas kernel for the Triton backend.

Per head, with q, k in R^K, v in R^V, and a decay a that is absent, one number, or one number per key channel:
  S' = a S + k^T u,   o = q S',   where u = v, or with the delta rule's beta u = beta (v - k a S)

A program holds a tile of the state, all K rows and a few columns, in registers. So the state is read once and written
once, in its place, whereas the compiler's own fusions of `step` read it twice or three times.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from kernels import chunks
from kernels.triton_blocks import given, launch

LEAST_KEYS, MOST_KEYS = 16, 512
MOST_ENTRIES = 8192  # of a tile, in the registers of four warps
ENOUGH = 528  # programs, four per multiprocessor of an H100; tiles wider than 16 columns leave at least as many


def declines(state: Float[Array, "B H K V"]) -> str | None:
  """Why the kernel cannot run on a state of this shape, or None."""
  K, V = state.shape[2:]
  if not LEAST_KEYS <= K <= MOST_KEYS or K & (K - 1):
    return f"{K} key channels are not a power of two from {LEAST_KEYS} to {MOST_KEYS}"
  return f"{V} value channels are not a multiple of 16" if V % 16 else None


def step(state: Float[Array, "B H K V"], q: Float[Array, "B H K"], k: Float[Array, "B H K"], v: Float[Array, "B H V"],
         decay: Float[Array, "B H _"] | None, beta: Float[Array, "B H 1"] | None,
         normalize_qk: bool) -> tuple[Float[Array, "B H K V"], Float[Array, "B H V"]]:
  """S' and o, both float32. A decay has K columns or one. `normalize_qk` divides q and k by their L2 norm first."""
  B, H, K, V = state.shape
  columns = _columns(B * H, K, V)
  tile = pl.BlockSpec((None, None, K, columns), lambda j, h, b: (b, h, 0, j))
  row = pl.BlockSpec((None, None, columns), lambda j, h, b: (b, h, j))
  token, specs = _token(q, k, v, decay, beta, columns)
  return launch(
      functools.partial(_step_kernel, names=tuple(specs), normalize=normalize_qk), name="recurrent_step",
      grid=(V // columns, H, B), in_specs=[tile, *specs.values()], out_specs=[tile, row],
      out_shape=[jax.ShapeDtypeStruct(state.shape, jnp.float32), jax.ShapeDtypeStruct(v.shape, jnp.float32)],
      num_warps=4, num_stages=1, aliases={0: 0})(state, *[token] * len(specs))


def _token(q, k, v, decay, beta, columns):
  """All arrays of a token side by side in one float32 array, and their blocks by name.

  The compiler forms one array in one kernel, and several arrays in as many. Those with K columns come first, so that
  every block starts at a multiple of its width.
  """
  K, V = q.shape[2], v.shape[2]
  per_channel = decay is not None and decay.shape[2] == K
  wide = {"q": q, "k": k} | ({"decay": decay} if per_channel else {})
  single = {"decay": None if per_channel else decay, "beta": beta}
  single = {name: x for name, x in single.items() if x is not None}
  start, end = len(wide) * K, len(wide) * K + V
  arrays = [x.astype(jnp.float32) for x in (*wide.values(), v, *single.values())]
  filler = jnp.zeros((*v.shape[:2], -(end + len(single)) % K), jnp.float32)
  block = lambda size, at: pl.BlockSpec((None, None, size), lambda j, h, b: (b, h, at))
  specs = {name: block(K, i) for i, name in enumerate(wide)}
  specs["v"] = pl.BlockSpec((None, None, columns), lambda j, h, b: (b, h, start // columns + j))
  specs |= {name: block(1, end + i) for i, name in enumerate(single)}
  return jnp.concatenate([*arrays, *given(filler.size, filler)], axis=2), specs


def _columns(heads, K, V):
  """The widest tile that leaves enough programs, or 16 columns, half a line of the cache."""
  wide = (columns for columns in (64, 32) if V % columns == 0 and K % columns == 0 and K * columns <= MOST_ENTRIES
          and heads * (V // columns) >= ENOUGH)
  return next(wide, 16)


def _step_kernel(state_ref, *refs, names, normalize, dot):
  del dot  # a product of one row is a multiplication and a sum
  *token_refs, new_ref, o_ref = refs
  token = {name: ref[...] for name, ref in zip(names, token_refs, strict=True)}
  q, k, u, state = token["q"], token["k"], token["v"], state_ref[...]
  if normalize:
    q, k = (x * jax.lax.rsqrt(jnp.sum(x * x) + 1e-6) for x in (q, k))  # as `chunks.normalize`
  if "decay" in token:
    state = chunks.decayed(token["decay"][:, None], state)
  if "beta" in token:
    u = token["beta"] * (u - jnp.sum(k[:, None] * state, axis=0))
  state = state + k[:, None] * u[None]
  new_ref[...] = state
  o_ref[...] = jnp.sum(q[:, None] * state, axis=0)
