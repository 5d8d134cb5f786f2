# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Chunks of gated linear attention, and the range of their numbers
#
# Gated linear attention (GLA, [Yang et al. 2024](https://arxiv.org/abs/2312.06635), section 4) trains chunk by chunk:
# matrix products inside a chunk, a small state between chunks. The shortest way to write a chunk divides by a
# cumulative decay, and with strong gates the quotient leaves the range of float32. This notebook derives the chunk
# form, measures where the division fails, and builds the paper's cure, which is secondary chunking. It ends with the
# two schemes of `kernels.gla` and a table of costs. Every claim is followed by an `assert`.
#
# The notation is notebook 01's, for one head: rows are tokens, $q_t, k_t$ have $K$ channels, $v_t, o_t$ have $V$, the
# state $S_t$ is $K \times V$, and $g_t \le 0$ is `log_decay`, the logarithm of the forget gate $\alpha_t$, with one
# number per key channel. $-g$ is the *strength* of a gate. A chunk has length $C$, and a sub-chunk has length $c$.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from kernels import cpu_compiler, gla
from kernels.gla import exact_chunks

# %%
cpu_compiler.switch_off()  # of a fault in jaxlib: it has to come before JAX starts a device
jax.config.update("jax_enable_x64", True)
T, C, c, K, V = 256, 64, 16, 32, 32

# %% [markdown]
# Gates are mixed: half of them keep almost everything, half forget. If all were strong, only the diagonal of the scores
# would be left, and any formula that gets the diagonal right would look good.


# %%
def random_inputs(strength, length=T, dtype=np.float64):
  """q, k, v of unit variance, rounded to `dtype`, and gates of the given mean strength; all stored as float64."""
  rng = np.random.default_rng(0)
  q, k, v = (rng.standard_normal((length, n)).astype(dtype).astype(np.float64) for n in (K, K, V))
  forget = rng.random((length, K)) < 0.5
  return q, k, v, np.where(forget, -2 * strength * rng.exponential(size=(length, K)), -0.01)


# %%
def error(actual, expected):
  """Root-mean-square error relative to the root mean square of what is expected."""
  actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
  return np.sqrt(np.mean((actual - expected) ** 2) / np.mean(expected**2))


# %% [markdown]
# ## 1. The recurrence
#
# $$S_t = \mathrm{diag}(e^{g_t})\, S_{t-1} + k_t^\top v_t, \qquad o_t = q_t S_t .$$
#
# The scan below is the truth of this notebook, in float64. `reference` is the same scan in the library, in float32. It
# agrees to about $10^{-7}$, the precision of float32.

# %%
@jax.jit
def recurrent(q, k, v, g, state):
  def step(state, token):
    q, k, v, g = token
    state = jnp.exp(g)[:, None] * state + k[:, None] * v
    return state, q @ state

  return jax.lax.scan(step, state, (q, k, v, g))[::-1]


# %%
def library(q, k, v, g, state, implementation, dtype=jnp.float32):
  q, k, v = (jnp.asarray(x, dtype)[None, :, None] for x in (q, k, v))
  g, state = jnp.asarray(g, jnp.float32)[None, :, None], jnp.asarray(state, jnp.float32)[None, None]
  output, state = gla(q, k, v, g, initial_state=state, scale=1.0, chunk_size=C, implementation=implementation)
  return output[0, :, 0], state[0, 0]


library = jax.jit(library, static_argnames=("implementation", "dtype"))

# %%
q, k, v, g = random_inputs(strength=0.3)
S0 = np.random.default_rng(1).standard_normal((K, V))
output, final_state = recurrent(q, k, v, g, S0)
reference, reference_state = library(q, k, v, g, S0, "reference")
assert error(reference, output) < 5e-7 and error(reference_state, final_state) < 5e-7

