"""jax-linear-attention's own training step, at the sizes of our configs. Runs in a process of its own."""

import re
import time
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jla.config import ExperimentConfig, OptimConfig, TrainConfig
from jla.distributed.kernel_sharding import use_rules
from jla.distributed.mesh import build_mesh, plan_from_config
from jla.distributed.sharding import grouped_batch_sharding, resolve_rules
from jla.models import build_model
from jla.models.config import AttentionConfig, LinearAttentionConfig, ModelConfig, SSMConfig
from jla.training.optimizers import optimizer_from_config
from jla.training.schedulers import create_schedule
from jla.training.step import LossConfig, build_train_step, lm_loss

from . import training

_HEADS_128 = {"num_k_heads": 16, "num_v_heads": 16, "head_k_dim": 128, "head_v_dim": 128}
# Kind of layer, depth, and the options of its linear attention.
_LAYERS = {
    "gla_1b3": ("gla", 24, {"num_k_heads": 16, "num_v_heads": 16, "head_k_dim": 64, "head_v_dim": 128, "conv_size": 0,
                            "qk_l2norm": False, "gate_low_rank_dim": 16}),
    "deltanet_1b3": ("deltanet", 24, {**_HEADS_128, "output_gate": False}),
    "gated_deltanet_1b3": ("gated_deltanet", 21, {"num_k_heads": 6, "num_v_heads": 6, "head_k_dim": 256,
                                                  "head_v_dim": 512}),
    "transformer_1b3": ("attention", 24, None),
    "mamba2_1b3": ("mamba2", 48, None)}
_REMAT = {"lean": {"remat": "none", "lean_vjp": True}, "dots": {"remat": "dots"}}


def model_config(name: str, variant: str, tiny: bool) -> ModelConfig:
  """The library's model of the size of our config `name`, or with `tiny` of width 64 with two layers."""
  kind, depth, options = _LAYERS[name]
  width, mlp_width, vocabulary, heads = (64, 128, 257, 4) if tiny else (2048, 5632, 32000, 32)
  if tiny:
    depth = 2
    if options:
      options = {**options, "num_k_heads": 2, "num_v_heads": 2, "head_k_dim": 16, "head_v_dim": 32, "chunk_size": 16}
  mamba = kind == "mamba2"
  return ModelConfig(
      vocab_size=vocabulary, d_model=width, n_layers=depth, d_ff=0 if mamba else mlp_width, tie_embeddings=True,
      norm_eps=1e-6, layer_types=(kind,) * depth, mlp_types=("none" if mamba else "dense",) * depth,
      attention=AttentionConfig(num_heads=heads, num_kv_heads=heads, head_dim=width // heads, qk_norm=False),
      linear_attention=LinearAttentionConfig(**options) if options else None,
      ssm=SSMConfig(d_state=16 if tiny else 128, head_dim=16 if tiny else 64, chunk_size=16 if tiny else 64),
      **_REMAT[variant])


def experiment(setting: dict) -> ExperimentConfig:
  """The library's config of a run: AdamW as in `lin_jax`, and its fused cross-entropy where its kernels take it."""
  return ExperimentConfig(
      name="peer", model=model_config(setting["name"], setting["variant"], setting["tiny"]),
      optim=OptimConfig(name="adamw", lr=3e-4, warmup_steps=1, weight_decay=0.01, max_grad_norm=1.0),
      train=TrainConfig(max_steps=setting["steps"], seq_len=setting["sequence_length"], grad_accum=1,
                        micro_batch_per_replica=setting["batch_size"], update_guard="select", ce_impl="auto",
                        ce_grad_in_forward=True))


def prepare(setting: dict) -> Callable[[], tuple[dict, float]]:
  """Compiles initialisation and step for shapes alone, and returns the function that creates the state and trains."""
  begin = time.monotonic()
  config = experiment(setting)
  rules = resolve_rules(config.mesh.rules)
  mesh = build_mesh(plan_from_config(config.mesh, 1), jax.devices()[:1], topology_aware=False)
  whole, batches = NamedSharding(mesh, PartitionSpec()), grouped_batch_sharding(mesh, rules)
  optimizer = _optimizer(config)

  def create():
    model_key, step_key = jax.random.split(jax.random.key(0))
    arrays = eqx.filter(build_model(config.model, key=model_key), eqx.is_array)
    return arrays, optimizer.init(eqx.filter(arrays, eqx.is_inexact_array)), step_key

  arrays, state, key = _placed(jax.eval_shape(create), whole)
  shapes = eqx.filter_eval_shape(build_model, config.model, key=jax.random.key(0))
  static = eqx.filter(shapes, _is_shape, inverse=True)
  parameters = eqx.filter(arrays, lambda x: _is_shape(x) and jnp.issubdtype(x.dtype, jnp.inexact))
  its_step = build_train_step(
      optimizer, lm_loss(LossConfig.from_train_config(config.train)), batch_sharding=batches,
      param_shardings=jax.tree.map(lambda x: whole, parameters),
      opt_shardings=jax.tree.map(lambda x: whole, state), update_guard=config.train.update_guard)

  def step(arrays, state, batch, key):  # of arrays alone, because Equinox compiles for arrays and not for shapes
    model, *rest = its_step(eqx.combine(arrays, static), state, batch, key)
    return eqx.filter(model, eqx.is_array), *rest

  shape = (1, setting["batch_size"], setting["sequence_length"])
  batch = _placed({name: jax.ShapeDtypeStruct(shape, np.int32) for name in ("input_ids", "labels")}, batches)
  with use_rules(rules), jax.set_mesh(mesh):
    step = jax.jit(step, donate_argnums=(0, 1, 3)).lower(arrays, state, batch, key).compile()
    create = jax.jit(create, out_shardings=whole).lower().compile()
  results = {"compile_s": round(time.monotonic() - begin, 1),
             "parameters": sum(leaf.size for leaf in jax.tree.leaves(parameters)),
             "memory_gib": training.gibibytes(step),
             "kernels": len(re.findall(r'call_target="[^"]*mosaic', step.as_text()))}

  def train():
    found, first = _train(setting, config.model.vocab_size, step, create(), batches)
    return results | found, first

  return train


def _train(setting, vocabulary, step, state, sharding):
  tokens = training.drawn_tokens(vocabulary, setting["batch_size"], setting["sequence_length"], setting["steps"])
  batches = [{"input_ids": ids[None, :, :-1], "labels": ids[None, :, 1:]} for ids in tokens]
  batches = jax.block_until_ready(jax.device_put(batches, sharding))
  arrays, optimizer, key = state
  losses = []
  for i, batch in enumerate(batches):
    if i == setting["steps"] - setting["timed_steps"]:
      jax.block_until_ready(losses)
      start = time.perf_counter()
    arrays, optimizer, metrics, key = step(arrays, optimizer, batch, key)
    losses.append(metrics["loss"])
    if i == 0:
      jax.block_until_ready(losses)
      first = time.monotonic()
  jax.block_until_ready((arrays, losses))
  return training.speed(setting, time.perf_counter() - start, losses), first


def _optimizer(config):
  optim = config.optim
  return optimizer_from_config(optim, create_schedule(
      optim.lr, optim.schedule, total_steps=config.schedule_steps, warmup_steps=optim.warmup_steps,
      min_lr_ratio=optim.min_lr_ratio, stable_fraction=optim.stable_fraction, decay_type=optim.decay_type,
      d_model=config.model.d_model))


def _is_shape(leaf):
  return isinstance(leaf, jax.ShapeDtypeStruct)


def _placed(shapes, sharding):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)
