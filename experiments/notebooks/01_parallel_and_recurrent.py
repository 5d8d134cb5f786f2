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
# # Gated linear attention: one function, four ways to compute it
#
# Gated linear attention (GLA, [Yang et al. 2024](https://arxiv.org/abs/2312.06635)) can be run like a
# recurrent network, like attention, or chunk by chunk. This notebook derives the three forms side by side,
# then the exact scheme that the kernels of this project use inside a chunk. Every claim is followed by an
# `assert`.
#
# The notation is for one head, and rows are tokens:
#
# | symbol | shape | meaning |
# |---|---|---|
# | $q_t, k_t$ | $K$ | query and key of token $t$ |
# | $v_t, o_t$ | $V$ | value and output of token $t$ |
# | $g_t \le 0$ | $K$ | `log_decay`, the logarithm of the forget gate $\alpha_t = e^{g_t}$, one number per key channel |
# | $S_t$ | $K \times V$ | state after token $t$; $S_0$ is given |
# | $T, C$ | | length of the sequence and of a chunk |
#
# The derivation runs in float64, so that "equal" can mean equal to twelve digits. The kernels run in float32.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap

from kernels import cpu_compiler, gla
from kernels.gla import step as library_step

# %%
cpu_compiler.switch_off()  # of a fault in jaxlib: it has to come before JAX starts a device
jax.config.update("jax_enable_x64", True)


# %%
def random_inputs(seed, length, key_dim=8, value_dim=12, strength=0.3):
  """Unit-variance q, k, v and gates of mean -strength, in float64."""
  rng = np.random.default_rng(seed)
  q, k = rng.standard_normal((2, length, key_dim))
  v = rng.standard_normal((length, value_dim))
  return q, k, v, -strength * rng.exponential(size=(length, key_dim))


# %%
def error(actual, expected):
  """Root-mean-square error relative to the root mean square of what is expected."""
  actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
  return np.sqrt(np.mean((actual - expected) ** 2) / np.mean(expected**2))


T, C = 128, 16
q, k, v, log_decay = random_inputs(seed=0, length=T)
S0 = np.random.default_rng(1).standard_normal((q.shape[1], v.shape[1]))


# %% [markdown]
# ## 1. Recurrent form: the definition
#
# $$S_t = \mathrm{diag}(e^{g_t})\, S_{t-1} + k_t^\top v_t, \qquad o_t = q_t S_t .$$
#
# Each token fades every row of the state by its own gate, writes one outer product, and reads with the query.
# The state never grows, which is why this form is used to generate text.

# %%
def step(state, token):
  q, k, v, log_decay = token
  state = jnp.exp(log_decay)[:, None] * state + k[:, None] * v
  return state, q @ state


@jax.jit
def recurrent(q, k, v, log_decay, state):
  state, output = jax.lax.scan(step, state, (q, k, v, log_decay))
  return output, state


# %% [markdown]
# The library decodes with the same step. Its arrays carry batch and head axes and are float32.

# %%
output, final_state = recurrent(q, k, v, log_decay, S0)
token = [x[:1, None].astype(np.float32) for x in (q, k, v, log_decay)]
library_state, library_output = library_step(S0[None, None].astype(np.float32), *token)
first_state, first_output = step(S0, (q[0], k[0], v[0], log_decay[0]))
assert error(library_state[0, 0], first_state) < 1e-6
assert error(library_output[0, 0], first_output) < 1e-6


# %% [markdown]
# ## 2. Parallel form: unroll the recurrence
#
# Let $b_t = \sum_{r \le t} g_r$. The write of token $j$ has faded by
# $e^{g_{j+1}} \cdots e^{g_i} = e^{b_i - b_j}$ when token $i$ reads it. Hence
#
# $$o_i = (q_i \odot e^{b_i})\, S_0 + \sum_{j \le i} P_{ij}\, v_j, \qquad
#   P_{ij} = \sum_d q_{id}\, k_{jd}\; e^{\,b_{id} - b_{jd}} .$$
#
# $P$ plays the part of the attention matrix. It has no softmax, but a decay that depends on the data and on the
# channel. Taken literally, the sum needs $T^2 K$ exponentials. `-inf` is put in *before* the exponential, so
# that pairs above the diagonal yield exactly zero, and so do their gradients.