# %% [markdown]
# ## 2. From tokens to chunks
#
# **Step 1: unroll and read.** Let $S$ be the state that enters a chunk and $b_i = g_1 + \dots + g_i$ count from its
# first token. Token $j$'s write is faded by every gate after $j$. Multiply the unrolled state by $q_i$: one term reads
# the old state with $q_i \odot \Lambda_i$, $\Lambda = e^b$, the others are attention,
#
# $$O = (Q \odot \Lambda)\, S + P V, \qquad
#   P_{ij} = \sum_d q_{id}\, k_{jd}\, e^{\,b_{id} - b_{jd}} \quad (j \le i) .$$
#
# Taken literally, $P$ needs one exponential for each pair and channel. Pairs above the diagonal get the exponent
# `-inf`, so no positive exponent is ever formed.


# %%
def log_space_scores(q, k, g, dot):
  b = jnp.cumsum(g, 0)
  causal = jnp.tri(len(q), dtype=bool)[:, :, None]
  decay = jnp.exp(jnp.where(causal, b[:, None] - b[None], -jnp.inf))
  return (q[:, None] * k[None] * decay).sum(-1)


# %% [markdown]
# **Step 2: hand over.** With $\Gamma_j = e^{b_C - b_j}$, the decay over the tokens *after* $j$, the state that leaves
# is $S' = \mathrm{diag}(e^{b_C})\, S + (K \odot \Gamma)^\top V$. `sum_after` adds those gates up from the end: a
# difference $b_C - b_j$ of large sums would lose digits.


# %%
def sum_after(g):
  """Row j holds the sum of the rows below it."""
  return jax.lax.cumsum(jnp.pad(g[1:], ((0, 1), (0, 0))), reverse=True)


def one_chunk(state, chunk, scores, dot):
  q, k, v, g = chunk
  upto, after, total = jnp.exp(jnp.cumsum(g, 0)), jnp.exp(sum_after(g)), jnp.exp(g.sum(0))
  output = dot(q * upto, state) + dot(scores(q, k, g, dot), v)
  return total[:, None] * state + dot((k * after).T, v), output


# %% [markdown]
# **Step 3: scan over chunks.** `dot` is every matrix product: operands in the dtype of the hardware's product, sums,
# gates and states in at least float32. In float64 the result is the scan of section 1, for every way to compute $P$
# that is right.


# %%
def product(dtype):
  wide = jnp.promote_types(dtype, jnp.float32)
  return lambda x, y: jnp.matmul(
    x.astype(dtype), y.astype(dtype), precision="highest", preferred_element_type=wide)


# %%
def chunkwise(q, k, v, g, state, scores, dtype=jnp.float64):
  *inputs, state = (jnp.asarray(x, jnp.promote_types(dtype, jnp.float32)) for x in (q, k, v, g, state))
  chunks = [x.reshape(-1, C, x.shape[-1]) for x in inputs]
  state, output = jax.lax.scan(lambda s, x: one_chunk(s, x, scores, product(dtype)), state, chunks)
  return output.reshape(len(q), -1), state


chunkwise = jax.jit(chunkwise, static_argnames=("scores", "dtype"))


# %%
def check(scores):
  """Output and final state: in float64 those of the float64 scan, in float32 those of the library's scan."""
  for dtype, expected, bound in ((jnp.float64, output, 1e-12), (jnp.float32, reference, 1e-6)):
    actual, state = chunkwise(q, k, v, g, S0, scores, dtype)
    assert error(actual, expected) < bound and error(state, final_state) < max(bound, 5e-7)
    print(f"{scores.__name__:18} {dtype.__name__}: {error(actual, expected):.1e}")


check(log_space_scores)


# %% [markdown]
# ## 3. Dividing by the cumulative decay
#
# `log_space_scores` has no matrix product, although an accelerator is fast only at matrix products. Because
# $e^{b_i - b_j} = \Lambda_i / \Lambda_j$, the scores factor:
#
# $$P = \text{lower triangle of } (Q \odot \Lambda)\,(K / \Lambda)^\top .$$


# %%
def factor_scores(q, k, g, dot):
  b = jnp.cumsum(g, 0)
  return jnp.tril(dot(q * jnp.exp(b), (k * jnp.exp(-b)).T))


check(factor_scores)

# %% [markdown]
# At a mean strength of 0.3 this is right. The range is another matter. Every entry of $P$ is of moderate size, but
# $1/\Lambda$ grows by a factor of $e^{s}$ per token at strength $s$. The largest number is $e^{88.7}$ in float32 and in
# bfloat16, which has the same exponent bits, and $e^{11.1}$ in float16.

