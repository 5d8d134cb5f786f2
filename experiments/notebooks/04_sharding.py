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
# # Sharding: the parts, the copies and the communication
#
# A training step of this project is written once, for one device. A mesh says over which devices it is spread,
# a table of logical axes says which dimension of a parameter goes where, and the compiler adds the
# communication. This notebook spreads the step of a small GLA model over 8 devices, draws what each device
# holds, reads the communication off the compiled program, and counts the same bytes by hand. The devices are
# fake parts of one CPU, so nothing here is about speed. Every claim is followed by an `assert`.

# %%
import math
import pathlib
import sys
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

# %%
from flax import nnx

import kernels
from kernels import cpu_compiler
from lin_jax import sharding, training
from lin_jax.config import DataConfig, MeshConfig, ModelConfig, OptimConfig, TrainConfig
from lin_jax.mixers.gla import GLAConfig

sys.path.append(str(pathlib.Path(kernels.__file__).parents[1] / "experiments"))
from speed.collectives import collectives, totals

# %%
cpu_compiler.switch_off()  # of a fault in jaxlib: it has to come before JAX starts a device
jax.config.update("jax_num_cpu_devices", 8)
# Each program runs once or twice, so it should compile fast rather than run fast.
jax.config.update("jax_disable_most_optimizations", True)
assert jax.device_count() == 8

# %% [markdown]
# ## 1. The mesh and the rules
#
# Three axes of a mesh split the batch and the parameters. `data` copies the parameters and splits the batch. `fsdp`
# splits the batch too, and every matrix along the model width. `tensor` splits heads, MLP width and vocabulary. The
# fourth axis, `context`, copies the parameters and splits the tokens of each sequence. A parameter names its
# dimensions by meaning, and one table turns meanings into mesh axes:

# %%
print("\n".join(f"{name!s:6} -> {axis}" for name, axis in sharding.LOGICAL_AXES.items()))
B, T, V, D, F, L, H, R = 8, 32, 512, 64, 128, 2, 8, 8  # batch, time, vocabulary, width, MLP, layers, heads, gate rank


def run_config(**axes):
  model = ModelConfig(mixer=GLAConfig(heads=H, gate_rank=R), vocab_size=V, width=D, depth=L, mlp_width=F,
                      tie_embeddings=False, dtype="float32")
  return TrainConfig(model=model, data=DataConfig(sequence_length=T, batch_size=B), mesh=MeshConfig(**axes),
                     optim=OptimConfig(steps=10, warmup_steps=0))


# %%
MESHES = {"one device": dict(data=1), "data 8": dict(data=8), "fsdp 8": dict(data=1, fsdp=8),
          "tensor 8": dict(data=1, tensor=8), "context 8": dict(data=1, context=8),
          "2 x 2 x 2": dict(data=2, fsdp=2, tensor=2)}
configs = {name: run_config(**axes) for name, axes in MESHES.items()}
meshes = {name: sharding.make_mesh(config.mesh, jax.devices()[:math.prod(MESHES[name].values())])
          for name, config in configs.items()}
states = {name: training.make_state(config, meshes[name]) for name, config in configs.items()}

# %% [markdown]
# `make_state` gives parameters and optimizer moments as shapes with their shardings. Here are the parameters on
# a mesh of 2 x 2 x 2. Layers are stacked, so their parameters have a leading axis of 2, which no rule names.
# Norm scales carry no named axis either, and are copied to every device.

# %%
def leaves(state):
  flat = nnx.to_flat_state(state)
  return {".".join(map(str, path)).removeprefix("runs.0.0."): leaf.get_value() for path, leaf in flat}


params = leaves(states["2 x 2 x 2"][2].params)
print(f"{'parameter':24}{'shape':16}{'on a device':16}split by")
for name, leaf in params.items():
  local = leaf.sharding.shard_shape(leaf.shape)
  print(f"{name:24}{leaf.shape!s:16}{local!s:16}{', '.join(axis or '-' for axis in leaf.sharding.spec)}")