# %%
@jax.jit
def logspace_scores(q, k, log_decay):
  b = jnp.cumsum(log_decay, 0)
  causal = jnp.tri(len(q), dtype=bool)[:, :, None]
  decay = jnp.exp(jnp.where(causal, b[:, None] - b[None], -jnp.inf))
  return jnp.einsum("id,jd,ijd->ij", q, k, decay)


# %% [markdown]
# The exponential splits, $e^{b_i - b_j} = e^{b_i} e^{-b_j}$, so the paper writes one matrix product instead.
# With $B = e^{b}$ and $M$ the lower triangle of ones,
#
# $$P = \big((Q \odot B)\,(K / B)^\top\big) \odot M .$$

# %%
def factored_scores(q, k, log_decay):
  b = jnp.cumsum(log_decay, 0)
  return jnp.tril((q * jnp.exp(b)) @ (k * jnp.exp(-b)).T)


def parallel(q, k, v, log_decay, state, scores=logspace_scores):
  return (q * jnp.exp(jnp.cumsum(log_decay, 0))) @ state + scores(q, k, log_decay) @ v


# %% [markdown]
# Both equal the scan. With all gates at zero nothing fades, and plain causal linear attention remains.

# %%
assert error(parallel(q, k, v, log_decay, S0), output) < 1e-12
assert error(parallel(q, k, v, log_decay, S0, factored_scores), output) < 1e-12
assert error(logspace_scores(q, k, 0 * log_decay), jnp.tril(q @ k.T)) < 1e-12

# %% [markdown]
# ### The factored form overflows
#
# $K / B = k\, e^{-b}$ grows as fast as the memory fades. In float32 it is infinite once $-b > 88.7$, which a channel
# with a mean gate of $g = -1$ reaches after 89 tokens, although every entry of $P$ is of moderate size.

# %%
strong = [x.astype(np.float32) for x in random_inputs(seed=2, length=T, strength=1.5)]
assert jnp.isinf(jnp.exp(-jnp.cumsum(strong[3], 0))).any()
assert not jnp.isfinite(parallel(*strong, 0 * S0, factored_scores)).all()

truth = recurrent(*(x.astype(np.float64) for x in strong), 0 * S0)[0]
assert error(parallel(*strong, 0 * S0), truth) < 1e-5
assert abs(logspace_scores(strong[0], strong[1], strong[3])).max() < 20


# %% [markdown]
# ## 3. Chunkwise form: attention inside, recurrence between
#
# The formula of section 2 holds from any starting state. So cut the sequence into chunks of $C$ tokens, let
# $b$ count from the start of the chunk, and hand the state on:
#
# $$O = (Q \odot e^{b})\, S + P\, V, \qquad
#   S' = \mathrm{diag}(e^{b_C})\, S + (K \odot e^{\,b_C - b})^\top V .$$
#
# The exponents $b$ and $b_C - b$ are never positive. The second is summed from the end of the chunk and not
# subtracted, and section 5 shows why that matters.

# %%
@jax.jit
def sum_after(log_decay):
  """Row j holds the sum of the rows below it."""
  return jax.lax.cumsum(jnp.pad(log_decay[1:], ((0, 1), (0, 0))), reverse=True)


# %%
def one_chunk(state, chunk, scores=logspace_scores):
  q, k, v, log_decay = chunk
  b = jnp.cumsum(log_decay, 0)
  output = (q * jnp.exp(b)) @ state + scores(q, k, log_decay) @ v
  return jnp.exp(b[-1])[:, None] * state + (k * jnp.exp(sum_after(log_decay))).T @ v, output


