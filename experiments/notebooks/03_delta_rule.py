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
# # The delta rule: a memory that corrects itself, and its chunkwise form
#
# Linear attention only ever adds to its state. The delta rule first looks up what the state holds under the
# key and writes the difference. That is online regression, and it makes the recurrence harder to run in
# parallel: each write depends on the writes before it. This notebook derives the rule, then the WY
# representation and the UT transform with which DeltaNet
# ([Yang et al. 2024](https://arxiv.org/abs/2406.06484)) runs it chunk by chunk. The last section adds GLA's decay
# per key channel. Every claim is followed by an `assert`.
#
# The notation is for one head, and rows are tokens:
#
# | symbol | shape | meaning |
# |---|---|---|
# | $q_t, k_t$ | $K$ | query and key of token $t$; keys have norm 1 |
# | $v_t, o_t$ | $V$ | value and output of token $t$ |
# | $\beta_t$ | | writing strength of token $t$, in $[0, 1]$ unless said otherwise |
# | $g_t$ | $K$ | logarithms of the decays of token $t$, in section 7 |
# | $S_t$ | $K \times V$ | state after token $t$; $S_0$ is given |
# | $T, C$ | | length of the sequence and of a chunk |
#
# Letters of the chunk form are as in `kernels/delta_rule/README.md`, which has the backward pass and the GPU
# kernels.
#
# The derivation runs in float64, so that "equal" can mean equal to twelve digits. The kernels run in float32.

# %%
import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from jax.scipy.linalg import solve_triangular

from kernels import chunks, cpu_compiler, delta_rule

# %%
cpu_compiler.switch_off()  # of a fault in jaxlib: it has to come before JAX starts a device
jax.config.update("jax_enable_x64", True)


# %%
def random_inputs(seed, length, key_dim=16, value_dim=12):
  """Queries and values of unit variance, keys of norm 1 and beta between 0 and 1, in float64."""
  rng = np.random.default_rng(seed)
  q, k = rng.standard_normal((2, length, key_dim))
  v = rng.standard_normal((length, value_dim))
  return q, k / np.linalg.norm(k, axis=1, keepdims=True), v, rng.random(length)


# %%
def error(actual, expected):
  """Root-mean-square error relative to the root mean square of what is expected."""
  actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
  return np.sqrt(np.mean((actual - expected) ** 2) / np.mean(expected**2))


T, C = 128, 16
q, k, v, beta = random_inputs(seed=0, length=T)
S0 = np.random.default_rng(1).standard_normal((k.shape[1], v.shape[1]))


# %% [markdown]
# ## 1. A step of regression for each token
#
# The state is to answer $k_t$ with $v_t$, that is, to make $\frac12 |k_t S - v_t|^2$ small. The gradient is
# $k_t^\top (k_t S - v_t)$, and one step of gradient descent with learning rate $\beta_t$ is the delta rule:
#
# $$S_t = S_{t-1} + \beta_t\, k_t^\top (v_t - k_t S_{t-1}), \qquad o_t = q_t S_t .$$

# %%
def step(state, token):
  q, k, v, beta = token
  state = state + beta * k[:, None] * (v - k @ state)
  return state, q @ state


def loss(state, k, v):
  return jnp.sum((k @ state - v) ** 2) / 2


# %%
first, _ = step(S0, (q[0], k[0], v[0], beta[0]))
assert error(first, S0 - beta[0] * jax.grad(loss)(S0, k[0], v[0])) < 1e-12


# %% [markdown]
# Linear attention does the same for another loss, $-\langle k_t S, v_t \rangle$. It has no minimum, and its
# gradient $-k_t^\top v_t$ does not depend on the state, so the rule adds, whatever is stored already.

# %%
def adding_step(state, token):
  q, k, v, beta = token
  state = state + beta * k[:, None] * v
  return state, q @ state


slope = jax.grad(lambda state: -jnp.vdot(k[0] @ state, v[0]))(S0)
assert error(adding_step(S0, (q[0], k[0], v[0], beta[0]))[0], S0 - beta[0] * slope) < 1e-12