# %%
assert params["embedding"].sharding.spec == jax.P("tensor", "fsdp")
assert params["mixer.output.kernel"].sharding.spec == jax.P(None, "tensor", "fsdp")
assert all(leaf.sharding.is_fully_replicated for name, leaf in params.items() if name.endswith("norm.scale"))

# %% [markdown]
# **Picture 1.** The parts that each device of the mesh of 2 x 2 x 2 holds. Each block shows the numbers of the
# devices that have a copy of it. Most matrices are in four parts with two copies each, because `data` does not
# split them. The batch is in four parts of two rows, because `tensor` does not split it.

# %%
def blocks(shape, placement):
  owners = {}  # top, bottom, left and right edge of each part -> the devices that hold it
  for device, index in placement.devices_indices_map(shape).items():
    edges = tuple(edge for part, n in zip(index, shape, strict=True) for edge in part.indices(n)[:2])
    owners.setdefault(edges, []).append(device.id)
  return owners


# %%
def draw(axis, title, shape, placement, labels):
  for (top, bottom, left, right), owners in blocks(shape, placement).items():
    grey = str(0.55 + 0.06 * min(owners))
    axis.add_patch(plt.Rectangle((left, top), right - left, bottom - top, facecolor=grey, edgecolor="black"))
    axis.text((left + right) / 2, (top + bottom) / 2, " ".join(map(str, owners)), ha="center", va="center")
  axis.set(title=title, xlim=(0, shape[1]), ylim=(shape[0], 0), ylabel=labels[0], xlabel=labels[1])
  axis.set(xticks=(0, shape[1]), yticks=(0, shape[0]))


# %%
drawn = {"embedding": ("vocab", "embed"), "mixer.query.kernel": ("embed", "heads"),
         "mixer.output.kernel": ("heads", "embed"), "mixer.decay_in.kernel": ("embed", "gate rank"),
         "mlp.up.kernel": ("embed", "mlp")}
figure, axes = plt.subplots(2, 3, figsize=(10, 6), layout="constrained")
for axis, (name, labels) in zip(axes.flat[:5], drawn.items(), strict=True):
  leaf = params[name]  # its last two axes: where there are three, the first counts layers
  draw(axis, name, leaf.shape[-2:], jax.NamedSharding(meshes["2 x 2 x 2"], jax.P(*leaf.sharding.spec[-2:])), labels)
draw(axes.flat[-1], "tokens", (B, T), sharding.batch_sharding(meshes["2 x 2 x 2"]), ("batch", "time"))


# %% [markdown]
# The memory of a device between steps holds its part of all parameters and of AdamW's two moments for each.

# %%
def held(abstract):
  return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(abstract))


N = sum(leaf.size for leaf in params.values())
share = {name: held(abstract) / (3 * 4 * N) for name, (_, _, abstract, _) in states.items()}
print(f"of {N:,} parameters and their moments: " + ", ".join(f"{name} {x:.3f}" for name, x in share.items()))
assert all(1 <= share[name] < 1.001 for name in ("data 8", "context 8"))
assert 1 / 4 < share["2 x 2 x 2"] < 1 / 3.8
assert all(1 / 8 < share[name] < 1 / 7 for name in ("fsdp 8", "tensor 8"))


# %% [markdown]
# ## 2. The communication, read off the compiled program
#
# The loss sums over devices explicitly. The compiler derives all other communication from the shardings, so the
# compiled program is the place to look. Its text names every collective with the shape of its result on one
# device. Collectives in the body of the loop over layers run once per layer. `experiments/speed/collectives.py`
# counts them and their bytes, and leaves single numbers (loss, counts, norms) out. Meshes of one axis show it best.

