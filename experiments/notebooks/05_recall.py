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
# # Recall: what a matrix remembers, and why the delta rule remembers better
#
# Linear attention and DeltaNet keep the same thing, a matrix per head, but they write to it in different ways.
# This notebook stores pairs of a key and a value by hand, looks at the matrix, and measures what comes back:
# with few pairs and with many, and when a key is given a new value. Then both rules are trained on
# multi-query associative recall (MQAR, [Arora et al. 2023](https://arxiv.org/abs/2312.04927)), with everything
# else equal. Every claim is followed by an `assert`. The results of the training are computed, not written here.
#
# For keys $k_t$ of norm 1 with $K$ channels and values $v_t$, one token after another,
#
# $$\text{adding:}\quad S_t = S_{t-1} + k_t^\top v_t \qquad\qquad
#   \text{delta rule:}\quad S_t = S_{t-1} + k_t^\top (v_t - k_t S_{t-1}) .$$
#
# Both answer a query $q$ with $q S$. Adding is linear attention. The delta rule is DeltaNet's with a writing
# strength of 1: it first looks up what the key holds, and writes the difference.

# %%
import dataclasses
import pathlib
import sys
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

# %%
import kernels
from lin_jax.mixers import register
from lin_jax.mixers.delta_net import DeltaNet, DeltaNetConfig

sys.path.append(str(pathlib.Path(kernels.__file__).parents[1] / "experiments"))
from synthetic import TASKS
from synthetic.mqar import MQAR
from synthetic.runs import Run
from synthetic.training import train

# %%
kernels.cpu_compiler.switch_off()  # of a fault in jaxlib: it has to come before JAX starts a device

# %%
jax.config.update("jax_disable_most_optimizations", True)  # small programs: compiling takes longer than running


def write(keys, values, delta):
  """The state after each write, [n, K, V]."""
  state, states = np.zeros((keys.shape[1], values.shape[1])), []
  for k, v in zip(keys, values, strict=True):
    state = state + np.outer(k, v - delta * (k @ state))
    states.append(state)
  return np.array(states)


# %%
def random_pairs(rng, count, size):
  """Keys of norm 1 and values of norm near 1, [count, size] each."""
  keys, values = rng.standard_normal((2, count, size))
  return keys / np.linalg.norm(keys, axis=1, keepdims=True), values / np.sqrt(size)


# %% [markdown]
# ## 1. Orthogonal keys: both rules are perfect
#
# A key reads $k_i S = v_i + \sum_{j \ne i} (k_i \cdot k_j)\, v_j$ from the sum of outer products. With orthogonal
# keys the second term is zero. There is room for $K$ of them.

# %%
rng = np.random.default_rng(0)
K = 32
keys, values = np.linalg.qr(rng.standard_normal((K, K)))[0], rng.standard_normal((K, K))
adding, delta = (write(keys, values, rule)[-1] for rule in (0, 1))
assert np.allclose(keys @ adding, values) and np.allclose(adding, delta)

# %% [markdown]
# ## 2. A key that comes back: adding mixes, the delta rule replaces
#
# With keys that are rows of the identity, the state can be read with the eye, because row $i$ holds key $i$'s value.
# Three letters are written as rows of 0 and 1: A to key 1, B to key 2, then C to key 1.

# %%
letters = {"A": "01110 10001 11111 10001 10001", "B": "11110 10001 11110 10001 11110",
           "C": "01111 10000 10000 10000 01111"}
letters = {name: np.array([int(x) for x in text.replace(" ", "")], float) for name, text in letters.items()}
sequence = [(0, "A"), (1, "B"), (0, "C")]
one_hot = np.eye(4)[[key for key, _ in sequence]]
written = np.array([letters[name] for _, name in sequence])
histories = {"adding": write(one_hot, written, 0), "delta rule": write(one_hot, written, 1)}

# %%
read = {rule: one_hot[2] @ states[-1] for rule, states in histories.items()}
assert np.array_equal(read["adding"], letters["A"] + letters["C"])
assert np.array_equal(read["delta rule"], letters["C"])
assert all(np.array_equal(states[-1][1], letters["B"]) for states in histories.values())

# %% [markdown]
# **Picture 1.** The states, each row of the matrix drawn as its 5 x 5 letter. The third write leaves A and C on
# top of each other where the rule adds, and C alone where it corrects. B is untouched in both. A sum does not
# depend on the order of its terms, so the rule that adds cannot tell from the state which letter came last.