# %%
def chunkwise(q, k, v, log_decay, state, chunk_size, scores=logspace_scores):
  chunks = [jnp.reshape(x, (-1, chunk_size, x.shape[-1])) for x in (q, k, v, log_decay)]
  state, output = jax.lax.scan(lambda s, c: one_chunk(s, c, scores), state, chunks)
  return output.reshape(len(q), -1), state


# %% [markdown]
# The chunk size changes the schedule and nothing else. $C = 1$ is the recurrent form, $C = T$ is the parallel
# form.

# %%
for size in (1, 2, 16, 64, T):
  chunk_output, chunk_state = chunkwise(q, k, v, log_decay, S0, size)
  assert error(chunk_output, output) < 1e-12
  assert error(chunk_state, final_state) < 1e-12


# %% [markdown]
# ## 4. Levels: exact scores from matrix products
#
# Inside a chunk we want the speed of the factored form and the safety of the log-space form. The trouble was
# one origin for all pairs. If a point $m$ lies *between* $j$ and $i$, both factors are decays:
#
# $$e^{\sum_{j < r \le i} g_r} \;=\; e^{\sum_{m < r \le i} g_r} \cdot e^{\sum_{j < r \le m} g_r} .$$
#
# Choose $m$ by halving. For $s = 1, 2, 4, \dots, C/2$, cut the chunk into blocks of $2s$ rows. Level $s$ owns
# the pairs with $i$ in the second and $j$ in the first half of the same block, and $m$ is the last row of the
# first half. The exponents of all its rows form one array $E_s$: an inclusive prefix sum within the second
# half, an exclusive suffix sum within the first. The diagonal has no decay. Together
#
# $$P = \mathrm{diag}\Big(\sum_d q_{id} k_{id}\Big) +
#   \sum_s \mathrm{mask}_s \odot \big((Q \odot e^{E_s})\,(K \odot e^{E_s})^\top\big), \qquad E_s \le 0 .$$

# %%
def levels(chunk_size):
  return [2**n for n in range(chunk_size.bit_length() - 1)]


def exponents(log_decay, s):
  first, second = jnp.moveaxis(jnp.reshape(log_decay, (-1, 2, s, log_decay.shape[-1])), 1, 0)
  halves = jax.vmap(sum_after)(first), jnp.cumsum(second, 1)
  return jnp.stack(halves, 1).reshape(log_decay.shape)


# %% [markdown]
# In binary, $i$ and $j$ belong to level $s$ when $s$ is the highest digit in which they differ, that is when
# $s \le (i \;\mathrm{xor}\; j) < 2s$. Two different numbers have exactly one such digit, so the levels share
# out the pairs below the diagonal with none missing and none counted twice.