# %%
limits = {dtype: np.log(float(jnp.finfo(dtype).max)) for dtype in ("float32", "bfloat16", "float16")}
assert np.allclose(list(limits.values()), [88.7, 88.7, 11.1], atol=0.05)
strong = random_inputs(strength=2.0)
assert np.exp(-np.cumsum(strong[3][:C], 0)).max() > 1e50

# %% [markdown]
# A channel of strength $88.7 / 64 = 1.4$ breaks a chunk of 64 tokens. GLA's layer takes $\alpha =
# \mathrm{sigmoid}(x)^{1/16}$ (section 4.4), which reaches 1.4 at $x = -22$, so its training rarely meets the limit. A
# plain sigmoid reaches it at $x = -1.1$, and a reset between documents, $g = -10^4$, is over it at once.

# %%
sigmoid_strength = lambda x, temperature: np.log1p(np.exp(-x)) / temperature
assert np.allclose([sigmoid_strength(-22.2, 16), sigmoid_strength(-1.1, 1)], limits["float32"] / C, rtol=0.01)
for dtype in (jnp.float32, jnp.bfloat16):
  assert not jnp.isfinite(chunkwise(*strong, S0, factor_scores, dtype)[0]).all()
  assert jnp.isfinite(chunkwise(*strong, S0, log_space_scores, dtype)[0]).all()


# %% [markdown]
# **Picture 1.** The longest chunk whose $1/\Lambda$ is finite, tried out in each format, over the strength. The grey
# lines are $88.7/s$ and $11.1/s$, for a channel with the mean strength. The worst of 32 channels fails earlier, at
# strength 1 after 65 tokens in float32.


# %%
def exponents(strength):
  """Logarithm of the largest 1/decay of any channel after each of 4096 tokens."""
  return -np.cumsum(random_inputs(strength, length=4096)[3], 0).min(1)


def longest_chunk(strength, dtype):
  return int(np.isfinite(jnp.exp(exponents(strength)).astype(dtype)).argmin())


# %%
strengths = 2.0 ** np.arange(-4, 2.5, 0.5)
longest = {dtype: np.array([longest_chunk(s, dtype) for s in strengths]) for dtype in limits}
assert abs(longest["float32"] - longest["bfloat16"]).max() <= 1
assert all((longest[dtype] < limits[dtype] / strengths).all() for dtype in limits)
assert longest["float32"][strengths == 1.0] == 65 and longest["float16"][strengths == 1.0] < c

# %%
_, axis = plt.subplots(figsize=(6.5, 4.2), layout="constrained")
for dtype, marker, size in (("float32", "o", 9), ("bfloat16", "x", 5), ("float16", "^", 6)):
  axis.loglog(strengths, longest[dtype], marker, color="black", markersize=size, fillstyle="none", label=dtype)
  axis.loglog(strengths, limits[dtype] / strengths, color="0.6", zorder=0)
axis.axhline(C, color="black", linestyle=":", linewidth=1, label=f"chunk of {C}")
axis.set(xlabel="mean strength of a gate, $-g$", ylabel="longest chunk that does not overflow, tokens")
_ = axis.legend(loc="lower left")


# %% [markdown]
# ### What bfloat16 changes
#
# It changes not the range, but the digits. Factors rounded to bfloat16 cost $2^{-9}$ each, whatever their size. The
# *exponents* must stay in float32: at $b = -20$ neighbouring bfloat16 numbers are $1/8$ apart, and $e^{1/16}$ is 6%
# off.


# %%
def rounded_exponent_scores(q, k, g, dot):
  b = jnp.cumsum(g, 0).astype(jnp.bfloat16).astype(jnp.float32)
  return jnp.tril(dot(q * jnp.exp(b), (k * jnp.exp(-b)).T))


# %%
rounded = random_inputs(0.3, dtype=jnp.bfloat16)
truth = recurrent(*rounded, S0)[0]
both = factor_scores, rounded_exponent_scores
good, bad = (error(chunkwise(*rounded, S0, f, jnp.bfloat16)[0], truth) for f in both)
assert good < 5e-3 < 2e-2 < bad