# %% [markdown]
# ### What beta does
#
# Multiply the rule by $k_t$. For a key of norm 1, the value that is read back is a mean of the old and the new value,
#
# $$k_t S_t = (1 - \beta_t)\, k_t S_{t-1} + \beta_t v_t ,$$
#
# so $\beta = 0$ leaves the state alone and $\beta = 1$ replaces the value. Beyond 1 the step overshoots, and
# at $\beta = 2$ the error comes back with its sign changed. Under keys orthogonal to $k_t$ nothing changes.

# %%
old = k[0] @ S0
orthogonal = k[1] - (k[1] @ k[0]) * k[0]
for strength in (0.0, 0.3, 1.0, 2.0):
  state, _ = step(S0, (q[0], k[0], v[0], strength))
  assert error(k[0] @ state, (1 - strength) * old + strength * v[0]) < 1e-12
  assert error(orthogonal @ state, orthogonal @ S0) < 1e-12

# %% [markdown]
# Written as $S_t = (I - \beta_t k_t^\top k_t)\, S_{t-1} + \beta_t k_t^\top v_t$, the rule is a linear
# recurrence. Its transition has the eigenvalue $1 - \beta_t |k_t|^2$ along the key and 1 elsewhere: with keys
# of norm 1 and $\beta_t \le 2$ nothing grows, with longer keys it can. This is why layers normalise their keys.

# %%
transition = lambda k, beta: jnp.eye(len(k)) - beta * jnp.outer(k, k)
state = transition(k[0], beta[0]) @ S0 + beta[0] * np.outer(k[0], v[0])
assert error(state, first) < 1e-12
eigenvalues = jnp.linalg.eigvalsh(transition(k[0], beta[0]))
assert error(eigenvalues, [1 - beta[0]] + [1.0] * (len(k[0]) - 1)) < 1e-12
assert jnp.linalg.norm(transition(2 * k[0], 0.9), ord=2) > 2

# %% [markdown]
# ## 2. Overwriting a key
#
# Write $(k_1, v_1)$ and $(k_2, v_2)$ under nearly orthogonal keys, then a new value $v_1'$ under $k_1$, all
# with $\beta = 1$. After each write, ask for $k_1$.

# %%
x = np.arange(12)
cosine = 0.1
key_1, key_2 = np.eye(2, 16)
key_2 = cosine * key_1 + np.sqrt(1 - cosine**2) * key_2
value_1, value_2, new_value = np.sin(x / 2), np.where(x % 2, 1.0, -1.0), x / 6 - 1
writes = [(key_1, value_1), (key_2, value_2), (key_1, new_value)]


# %%
def retrieved(rule):
  """What k_1 retrieves after each write."""
  state, answers = np.zeros((16, 12)), []
  for key, value in writes:
    state, answer = rule(state, (key_1, key, value, 1.0))
    answers.append(answer)
  return answers


delta, adding = retrieved(step), retrieved(adding_step)

# %% [markdown]
# The delta rule ends with $v_1'$ alone. Linear attention ends with the sum of both values, and $0.1\, v_2$
# as well. The middle write disturbs both rules a little, because the keys are only nearly orthogonal. With
# the delta rule the last write repairs that, too.

# %%
assert error(delta[0], value_1) < 1e-12 and error(adding[0], value_1) < 1e-12
assert error(delta[1], value_1 + cosine * (value_2 - cosine * value_1)) < 1e-12
assert error(adding[1], value_1 + cosine * value_2) < 1e-12
assert error(delta[2], new_value) < 1e-12
assert error(adding[2], value_1 + cosine * value_2 + new_value) < 1e-12

# %% [markdown]
# **Picture 1.** The answer to $k_1$ after each write, and the value last written under it.


# %%
def panel(axis, title, latest, delta, adding):
  axis.step(x, latest, color="0.6", linewidth=3, where="mid", label="last value written under $k_1$")
  axis.plot(x, delta, "o-", color="black", linewidth=1, label="delta rule")
  axis.plot(x, adding, "s--", color="black", markerfacecolor="white", linewidth=1, label="linear attention")
  axis.set(title=f"after writing {title}", xlabel="channel of the value")