# %%
def compile_step(name):
  graph, optimizer, abstract, _ = states[name]
  rows = sharding.batch_sharding(meshes[name])
  fields = dict(tokens=jnp.int32, targets=jnp.int32, segment_ids=jnp.int32, mask=jnp.float32)
  batch = {field: jax.ShapeDtypeStruct((B, T), dtype, sharding=rows) for field, dtype in fields.items()}
  with jax.set_mesh(meshes[name]):
    step = training.make_train_step(configs[name], graph, optimizer, abstract)
    return step.lower(abstract, batch).compile()


# %%
with ThreadPoolExecutor(2) as pool:
  compiled = list(MESHES)[:5]
  steps = dict(zip(compiled, pool.map(compile_step, compiled), strict=True))

# %%
KINDS = "all-reduce", "all-gather", "all-to-all", "reduce-scatter"
found = {name: totals(collectives(step.as_text())) for name, step in steps.items()}
moved = {name: {kind: size for kind, (_, size) in kinds.items()} for name, kinds in found.items()}
for name, kinds in found.items():
  print(f"{name:12}" + "".join(f"{kind} {n} of {size:,} B   " for kind, (n, size) in sorted(kinds.items())))
assert not moved["one device"] and set().union(*moved.values()) == set(KINDS)

# %% [markdown]
# ## 3. The same bytes by hand
#
# **data.** Each device has a row of the batch and all parameters. It needs the sum of the gradients, which is
# one all-reduce of every parameter.
#
# **fsdp.** Each device has a row of the batch and an eighth of every matrix. Before a layer multiplies with its
# matrices, it gathers them, once in the forward and once in the backward pass. The head is gathered once,
# because the loss finds its gradients in the forward pass. The embedding is never gathered: each device looks
# up its channels of *all* tokens. For that the tokens are gathered, and an all-to-all turns "my channels of all
# rows" into "all channels of my row". Another one turns the gradient back. All other gradients are summed over
# the devices, here by an all-reduce of the whole, of which each device keeps its part.
#
# **tensor.** Each device has all rows and an eighth of heads, MLP and vocabulary. A product along a split
# dimension leaves partial sums of activations. In the forward pass they come after the mixer, after the MLP and
# after the look-up, and in the backward pass at every product that reads the residual stream. No gradient of a
# matrix moves. The loss needs three numbers per token (largest logit, sum of exponentials, logit of the target),
# and the sum of the gradients of the hidden states.
#
# **context.** Each device has 4 tokens of every row, and all parameters, whose gradients it sums as `data` does. The
# recurrence needs the state that enters those tokens. In each layer, one all-gather brings to every device how each
# part changes a state: the update of K x V numbers per row and head, and the K decays. In the backward pass, one
# reduce-scatter of their gradients takes its place. The integers are the segment ids at the ends of each part, and
# whether a document starts inside of it. They cross once in a step, for all layers.

# %%
def size(*keys):
  return 4 * sum(leaf.size for name, leaf in params.items() if any(key in name for key in keys))