# %% [markdown]
# ## 4. Secondary chunking
#
# The factors of a pair $(i, j)$ fail because both count from the start of the chunk, which lies before $j$. If they
# count from a point *between* $j$ and $i$, both are decays. Section 4.3 of the paper cuts the chunk into sub-chunks of
# $c$ tokens, and that point is the border before $i$'s sub-chunk.
#
# **Step 1: cut**, and sum the gates from the start of each sub-chunk and to its end.
#
# **Step 2: pairs in different sub-chunks**, $i$ in $n$ and $j$ in $m < n$. On its way a write passes the rest of $m$,
# the sub-chunks between, and $n$ up to $i$:
#
# $$b_i - b_j = \underbrace{\mathrm{upto}_i}_{\text{to the query}} +
#   \underbrace{\textstyle\sum_{m < r < n} \mathrm{total}_r + \mathrm{after}_j}_{\text{to the key}} .$$
#
# No exponent is positive. A factor that underflows belongs to a pair whose decay is below $10^{-38}$.
#
# **Step 3: pairs in the same sub-chunk.** No border lies between them. They take the log-space form, in float32, on $c
# \times c$ pairs instead of $C \times C$. **Step 4: assemble** the lower triangle of blocks.


# %%
def block_scores(n, m, q, k, g, dot):
  if m >= n:
    return log_space_scores(q[n], k[n], g[n], dot) if m == n else jnp.zeros((c, c), q.dtype)
  upto, key_decay = jnp.cumsum(g[n], 0), sum_after(g[m]) + g[m + 1 : n].sum((0, 1))
  return dot(q[n] * jnp.exp(upto), (k[m] * jnp.exp(key_decay)).T)