# %%
figure, axes = plt.subplots(1, 3, figsize=(11, 3.8), sharey=True, layout="constrained")
titles = ("$(k_1, v_1)$", "$(k_2, v_2)$", "$(k_1, v_1')$")
for content in zip(axes, titles, (value_1, value_1, new_value), delta, adding, strict=True):
  panel(*content)
axes[0].set_ylabel("answer to $k_1$")
figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)


# %% [markdown]
# ## 3. Pseudo-values: each write in terms of the earlier ones
#
# The rule runs here on one chunk of $C$ tokens, step by step. The following sections must reproduce this result.

# %%
@jax.jit
def states_after(k, v, beta, state):
  """The state after every token, [C, K, V]."""
  return jax.lax.scan(lambda s, x: (step(s, (x[0], *x))[0],) * 2, state, (k, v, beta))[1]


kc, vc, bc = k[:C], v[:C], beta[:C]
states = states_after(kc, vc, bc, S0)
from_zero = states_after(kc, vc, bc, 0 * S0)

# %% [markdown]
# From a zero state, token $t$ adds $k_t^\top u_t$ with some row $u_t$, so $S_t = \sum_{i \le t} k_i^\top u_i$.
# Put into the rule, this gives the *pseudo-values* without any state:
#
# $$u_t = \beta_t \Big( v_t - \sum_{i < t} (k_t \cdot k_i)\, u_i \Big) .$$

# %%
u = np.zeros_like(vc)
for t in range(C):
  u[t] = bc[t] * (vc[t] - (kc[:t] @ kc[t]) @ u[:t])

for t in range(C):
  assert error(kc[: t + 1].T @ u[: t + 1], from_zero[t]) < 1e-12

# %% [markdown]
# The product of the transitions, a $K \times K$ matrix, is also a sum of outer products, with the keys in the
# place of the values. This is the WY representation of a product of Householder-like matrices:
#
# $$(I - \beta_t k_t^\top k_t) \cdots (I - \beta_1 k_1^\top k_1) = I - \sum_{i \le t} k_i^\top w_i, \qquad
#   w_t = \beta_t \Big( k_t - \sum_{i < t} (k_t \cdot k_i)\, w_i \Big) .$$

# %%
w, product = np.zeros_like(kc), np.eye(kc.shape[1])
for t in range(C):
  w[t] = bc[t] * (kc[t] - (kc[:t] @ kc[t]) @ w[:t])
  product = transition(kc[t], bc[t]) @ product
  assert error(np.eye(len(product)) - kc[: t + 1].T @ w[: t + 1], product) < 1e-12

# %% [markdown]
# Together they carry any state $S$ through the chunk: $S_t = S + \sum_{i \le t} k_i^\top (u_i - w_i S)$.

# %%
for t in range(C):
  assert error(S0 + kc[: t + 1].T @ (u - w @ S0)[: t + 1], states[t]) < 1e-12

# %% [markdown]
# ## 4. UT transform: a triangular system in place of the loop
#
# Both loops are forward substitution. With
# $L_{ti} = \beta_t\, (k_t \cdot k_i)$ below the diagonal and 0 elsewhere, the rows $u_t$ solve
# $(I + L)\, U = \mathrm{diag}(\beta)\, V$, and $w_t$ the same system with $K$:
#
# $$A = (I + L)^{-1}, \qquad U = A\, \mathrm{diag}(\beta)\, V, \qquad W = A\, \mathrm{diag}(\beta)\, K .$$

# %%
L = jnp.tril(bc[:, None] * (kc @ kc.T), -1)
A = jnp.linalg.inv(jnp.eye(C) + L)
assert error(A @ (bc[:, None] * vc), u) < 1e-12
assert error(A @ (bc[:, None] * kc), w) < 1e-12

# %% [markdown]
# Only the difference $U - W S$ is ever needed. It is one product with $A$, applied to the residual $R$ that the
# state lacks, and takes the name $U$ from here on:
#
# $$R = V - K S, \qquad U = A\, \mathrm{diag}(\beta)\, R .$$

# %%
written = A @ (bc[:, None] * (vc - kc @ S0))
assert error(written, u - w @ S0) < 1e-12
assert error(S0 + kc.T @ written, states[-1]) < 1e-12