split = "query", "key", "value", "mixer.gate", "decay_in", "output", "mlp."  # have a dimension "embed"
stream = 4 * B * T * D  # bytes of the residual stream, all rows
summary = 4 * B * H * (D // 2 // H) * (D // H + 1)  # K (V + 1) numbers per row and head of each layer, whatever T is
forward, backward = 2, 2 + 4  # sums of a layer: mixer, MLP; MLP gate and up; query, key, value and gate

# %%
by_hand = {
    "data 8": {"all-reduce": 4 * N},
    "fsdp 8": {"all-reduce": 4 * N - size("embedding"), "all-gather": 2 * size(*split) + size("head") + 4 * B * T,
               "all-to-all": 2 * stream // 8},
    "tensor 8": {"all-reduce": L * (forward + backward) * stream + L * 4 * B * T * R + size("mixer.norm.scale")
                 + 2 * stream + 3 * 4 * B * T},
    "context 8": {"all-reduce": 4 * N, "all-gather": L * 8 * summary + 8 * 3 * 4 * B, "reduce-scatter": L * summary}}

# %% [markdown]
# For `tensor`, `4 * B * T * R` is the gradient that enters the bottleneck of the low-rank gate, and the
# norm scale is shared by heads on different devices. Every byte is accounted for:

# %%
for name, expected in by_hand.items():
  for kind, value in expected.items():
    print(f"{name:10}{kind:15}by hand {value:12,}   compiled {moved[name][kind]:12,}")
  assert moved[name] == expected


# %% [markdown]
# GLA's recurrence appears under `context` alone. Elsewhere it works on whole heads and whole rows, so neither its
# forward nor its backward pass communicates. The formulas say which axis suits which run. The traffic of `data` and
# `fsdp` grows with the parameters and hardly with the batch. The traffic of `tensor` grows with the tokens, and not
# with the vocabulary or the MLP. The traffic of `context` has no T in it: rows of a million tokens exchange as many
# bytes as rows of 32. Two collectives per layer carry it. Other ops have states of other sizes (`kernels/README.md`):
#
# | op | numbers that a part sends per row and head |
# |---|---|
# | GLA, linear attention | K (V + 1) |
# | delta rule | K (V + K), because a part changes a state by a K x K matrix |
# | selective scan | 2 N per channel |
#
# **Picture 2.** Bytes of the results of one step's collectives, on each device. Crosses are counted by hand.

# %%
figure, axis = plt.subplots(figsize=(7, 3.6), layout="constrained", subplot_kw={"ylabel": "MB a device and step"})
many, bottom = list(by_hand), np.zeros(len(by_hand))
for kind, grey, hatch in zip(KINDS, ("0.4", "0.7", "1.0", "0.9"), ("", "//", "xxx", ".."), strict=True):
  height = np.array([moved[name].get(kind, 0) for name in many]) / 1e6
  axis.bar(many, height, bottom=bottom, color=grey, hatch=hatch, edgecolor="black", label=kind, width=0.6)
  bottom += height
axis.plot(many, [sum(by_hand[name].values()) / 1e6 for name in many], "kX", markeredgecolor="white", markersize=14)
axis.legend(loc="upper left")


# %% [markdown]
# ## 4. One device equals eight
#
# Sharding changes where sums are made, and nothing else. All meshes start from the same parameters and take one
# step on the same batch. Adam's first moment is then a multiple of the gradient. The error is the largest of
# any parameter, relative to the root mean square of what one device finds.

# %%
start = jax.device_get(states["one device"][3]())
tokens = np.random.default_rng(0).integers(V, size=(B, T + 1), dtype=np.int32)
batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": np.zeros((B, T), np.int32),
         "mask": np.ones((B, T), np.float32)}


# %%
def run(name, batch):
  state = jax.device_put(start, jax.tree.map(lambda x: x.sharding, states[name][2]))
  after, metrics = steps[name](state, jax.device_put(batch, sharding.batch_sharding(meshes[name])))
  return jax.device_get(metrics), leaves(jax.device_get(after.opt_state[1][0].mu))


# %%
def difference(actual, expected):
  return max(np.sqrt(np.mean((actual[name] - x) ** 2) / np.mean(x**2)) for name, x in expected.items())


metrics, gradients = run("one device", batch)
for name in many:
  found, moments = run(name, batch)
  print(f"{name:10} loss {found['loss']:.7f} ({metrics['loss']:.7f})  gradients {difference(moments, gradients):.1e}")
  assert abs(found["loss"] - metrics["loss"]) < 1e-5 * metrics["loss"]
  assert difference(moments, gradients) < 1e-5

# %% [markdown]
# The comparison would notice a device whose part of a sum is lost, because without the row of the last device
# the gradients are off by far more than rounding.

# %%
lost = batch | {"mask": np.repeat(np.arange(B) < B - 1, T).reshape(B, T).astype(np.float32)}
print(f"without the last device's row: {(missing := difference(run('data 8', lost)[1], gradients)):.2f}")
assert missing > 0.1