# %%
def level_mask(size, s):
  i, j = np.indices((size, size))
  return (i > j) & ((i ^ j) // s == 1)


assert (sum(level_mask(C, s).astype(int) for s in levels(C)) + np.eye(C) == np.tri(C)).all()


# %%
@jax.jit
def level_scores(q, k, log_decay):
  scores = jnp.diag((q * k).sum(-1))
  for s in levels(len(q)):
    weight = jnp.exp(exponents(log_decay, s))
    scores += jnp.where(level_mask(len(q), s), (q * weight) @ (k * weight).T, 0)
  return scores


# %% [markdown]
# No exponent is positive. The scores, and everything built on them, equal section 2's at any strength of the gate,
# in float32 as well.

# %%
assert all((exponents(log_decay[:C], s) <= 0).all() for s in levels(C))
assert error(level_scores(q, k, log_decay), logspace_scores(q, k, log_decay)) < 1e-12
assert error(chunkwise(q, k, v, log_decay, S0, C, level_scores)[0], output) < 1e-12
assert error(chunkwise(*strong, 0 * S0, 32, level_scores)[0], truth) < 1e-6


# %% [markdown]
# **Picture.** On the left is the matrix $P$ of a gated example, in which one token half-way forgets almost
# everything. The right side shows which form computes which pair. The parallel form computes every cell on or
# below the diagonal, the recurrent form none of them. The chunkwise form computes the triangles inside the
# heavy grid and leaves the rest to the state. Levels tile each triangle.

# %%
size = 64
qp, kp, _, gp = random_inputs(seed=3, length=size, key_dim=16, strength=0.1)
gp[size // 2 + 3] = -4.0
magnitude = np.where(np.tri(size, dtype=bool), abs(logspace_scores(qp, kp, gp)), np.nan)
i, j = np.indices((size, size))
owner = np.where(i // C == j // C, np.floor(np.log2(np.maximum(2 * (i ^ j), 1))), len(levels(C)) + 1)
owner = np.where(i >= j, owner, np.nan)


# %%
def chunk_grid(axis, title):
  axis.set(title=title, xlabel="key position $j$", ylabel="query position $i$")
  for edge in np.arange(0, size + 1, C) - 0.5:
    axis.axhline(edge, color="black", linewidth=1.2)
    axis.axvline(edge, color="black", linewidth=1.2)
  axis.set(xticks=range(0, size, C), yticks=range(0, size, C))


# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
image = left.imshow(np.log10(magnitude), cmap="gray_r", vmin=-3, vmax=1)
figure.colorbar(image, ax=left, label=r"$\log_{10} |P_{ij}|$", extend="min")
image = right.imshow(owner, cmap=ListedColormap([str(x) for x in np.linspace(0, 0.88, 6)]), vmin=-0.5, vmax=5.5)
names = ["diagonal", *(f"level s = {s}" for s in levels(C)), "state"]
figure.colorbar(image, ax=right, ticks=range(6)).ax.set_yticklabels(names)
chunk_grid(left, f"Decayed scores, chunks of {C}")
chunk_grid(right, "Who computes the pair")

# %% [markdown]
# ## 5. Accuracy in float32
#
# Levels are also more accurate than differences $b_i - b_j$. A difference of two large sums loses the digits
# of a small result. A level adds terms of one sign only, so an exponent $x$ has a relative error of a few
# roundings $\varepsilon$, and $e^{x}$ an absolute error of about $|x|\, e^{x} \varepsilon < \varepsilon$. The
# gates below are mixed: half the tokens keep a channel, half forget it with the given mean strength. Notebook
# 02 draws such errors for more schemes, and says where the GPU kernels leave levels out.

# %%
def float32_error(scores, strength, length=64):
  q, k, _, forget = random_inputs(seed=4, length=length, key_dim=32, strength=strength)
  log_decay = np.where(np.random.default_rng(5).random(forget.shape) < 0.5, -0.01, forget)
  q, k, log_decay = (x.astype(np.float32) for x in (q, k, log_decay))
  return error(scores(q, k, log_decay), logspace_scores(*(x.astype(np.float64) for x in (q, k, log_decay))))


for strength in 2.0 ** np.arange(-6, 12):
  assert float32_error(level_scores, strength) < 3e-7
assert float32_error(logspace_scores, strength) > 30 * float32_error(level_scores, strength)


# %% [markdown]
# ## 6. The library computes the same function
#
# `kernels.gla` takes `[B, T, H, K]` arrays and returns the output and the final state. Its implementations
# differ in speed and memory only. The two that suit any device are compared here with the float64 scan.

# %%
def library(q, k, v, log_decay, state, **options):
  q, k, v, log_decay = (jnp.asarray(x, jnp.float32)[None, :, None] for x in (q, k, v, log_decay))
  state = jnp.asarray(state, jnp.float32)[None, None]
  output, state = gla(q, k, v, log_decay, initial_state=state, scale=1.0, chunk_size=C, **options)
  return output[0, :, 0], state[0, 0]


# %%
for name in ("reference", "xla_chunked"):
  library_output, library_state = library(q, k, v, log_decay, S0, implementation=name)
  assert error(library_output, output) < 1e-5
  assert error(library_state, final_state) < 1e-5
  assert error(library(*strong, 0 * S0, implementation=name)[0], truth) < 1e-5

# %% [markdown]
# ## 7. State passing
#
# The future needs to know nothing of the past but the state. A sequence may be cut anywhere, the pieces computed
# by any form, and the state handed on.

# %%
def cut(position):
  return zip(*(np.split(x, [position]) for x in (q, k, v, log_decay)))


for position in (1, 17, 64, 127):
  head, tail = cut(position)
  assert error(parallel(*tail, recurrent(*head, S0)[1]), output[position:]) < 1e-12

# %%
head, tail = cut(48)
first, middle = library(*head, S0)
second, _ = library(*tail, middle)
assert error(jnp.concatenate([first, second]), output) < 1e-5

# %% [markdown]
# Pieces may even be computed at the same time. A piece with total decay $a$ and, from a zero state, final
# state $S$ acts as $X \mapsto \mathrm{diag}(a)\, X + S$, and two such maps compose into a third:
# $(a_2, S_2) \circ (a_1, S_1) = (a_1 \odot a_2,\; \mathrm{diag}(a_2)\, S_1 + S_2)$. Long sequences can thus
# be shared among devices.

# %%
def piece_map(rows):
  return np.exp(log_decay[rows].sum(0))[:, None], recurrent(*(x[rows] for x in (q, k, v, log_decay)), 0 * S0)[1]


def then(one, two):
  return one[0] * two[0], two[0] * one[1] + two[1]


# %%
one, two, three, four = (piece_map(slice(a, a + T // 4)) for a in range(0, T, T // 4))
decay, added = then(then(one, two), then(three, four))
assert error(decay * S0 + added, final_state) < 1e-12

# %% [markdown]
# ## 8. Packed documents: reset by a gate
#
# A very negative gate at the first token of a document multiplies the state by $e^{-\text{large}} = 0$. So
# several documents can be packed in one row with no new formula, and no document sees another: the outputs
# equal the outputs of separate calls, and no gradient crosses the border. `segment_ids` asks the library for
# just that.

# %%
segment_ids = np.repeat([1, 2, 3, 4], [15, 1, 55, 57])
starts = np.flatnonzero(np.diff(segment_ids)) + 1
reset = np.array(log_decay)
reset[starts] = -1e4
documents = zip(*(np.split(x, starts) for x in (q, k, v, log_decay)))
alone = jnp.concatenate([recurrent(*document, S0 * (n == 0))[0] for n, document in enumerate(documents)])
assert error(chunkwise(q, k, v, reset, S0, C, level_scores)[0], alone) < 1e-12
assert error(library(q, k, v, log_decay, S0, segment_ids=segment_ids[None])[0], alone) < 1e-5

# %%
leak = jax.jacobian(lambda v: recurrent(q, k, v, reset, S0)[0][71:].sum())(v)
assert (leak[:71] == 0).all() and (leak[71:] != 0).all()

# %% [markdown]
# In float32 it takes sums of one sign. After the reset, $b$ is about $-10^4$: differences of that keep three decimals.

# %%
single = [x.astype(np.float32) for x in (q, k, reset)]
exact = logspace_scores(q, k, reset)
assert error(level_scores(*single), exact) < 3e-7
assert error(logspace_scores(*single), exact) > 1e-5

# %% [markdown]
# ## 9. The gradient of the gate needs no saved states
#
# In the formula of section 2, $b_t$ appears only as $q_t \odot e^{b_t}$ and $k_t \odot e^{-b_t}$. A small
# change of $b_t$ acts like a relative change of $q_t$ and the opposite one of $k_t$, and $g_t$ is in every
# $b_i$ with $i \ge t$:
#
# $$\frac{\partial L}{\partial b_t} =
#   q_t \odot \frac{\partial L}{\partial q_t} - k_t \odot \frac{\partial L}{\partial k_t}, \qquad
#   \frac{\partial L}{\partial g_t} = \sum_{i \ge t} \frac{\partial L}{\partial b_i} .$$
#
# The final state holds $e^{b_T}$ once more, which adds $\sum_e S_{T,de}\, \partial L / \partial S_{T,de}$ to
# the last row.

# %%
rng = np.random.default_rng(6)
d_output, d_final = rng.standard_normal(output.shape), rng.standard_normal(S0.shape)
_, pullback = jax.vjp(recurrent, q, k, v, log_decay, S0)
dq, dk, dv, d_log_decay, dS0 = pullback((d_output, d_final))
db = (q * dq - k * dk).at[-1].add((final_state * d_final).sum(1))
assert error(jax.lax.cumsum(db, reverse=True), d_log_decay) < 1e-12

# %% [markdown]
# The library applies the identity to every exponent of the levels, where again sums have one sign and nothing
# cancels. It agrees with autodiff through the scan for every input.

# %%
_, pullback = jax.vjp(library, q, k, v, log_decay, S0)
gradients = pullback((d_output.astype(np.float32), d_final.astype(np.float32)))
for actual, expected in zip(gradients, (dq, dk, dv, d_log_decay, dS0)):
  assert error(actual, expected) < 1e-5

# %% [markdown]
# ## 10. Cost
#
# Floating-point operations of the forward pass of one head, and the count of numbers that must be kept:
#
# | form | operations | kept | sequential steps |
# |---|---|---|---|
# | recurrent | $5\,T K V$ | $K V$ | $T$ |
# | parallel | $2\,T^2 (K + V)$ | $T^2$ | 1 |
# | chunkwise | $2\,T C (K + V) + 4\, T K V$ | $C^2 + K V$, or $\frac{T}{C} K V$ with all states | $T / C$ |
#
# XLA counts the same for our code, up to elementwise work that the table leaves out. Running sums are taken off:
# XLA charges for each of their rows as if it were summed afresh.

# %%
def counted(function, length, dim=64):
  x, state = jnp.zeros((length, dim)), jnp.zeros((dim, dim))
  return jax.jit(function).lower(x, x, x, x, state).cost_analysis()["flops"]


def running_sum(q, k, v, log_decay, state):
  return jnp.cumsum(log_decay, 0)


cost = {"recurrent": lambda T, C, d: 5 * T * d * d,
        "parallel": lambda T, C, d: 2 * T * T * 2 * d,
        "chunkwise": lambda T, C, d: 2 * T * C * 2 * d + 4 * T * d * d}

# %%
token_count = counted(lambda q, k, v, g, S: step(S, (q[0], k[0], v[0], g[0])), 1)
chunk_count = counted(lambda q, k, v, g, S: one_chunk(S, (q, k, v, g), factored_scores), 64)
parallel_count = counted(lambda q, k, v, g, S: factored_scores(q, k, g) @ v, 1024)
assert abs(token_count / cost["recurrent"](1, 1, 64) - 1) < 0.05
assert abs((chunk_count - 3 * counted(running_sum, 64)) / cost["chunkwise"](64, 64, 64) - 1) < 0.05
assert abs((parallel_count - counted(running_sum, 1024)) / cost["parallel"](1024, 1, 64) - 1) < 0.05

# %% [markdown]
# Twice the length costs the parallel form four times as much and the others twice. At $C = K = V$ the scores of the
# chunkwise form cost as much as its state: a larger chunk buys fewer sequential steps and fewer stored states with more
# arithmetic. The levels of a chunk hold $C (C - 1) / 2$ pairs in all, so a program that multiplies each level's own
# blocks only, unlike the plain one above, pays nothing in products for being exact.

# %%
growth = {name: f(4096, 64, 128) / f(2048, 64, 128) for name, f in cost.items()}
assert growth == {"recurrent": 2, "parallel": 4, "chunkwise": 2}
assert cost["chunkwise"](2048, 128, 128) == 2 * cost["chunkwise"](2048, 0, 128)
assert cost["parallel"](2048, 64, 128) > 5 * cost["chunkwise"](2048, 64, 128)
assert sum(level_mask(64, s).sum() for s in levels(64)) == 64 * 63 // 2