# %% [markdown]
# ## 5. Chunkwise form
#
# Token $i$ reads $q_i S + \sum_{j \le i} (q_i \cdot k_j)\, u_j$: linear attention over the pseudo-values. With
# $D$ the lower triangle of ones (and decays, where the rule has them),
#
# $$O = Q S + \big( (Q K^\top) \odot D \big)\, U, \qquad S' = S + K^\top U .$$
#
# The triangular system is solved by substitution; section 6 shows why not by other means.

# %%
def one_chunk(state, chunk):
  q, k, v, beta = chunk
  system = jnp.eye(len(k)) + jnp.tril(beta[:, None] * (k @ k.T), -1)
  u = solve_triangular(system, beta[:, None] * (v - k @ state), lower=True, unit_diagonal=True)
  return state + k.T @ u, q @ state + jnp.tril(q @ k.T) @ u


# %%
def chunkwise(q, k, v, beta, state, size):
  cut = [jnp.reshape(x, (-1, size, *x.shape[1:])) for x in (q, k, v, beta)]
  state, output = jax.lax.scan(one_chunk, state, cut)
  return output.reshape(len(q), -1), state


@jax.jit
def recurrent(q, k, v, beta, state):
  return jax.lax.scan(step, state, (q, k, v, beta))[::-1]


# %% [markdown]
# The chunk size changes the schedule and nothing else. At $C = 1$ there is no system to solve, and the
# recurrent form remains.

# %%
output, final_state = recurrent(q, k, v, beta, S0)
for size in (1, 2, 16, 64, T):
  chunk_output, chunk_state = chunkwise(q, k, v, beta, S0, size)
  assert error(chunk_output, output) < 1e-12
  assert error(chunk_state, final_state) < 1e-12


# %% [markdown]
# ### The library computes the same function
#
# `kernels.delta_rule` takes `[B, T, H, K]` arrays in float32 or 16 bits and returns the output and the final
# state. `reference` is the scan over tokens, `xla_chunked` the chunkwise form; both are compared with the
# chunks above, and their gradients with autodiff through the scan in float64.

# %%
def library(q, k, v, beta, state, implementation, g=None):
  q, k, v, beta = (jnp.asarray(x, jnp.float32)[None, :, None] for x in (q, k, v, beta))
  state, g = jnp.asarray(state, jnp.float32)[None, None], None if g is None else jnp.float32(g)[None, :, None]
  output, state = delta_rule(q, k, v, beta, g, initial_state=state, scale=1.0, implementation=implementation)
  return output[0, :, 0], state[0, 0]


names = ("reference", "xla_chunked")

# %%
chunk_output, chunk_state = chunkwise(q, k, v, beta, S0, C)
for name in names:
  library_output, library_state = library(q, k, v, beta, S0, name)
  assert error(library_output, chunk_output) < 1e-6
  assert error(library_state, chunk_state) < 1e-6


# %%
def gradients(function):
  score = lambda *x: sum(jnp.sum(jnp.sin(y)) for y in function(*x))
  return jax.grad(score, argnums=(0, 1, 2, 3, 4))(q, k, v, beta, S0)


for name in names:
  actual = gradients(functools.partial(library, implementation=name))
  for ours, expected in zip(actual, gradients(recurrent), strict=True):
    assert error(ours, expected) < 1e-5


# %% [markdown]
# ## 6. Powers of L are unsafe
#
# $L^C = 0$, so the Neumann series $A = \sum_n (-L)^n$ is finite, and doubling needs only $\log_2 C$ steps of
# matrix products, which accelerators like:
#
# $$A = (I - L)\,(I + L^2)\,(I + L^4) \cdots (I + L^{C/2}) .$$

# %%
def doubling(lower):
  power, inverse = -lower, jnp.eye(len(lower), dtype=lower.dtype) - lower
  for _ in range(len(lower).bit_length() - 2):
    power = jnp.matmul(power, power, precision="highest")
    inverse = inverse + jnp.matmul(inverse, power, precision="highest")
  return inverse


def substitution(lower):
  return solve_triangular(lower, jnp.eye(len(lower), dtype=lower.dtype), lower=True, unit_diagonal=True)