# %%
figure, axes = plt.subplots(2, 6, figsize=(10, 4), layout="constrained")
for row, (rule, states) in zip(axes, histories.items(), strict=True):
  for i, axis in enumerate(row):
    axis.imshow(states[i // 2][i % 2].reshape(5, 5), cmap="gray_r", vmin=0, vmax=2)
    axis.set(xticks=[], yticks=[], xlabel=f"key {i % 2 + 1}", title=f"after {'ABC'[:i // 2 + 1]}")
  row[0].set_ylabel(rule)

# %%
assert np.array_equal(write(one_hot[::-1], written[::-1], 0)[-1], histories["adding"][-1])
assert not np.array_equal(write(one_hot[::-1], written[::-1], 1)[-1], histories["delta rule"][-1])

# %% [markdown]
# ## 3. Keys that are not orthogonal: interference
#
# Random keys have $\mathrm{E}\,(k_i \cdot k_j)^2 = 1/K$. The rule that adds reads each value with the noise of all
# others, old or new:
#
# $$\frac{\mathrm{E}\,|k_i S - v_i|^2}{\mathrm{E}\,|v_i|^2} = \frac{n - 1}{K} .$$
#
# The delta rule reads the last value exactly. A later write changes what an older key reads, but it also takes
# out of the state whatever lies along the new key, noise included.

# %%
def reading_errors(count, delta, trials=100):
  """Mean of |k_i S - v_i|^2 / E|v|^2 for each pair, by its place in the order of writing, [count]."""
  rng, errors = np.random.default_rng(count), []
  for _ in range(trials):
    keys, values = random_pairs(rng, count, K)
    errors.append(((keys @ write(keys, values, delta)[-1] - values) ** 2).sum(1))
  return np.mean(errors, axis=0)


# %%
counts = np.array([2, 4, 8, 16, 24, 32, 48, 64])
errors = {rule: [reading_errors(n, delta) for n in counts] for rule, delta in (("adding", 0), ("delta rule", 1))}
means = {rule: np.array([e.mean() for e in per_count]) for rule, per_count in errors.items()}
print("pairs      ", *(f"{n:6}" for n in counts))
print("(n - 1) / K", *(f"{x:6.2f}" for x in (counts - 1) / K))
for rule, mean in means.items():
  print(f"{rule:11}", *(f"{x:6.2f}" for x in mean))

# %%
assert np.allclose(means["adding"], (counts - 1) / K, rtol=0.1, atol=0.01)
assert (means["delta rule"] < means["adding"]).all()
assert all(e[-1] < 1e-20 for e in errors["delta rule"])

# %% [markdown]
# **Picture 2.** On the left is the mean error. At 1 a value is lost in noise as large as itself. On the right is
# the error by pair, for 64 pairs in a state with room for 32. Adding treats all pairs alike, and all are lost. The
# delta rule keeps the latest and gives up the oldest.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
for (rule, mean), line in zip(means.items(), ("--", "-"), strict=True):
  left.plot(counts / K, mean, line, color="black", marker="o", label=rule)
  right.plot(np.arange(counts[-1]), errors[rule][-1][::-1], line, color="black", label=rule)
left.plot(counts / K, (counts - 1) / K, "x", color="black", markersize=10, label="$(n - 1) / K$")
left.set(xlabel="pairs stored / key channels, $n / K$", ylabel="error of a reading, relative", ylim=(0, 2.2))
right.set(xlabel="writes since the pair was stored", ylabel="the same, of 64 pairs", ylim=(0, 2.6))
left.legend()

# %%
recent, oldest = errors["delta rule"][-1][-K // 4:], errors["delta rule"][-1][:K // 4]
print(f"delta rule, 64 pairs: latest {K // 4} {recent.mean():.2f}, oldest {K // 4} {oldest.mean():.2f}")
assert recent.max() < 0.5 < 1 < oldest.mean() < errors["adding"][-1].min()


# %% [markdown]
# ## 4. Recall, trained
#
# MQAR shows pairs of a key and a value, then keys again, at which the model must say the value. The first task
# is MQAR as it is. In the second, the second half of the pairs gives new values to the keys of the first half,
# and the last value is right.

# %%
class Rewritten(MQAR):
  def draw(self, rng, count):
    batch, half = super().draw(rng, count), self.pairs // 2
    for i in range(half):
      key, old, value = (batch.tokens[:, [j]].copy() for j in (2 * i, 2 * (i + half), 2 * (i + half) + 1))
      batch.tokens[...] = np.where(batch.tokens == old, key, batch.tokens)
      batch.targets[...] = np.where((batch.tokens == key) & (batch.mask > 0), value, batch.targets)
    return batch


# %%
TASKS["rewritten"] = Rewritten
setting = {"sequence_length": 16, "pairs": 4, "vocab_size": 32}
for name in ("mqar", "rewritten"):
  example = TASKS[name](**setting).draw(np.random.default_rng(0), 1)
  print(f"{name:10} reads", *(f"{token:2}" for token in example.tokens[0]))
  print(f"{'':10} says ", *(f"{t:2}" if m else " ." for t, m in zip(example.targets[0], example.mask[0], strict=True)))

# %% [markdown]
# One layer is enough: a convolution of two taps lets a value's position see the key before it. The model that
# adds is DeltaNet with the look-up left out. Convolutions, keys of norm 1, writing strengths, head norm and
# parameters are the same, so any difference comes from the rule. (`linear_attention`, the mixer, has no
# convolution. In one layer it does not see which value stands next to which key, whatever its rule.)

# %%
@register("adding_net")
class AddingNet(DeltaNet):
  Config = dataclasses.make_dataclass("AddingNetConfig", [], bases=(DeltaNetConfig,))

  def mix(self, q, k, v, beta, **options):
    q, k = (a * jax.lax.rsqrt(jnp.sum(a * a, axis=-1, keepdims=True) + 1e-6) for a in (q, k))
    return kernels.linear_attention(q, k, v * beta[..., None], **options)


# %%
def learn(case):
  task, mixer = case
  fields = {"heads": 2, "conv_width": 2, "chunk_size": 16}
  runs = [Run(task, mixer, setting, fields, width=32, depth=1, learning_rate=0.03, batch_size=64,
              steps=125, evaluate_every=25, test_examples=256, seed=seed) for seed in (0, 1)]
  return [result for run in runs for result in train([run])]


# %%
cases = [(task, mixer) for task in ("mqar", "rewritten") for mixer in ("adding_net", "delta_net")]
with ThreadPoolExecutor(2) as pool:
  results = dict(zip(cases, pool.map(learn, cases), strict=True))

# %%
accuracy = {case: [result["accuracy"] for result in runs] for case, runs in results.items()}
for (task, mixer), found in accuracy.items():
  steps = [result["steps"] for result in results[task, mixer]]
  print(f"{task:10}{mixer:11} accuracy {min(found):.3f} to {max(found):.3f} after {min(steps)} to {max(steps)} steps")
assert len({result["parameters"] for runs in results.values() for result in runs}) == 1

# %% [markdown]
# **Picture 3.** Accuracy on held-out sequences during training, for two seeds each: `delta_net` solid,
# `adding_net` dashed. A run ends when it is right in 99 cases of 100. The dotted line is the accuracy of a
# model that knows both values of a key but not which came last.

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained", subplot_kw={"xlabel": "steps"})
for (task, mixer), runs in results.items():
  axis, line = axes[int(task == "rewritten")], "-" if mixer == "delta_net" else "--"
  for seed, result in enumerate(runs):
    steps, _, curve = zip(*result["curve"], strict=True)
    axis.plot(steps, curve, line, color="black", marker="o^"[seed], label=f"{mixer}, seed {seed}")
  axis.set(ylabel=f"accuracy, {task}", ylim=(0, 1.03))
axes[1].axhline(0.5, color="black", linestyle=":")

# %% [markdown]
# In MQAR every key comes once, and four pairs leave room in states of 16 key channels. By section 3 the rule that
# adds has an error of $3/16$ with random keys, and trained keys can do better. The second task rewrites keys as
# section 2 does. The verdicts below are computed from the runs. Both rules have the same learning rate.

# %%
gap = {task: min(accuracy[task, "delta_net"]) - max(accuracy[task, "adding_net"]) for task in ("mqar", "rewritten")}
for task, least in gap.items():
  verdict = "the delta rule recalls more" if least > 0.1 else "no difference that two seeds could show"
  print(f"{task}: worst delta_net minus best adding_net {least:+.3f}: {verdict}")
assert gap["rewritten"] > 0.2 and max(accuracy["rewritten", "adding_net"]) < 0.65
