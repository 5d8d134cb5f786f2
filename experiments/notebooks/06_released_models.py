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
# # A released hybrid: Qwen3.5's two kinds of layers, and what each remembers
#
# Most layers of Qwen3.5 are Gated DeltaNet, which keeps a matrix per head. Every fourth one of the released models is
# softmax attention, which keeps all keys and values. This notebook loads a tiny model of that family, compares it
# with the library that made it, and looks at how long each kind of layer remembers. Then it generates text, and
# writes the model back. Every claim is followed by an `assert`.
#
# The model has 4 layers of width 12 and random parameters, so that it fits into this repository. It was built by
# the class `Qwen3_5ForCausalLM` of `transformers`, which also computed the logits and the tokens kept beside it.
# `experiments/make_hf_fixtures.py` makes both anew, in an environment with `torch` and `transformers`. A downloaded
# model is loaded in the same way, from its own folder.

# %%
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx
from safetensors.numpy import load_file

# %%
import kernels
from lin_jax import generate, hf
from lin_jax.decoding import in_order
from lin_jax.model import LanguageModel, layer_mixers

FOLDER = pathlib.Path(kernels.__file__).parents[1] / "tests" / "fixtures" / "hf" / "qwen3_5_text"

# %%
kernels.cpu_compiler.switch_off()  # of a fault in jaxlib: it has to come before JAX starts a device

# %%
jax.config.update("jax_disable_most_optimizations", True)  # small programs: compiling takes longer than running
config, model = hf.load(FOLDER)
for number, mixer in enumerate(layer_mixers(config)):
  print(number, mixer)

# %% [markdown]
# ## The same numbers
#
# The library's logits are kept for some of the 70 tokens. Both sides compute in float32.

# %%
library = np.load(FOLDER / "logits.npz")
tokens = jnp.asarray(library["tokens"])
logits = jax.jit(lambda model, tokens: model(tokens)[0])(model, tokens)
every = tokens.shape[1] // library["logits"].shape[1]
difference = np.abs(logits[:, every - 1::every][:, :library["logits"].shape[1]] - library["logits"]).max()
print(f"largest difference of a logit: {difference:.1e}, of logits up to {np.abs(library['logits']).max():.1f}")
assert difference < 1e-4

# %% [markdown]
# ## What a Gated DeltaNet layer forgets
#
# A head's state follows $S_t = a_t (I - \beta_t k_t^\top k_t) S_{t-1} + \beta_t k_t^\top v_t$ with keys of norm 1.
# Its gate alone halves what the state holds every $\ln 2 / (-\overline{\log a})$ tokens: the gate's half-life.
# Every write also removes what the state held along its key. So what is left of an earlier state is at most
# $\prod a_t$ of it, as long as $\beta_t \le 1$.
#
# The random parameters of the loaded model make gates so strong that it forgets within a token. So this part
# takes the same config with the parameters with which training starts. The layers' inputs come from the model itself.

# %%
@jax.jit
def layer_inputs(model, tokens):
  """Returns for each block the normed activations that its mixer reads."""
  x, inputs = model.embed(tokens), []
  for block in in_order(model.placed_runs()):
    inputs.append(block.mixer_norm(x))
    x = block(x, None, None)[0]
  return inputs


# %%
gates = {}  # of each recurrent layer: log of the decay, and beta, [T, H]
start = LanguageModel(config, rngs=nnx.Rngs(0))
text = jax.random.randint(jax.random.key(0), (1, 256), 0, config.vocab_size)
inputs_of = list(zip(in_order(start.placed_runs()), layer_inputs(start, text), strict=True))

# %%
for number, (block, inputs) in enumerate(inputs_of):
  if hasattr(block.mixer, "project"):
    (_, _, _, beta, log_decay), _ = block.mixer.project(inputs, None, None)
    gates[number] = log_decay[0], beta[0]
    half_lives = np.log(2) / -log_decay[0].mean(axis=0)
    print(f"layer {number}, half-lives in tokens: {', '.join(f'{x:.1f}' for x in half_lives)}")
assert all(beta.max() <= 1 for _, beta in gates.values())


# %% [markdown]
# How much of a state is really left? Each layer runs twice over its inputs, from an empty state and from a random one.
# The difference of the two states is what is left of the random one.

# %%
def distance(states):
  """The norm of the difference of two states, per head."""
  return jnp.linalg.norm(states[0]["memory"] - states[1]["memory"], axis=(-2, -1))[0]


# %%
def left(block, inputs, key):
  """The norm of what is left of a random state after each token, over its norm at first, [T, H]."""
  empty = block.mixer.init_state(1, inputs.shape[1])
  states = [empty, empty | {"memory": jax.random.normal(key, empty["memory"].shape)}]
  def step(states, x):
    states = [block.mixer.step(x[None], state)[1] for state in states]
    return states, distance(states)
  return jax.lax.scan(step, states, inputs[0])[1] / distance(states)


# %%
figure, axes = plt.subplots(1, len(gates), figsize=(9, 3.2), sharey=True)

# %%
for axis, (number, (log_decay, _)) in zip(axes, gates.items()):
  remains = left(*inputs_of[number], jax.random.key(number))
  bound = jnp.exp(jnp.cumsum(log_decay, axis=0))
  assert (remains <= bound * 1.001 + 1e-6).all()
  axis.semilogy(remains)
  axis.set_prop_cycle(None)
  axis.semilogy(bound, linestyle=":")
# %%
for axis, number in zip(axes, gates):
  axis.set(title=f"layer {number}: left of an earlier state", xlabel="tokens later", ylim=(1e-4, 1.5))
axes[0].set_ylabel("part, by the gates alone dotted")
figure.tight_layout()
plt.show()

# %% [markdown]
# No head keeps more than its gates allow, and the writes forget on top of that.
#
# ## What an attention layer keeps
#
# Its cache holds the first token's key and value unchanged, however many tokens follow, and takes memory for each.

# %%
@jax.jit
def read(model, tokens):
  """The state after these tokens, with room for 100."""
  return model(tokens, model.init_state(1, 100))[1]


# %%
def cached(length):
  """The caches of the attention layers after the first `length` tokens."""
  state = read(model, tokens[:, :length])
  return [layer for layer in in_order(state) if "key" in layer]


for early, late in zip(cached(1), cached(70)):
  np.testing.assert_allclose(late["key"][:, 0], early["key"][:, 0], rtol=1e-4, atol=1e-5)

# %%
for length in (100, 1000, 10000):
  cache, total = generate.cache_bytes(model, 1, length), generate.state_bytes(model, 1, length)
  print(f"{length:6,} tokens: caches {cache:9,} bytes, recurrent states {total - cache:,}")
assert generate.cache_bytes(model, 1, 10000) > 99 * generate.cache_bytes(model, 1, 100)

# %% [markdown]
# ## Generate, and write the model back
#
# The most likely tokens are the ones that the library chose. The written folder has the library's tensors again.

# %%
steps = library["continuation"].shape[1]
continuation = generate.generate(model, tokens, steps, temperature=0.0)
print(np.asarray(continuation)[0])
np.testing.assert_array_equal(continuation, library["continuation"])

# %%
with tempfile.TemporaryDirectory() as folder:
  hf.save(folder, config, model)
  ours, theirs = (load_file(pathlib.Path(path) / "model.safetensors") for path in (folder, FOLDER))
assert ours.keys() == theirs.keys()
for name, tensor in theirs.items():
  np.testing.assert_array_equal(ours[name], tensor)
print(f"{len(theirs)} tensors are equal")