# %% [markdown]
# For random keys it is right to the last digit. Now let keys be alike, as neighbouring tokens of a text often
# are. For equal keys and $\beta = 1$, $L$ holds ones, and $L^n$ counts the paths of $n$ steps from $j$ to $i$:
# the binomial $\binom{i - j - 1}{n - 1}$, near $5 \cdot 10^{17}$ for $C = 64$. $A$ itself has entries of 1 and
# $-1$, the series has to cancel to them, and float32 has seven digits.

# %%
def lower_of(cosine, beta, size=64):
  """L in float32 for `size` keys of norm 1 whose mutual cosines are near `cosine`."""
  _, k, _, _ = random_inputs(seed=2, length=size, key_dim=64)
  k = np.sqrt(cosine) * np.eye(1, 64) + np.sqrt(1 - cosine) * k
  k /= np.linalg.norm(k, axis=1, keepdims=True)
  return jnp.tril(jnp.broadcast_to(beta, size)[:, None] * (k @ k.T), -1).astype(jnp.float32)


# %%
cases = {"random keys, random beta": lower_of(0.0, random_inputs(3, 64)[3]), "cosine 0.8, beta 1": lower_of(0.8, 1.0),
         "equal keys, beta 1": lower_of(1.0, 1.0), "equal keys, beta 1.9": lower_of(1.0, 1.9)}
methods = {"doubling": doubling, "substitution": substitution, "library": chunks.unit_lower_inverse}
exact = {case: np.linalg.inv(np.eye(64) + np.asarray(lower, np.float64)) for case, lower in cases.items()}
errors = {case: [error(f(lower), exact[case]) for f in methods.values()] for case, lower in cases.items()}

# %% [markdown]
# Here is the error of $A$ in float32. The library substitutes in blocks of 16 rows and joins the blocks by matrix
# products of inverses, whose entries stay small. Most of the work is in products, and none of it in powers.

# %%
print(" " * 25 + "".join(f"{name:>14}" for name in methods) + "      max |A|")
for case, row in errors.items():
  print(f"{case:25}" + "".join(f"{x:14.0e}" for x in row) + f"{abs(exact[case]).max():13.1f}")

# %%
random, *alike = (np.array(row) for row in errors.values())
assert random.max() < 1e-6
assert min(row[0] for row in alike) > 1e4
assert max(row[1:].max() for row in alike) < 1e-5
assert max(abs(x).max() for x in exact.values()) < 2

# %% [markdown]
# **Picture 2.** Largest entry of the powers of $L$. Terms above the dotted line, $2^{24}$, round to multiples of 2
# or more, and an $A$ with entries of about 1 is lost.

# %%
powers = {}
for case, lower in cases.items():
  wide, power = np.asarray(lower, np.float64), np.eye(64)
  powers[case] = [abs(power := power @ wide).max() for _ in range(63)]

assert powers["equal keys, beta 1"][31] > 4e17
assert max(powers["random keys, random beta"]) < 1

# %%
figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
lines, offsets = ("-.", "--", "-", (0, (6, 1, 1, 1, 1, 1))), ((75, 0), (0, -14), (0, 4), (0, 4))
for (case, y), line, offset in zip(powers.items(), lines, offsets, strict=True):
  axis.semilogy(range(1, 64), y, linestyle=line, color="black")
  peak = max(np.argmax(y), 12)
  axis.annotate(case, (peak + 1, y[peak]), offset, textcoords="offset points", ha="center")
axis.axhline(2.0**24, color="black", linestyle=":")
axis.set(xlabel="power $n$", ylabel="largest entry of $L^n$", ylim=(1e-20, 1e37))

# %% [markdown]
# ## 7. A decay per key channel: the delta rule meets GLA
#
# Kimi Delta Attention ([Kimi Team 2025](https://arxiv.org/abs/2510.26692)) first lets every row of the state fade by a
# gate of its own, as GLA does in notebook 02, and then corrects what is left:
#
# $$S_t = \bar S_t + \beta_t\, k_t^\top (v_t - k_t \bar S_t), \qquad \bar S_t = \mathrm{diag}(e^{g_t})\, S_{t-1} .$$