# %%
def secondary_scores(q, k, g, dot):
  parts, numbers = [x.reshape(-1, c, x.shape[-1]) for x in (q, k, g)], range(len(q) // c)
  return jnp.block([[block_scores(n, m, *parts, dot) for m in numbers] for n in numbers])


check(secondary_scores)

# %% [markdown]
# With the gates that broke the factors, float32 agrees with the library's scan to $10^{-6}$, and bfloat16 products to
# bfloat16's own accuracy. A reset stays finite, too, but costs float32 two digits: the log-space blocks take
# differences $b_i - b_j$ of numbers near $-10^4$.

# %%
reset = np.array(strong[3])
reset[100] = -1e4
for gates, bounds in ((strong[3], (0, 2e-6)), (reset, (1e-5, 2e-4))):
  expected = library(*strong[:3], gates, S0, "reference")[0]
  outputs = (chunkwise(*strong[:3], gates, S0, secondary_scores, dtype)[0] for dtype in (jnp.float32, jnp.bfloat16))
  single, half = (error(x, expected) for x in outputs)
  assert bounds[0] < single < bounds[1] and half < 5e-3


# %% [markdown]
# ## 5. What the library does
#
# ### `xla_chunked`: halve until nothing is left
#
# Secondary chunking with *two* sub-chunks, applied again to each half, down to single tokens. The border is always the
# middle, a token's own score carries no gate, and no log-space block remains.


# %%
def halving_scores(q, k, g, dot):
  s = len(q) // 2
  if s == 0:
    return (q * k).sum(1, keepdims=True)
  inside = jax.vmap(lambda *half: halving_scores(*half, dot))(*(x.reshape(2, s, -1) for x in (q, k, g)))
  across = dot(q[s:] * jnp.exp(jnp.cumsum(g[s:], 0)), (k[:s] * jnp.exp(sum_after(g[:s]))).T)
  return jnp.block([[inside[0], jnp.zeros((s, s), q.dtype)], [across, inside[1]]])


check(halving_scores)

# %% [markdown]
# The library computes all blocks of one size, a *level*, as one masked $C \times C$ product; notebook 01 shows that
# form. No difference is taken, so a reset costs nothing: the error stays below $10^{-6}$ in both.

# %%
for inputs in ((q, k, v, g), strong, (*strong[:3], reset)):
  expected = library(*inputs, S0, "reference")[0]
  assert error(chunkwise(*inputs, S0, halving_scores, jnp.float32)[0], expected) < 1e-6
  assert error(library(*inputs, S0, "xla_chunked", jnp.float32)[0], expected) < 1e-6


# %% [markdown]
# ### `pallas_triton`: factors from the middle, where they fit
#
# Levels cost $\log_2 C$ products, and gates are rarely that strong. So the GPU kernel takes factors where they fit.
# With $x_i$ the sum of gates from the *middle* of the chunk to row $i$, positive before it, $X = Q \odot e^{x}$ and $Y
# = K \odot e^{-x}$ give the same scores, and each factor sees half a chunk.


# %%
def centred_factors(q, k, g):
  m = len(q) // 2
  x = jnp.concatenate([-sum_after(g[:m]), jnp.cumsum(g[m:], 0)])
  return q * jnp.exp(x), k * jnp.exp(-x)


def centred_scores(q, k, g, dot):
  X, Y = centred_factors(q, k, g)
  return jnp.tril(dot(X, Y.T))


check(centred_scores)

# %% [markdown]
# A chunk of which any channel decays below $e^{-60}$ in one half goes to exact levels instead. The bound leaves
# $e^{28}$ of float32's range for data and sums. Pairs above the diagonal may reach $e^{120}$: they must be dropped by a
# *selection*; multiplied by a mask of zeros, they would become NaN.

# %%
limit = float(exact_chunks.LIMIT * np.log(2))
assert np.isclose(limit, -60)
halves = lambda g: g.reshape(-1, 2, C // 2, K).sum(2).min((1, 2))
assert halves(g).min() > limit > halves(strong[3]).max()
for inputs, scores in (((q, k, v, g), centred_scores), (strong, halving_scores)):
  ours, _ = chunkwise(*inputs, S0, scores, jnp.float32)
  assert error(library(*inputs, S0, "pallas_triton", jnp.float32)[0], ours) < 2e-6

# %% [markdown]
# ## 6. Error against gate strength
#
# **Picture 2.** Relative error of the output against the float64 scan, four chunks of 64 tokens. The Pallas kernels are
# interpreted here, with the CPU's float32 products where a GPU takes three TF32 passes. A cross marks the last strength
# with a finite result.

# %%
grid = 2.0 ** np.arange(-6, 11)
forms = {"factors": factor_scores, "secondary": secondary_scores}
names = [*forms, "xla_chunked", "pallas_triton"]


def forward(name, inputs, dtype):
  if name in forms:
    return chunkwise(*inputs, S0, forms[name], dtype)[0]
  return library(*inputs, S0, name, dtype)[0]


# %%
errors = {}
for dtype in (jnp.float32, jnp.bfloat16):
  for strength in grid:
    inputs = random_inputs(strength, dtype=dtype)
    expected = recurrent(*inputs, S0)[0]
    for name in names:
      errors.setdefault((dtype, name), []).append(error(forward(name, inputs, dtype), expected))

# %% [markdown]
# Factors end where they overflow. Until then float32 rounds their growing exponents, at $b = -80$ to $4 \cdot 10^{-6}$.
# Secondary chunking has no end. With bfloat16 products it is the most accurate, because pairs of near tokens stay in
# float32. With float32 products the differences $b_i - b_j$ of its log-space blocks make the error grow with the gates.
# The library forms sums only. `xla_chunked` stays at rounding error, and `pallas_triton` has an error like
# the factors' below its limit and like `xla_chunked`'s above it.

# %%
errors = {key: np.array(y) for key, y in errors.items()}
last = {name: grid[np.isfinite(errors[jnp.float32, name])].max() for name in names}
assert last["factors"] < 2 and last["secondary"] == last["xla_chunked"] == last["pallas_triton"] == grid[-1]
single, half = ({name: errors[dtype, name] for name in names} for dtype in (jnp.float32, jnp.bfloat16))
assert single["secondary"][-1] > 100 * single["secondary"][grid == 1] and single["xla_chunked"].max() < 5e-7
assert single["pallas_triton"][grid < 1].max() < 3e-6 and single["pallas_triton"][grid > 1].max() < 5e-7
assert (half["secondary"] < np.fmin(np.fmin(half["factors"], half["xla_chunked"]), half["pallas_triton"])).all()
assert max(half["xla_chunked"].max(), half["pallas_triton"].max()) < 5e-3

# %%
styles = dict(zip(names, (("s:", "black"), ("o--", "black"), ("-", "black"), ("-", "0.6"))))


def draw_errors(axis, dtype):
  for name, (style, color) in styles.items():
    y = errors[dtype, name]
    end = np.flatnonzero(np.isfinite(y))[-1]
    axis.loglog(grid, y, style, color=color, fillstyle="none", label=name)
    axis.loglog(grid[end], y[end], "x", color="black", markersize=9)


# %%
figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
for axis, dtype, title in zip(axes, (jnp.float32, jnp.bfloat16), ("float32", "bfloat16 products")):
  draw_errors(axis, dtype)
  axis.axvline(limits["float32"] / C, color="black", linewidth=0.8, linestyle=(0, (1, 4)), label="88.7 / C")
  axis.set(title=title, xlabel="mean strength of a gate, $-g$", ylabel="relative RMS error of the output")
axes[1].set(ylim=(1e-3, 1e-2))
_ = axes[0].legend(loc="upper left")


# %% [markdown]
# ## 7. What each form costs
#
# Counted in the traced programs, per token of one head with $K = V = 128$, for output and state.


# %%
def equations(jaxpr):
  for equation in jaxpr.eqns:
    inner = equation.params.get("jaxpr")
    yield from equations(inner) if inner else [equation]


# %%
def cost(scores, length, width=128):
  """Matrix FLOP and exponentials a token."""
  keys, state = (jax.ShapeDtypeStruct((n, width), jnp.float32) for n in (length, width))
  run = lambda state, *chunk: one_chunk(state, chunk, scores, product(jnp.float32))
  found = [(e.primitive.name, e.outvars[0].aval.size, e) for e in equations(jax.make_jaxpr(run)(state, *[keys] * 4))]
  flop = sum(2 * size * e.invars[0].aval.shape[-1] for name, size, e in found if name == "dot_general")
  exponentials = sum(size for name, size, _ in found if name == "exp")
  return flop / length, exponentials / length


# %%
table = {"recurrent, C = 1": cost(halving_scores, 1), "log space, C = 2048": cost(log_space_scores, 2048),
         "log space, C = 64": cost(log_space_scores, C), "factors, C = 64": cost(factor_scores, C),
         "secondary, 64 and 16": cost(secondary_scores, C), "halving, C = 64": cost(halving_scores, C)}
for name, (flop, exponentials) in table.items():
  print(f"{name:22}{flop:8.0f} matrix FLOP, {exponentials:8.0f} exponentials")

# %% [markdown]
# Per token, reading and writing the state takes $4KV$ FLOP and $P V$ takes $2CV$. Factors add $2CK$ for $P$, secondary
# chunking $\frac{6}{16}$ of that, and halving $(C - 1)K$, because both skip blocks above the diagonal (the library's
# masked levels do not: $2CK \log_2 C$). Log-space blocks take $C$ or $c$ times $K$ exponentials. A multiprocessor of an
# H100 does 16 of them per clock, against 2048 multiply-adds of bfloat16 products. Per token, the log-space chunk spends
# 528 clocks on exponentials and 20 on products, secondary chunking 168 and 22, factors 32 and 24.

# %%
flop, exponentials = (dict(zip(table, column)) for column in zip(*table.values()))
common = 4 * 128 * 128 + 2 * C * 128
assert flop["log space, C = 64"] == common
assert flop["factors, C = 64"] == common + 2 * C * 128
assert flop["halving, C = 64"] == common + (C - 1) * 128
assert flop["secondary, 64 and 16"] == common + 2 * C * 128 * 6 / 16
clocks = [(exponentials[name] / 16, flop[name] / 4096) for name in list(table)[2:5]]
assert np.allclose(clocks, [(528, 20), (32, 24), (168, 22)], rtol=0.05)