# %%
def fading_step(state, token):
  q, k, v, beta, g = token
  return step(jnp.exp(g)[:, None] * state, (q, k, v, beta))


# %%
g = -0.3 * np.random.default_rng(4).exponential(size=k.shape)
faded_state, faded_output = jax.lax.scan(fading_step, S0, (q, k, v, beta, g))
without, _ = jax.lax.scan(fading_step, S0, (q, k, v, beta, 0 * g))
assert error(without, final_state) < 1e-12

# %% [markdown]
# Divide the fading out. With $\Lambda_t = e^{g_1 + \dots + g_t}$, the state $\mathrm{diag}(1 / \Lambda_t)\, S_t$ does
# not fade. It obeys the rule of section 1 with two keys: $k_t \odot \Lambda_t$ looks up, and $k_t / \Lambda_t$
# writes.

# %%
upto = np.exp(np.cumsum(g[:C], 0))
state, S = S0, S0
for t in range(C):
  state = state + beta[t] * np.outer(k[t] / upto[t], v[t] - (k[t] * upto[t]) @ state)
  S, _ = fading_step(S, (q[t], k[t], v[t], beta[t], g[t]))
  assert error(upto[t][:, None] * state, S) < 1e-12

# %% [markdown]
# Sections 3 to 5 hold word for word for two keys. A product of a looking with a writing key takes the place of
# $k_t \cdot k_i$, and it is a score of GLA, with a key in the place of the query:
#
# $$\textstyle\sum_d k_{td}\, k_{id}\, \Lambda_{td} / \Lambda_{id} =
#   \sum_d k_{td}\, k_{id}\, e^{\,g_{i+1,d} + \dots + g_{td}} .$$
#
# So the chunk form needs GLA's scores twice, $P$ of queries and keys and $X$ of keys and keys, and one triangular
# system with $L = \mathrm{diag}(\beta)\, X$ below the diagonal.


# %%
def pairs(x, y, g):
  """Products of rows i and j of x and y, decayed by the gates after j up to i; 0 above the diagonal."""
  b = jnp.cumsum(g, 0)
  causal = jnp.tri(len(x), dtype=bool)[:, :, None]
  return jnp.sum(x[:, None] * y[None] * jnp.exp(jnp.where(causal, b[:, None] - b[None], -jnp.inf)), axis=-1)


# %%
def fading_chunk(state, chunk):
  q, k, v, beta, g = chunk
  b = jnp.cumsum(g, 0)
  upto, after = jnp.exp(b), jnp.exp(b[-1] - b)
  system = jnp.eye(len(k)) + jnp.tril(beta[:, None] * pairs(k, k, g), -1)
  u = solve_triangular(system, beta[:, None] * (v - (k * upto) @ state), lower=True, unit_diagonal=True)
  return upto[-1][:, None] * state + (k * after).T @ u, (q * upto) @ state + pairs(q, k, g) @ u


# %%
for size in (1, 2, 16, 64, T):
  cut = [jnp.reshape(x, (-1, size, *x.shape[1:])) for x in (q, k, v, beta, g)]
  chunk_state, chunk_output = jax.lax.scan(fading_chunk, S0, cut)
  assert error(chunk_output.reshape(T, -1), faded_output) < 1e-12
  assert error(chunk_state, faded_state) < 1e-12

# %% [markdown]
# `pairs` is the plain form, with one exponential for each pair and channel. Dividing by $\Lambda$ would need none, but
# it overflows under strong gates, as in notebook 02. The library takes that notebook's dyadic levels for both $P$ and
# $X$. They have no division and no difference, so gates of any strength are right, and so is one of $-\infty$.

# %%
strong = np.where(np.random.default_rng(5).random(g.shape) < 0.5, -0.01, -30.0)
strong[50] = -np.inf
assert not jnp.isfinite(jnp.exp(-jnp.cumsum(strong[:C], 0)).astype(jnp.float32)).all()
for gates in (g, strong):
  expected = jax.lax.scan(fading_step, S0, (q, k, v, beta, gates))
  for name in names:
    assert all(error(*pair) < 1e-6 for pair in zip(library(q, k, v, beta, S0, name, gates)[::-1], expected))
