"""Schedule, decay mask and the optimizer against AdamW written out by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lin_jax.config import OptimConfig
from lin_jax.layer_stacks import apart, together
from lin_jax.model import LanguageModel
from lin_jax.optim import learning_rate, lengthened, make_optimizer, matrices, parameter_name
from tests.lin_jax import tiny


@pytest.mark.parametrize("warmup", [0, 4])
def test_schedule_rises_to_the_peak_and_ends_at_the_final_rate(warmup):
  config = OptimConfig(steps=20, warmup_steps=warmup, learning_rate=1e-2, final_learning_rate=1e-3)
  rates = np.array([learning_rate(config)(jnp.int32(i)) for i in range(config.steps)])
  np.testing.assert_allclose(rates[:warmup], 1e-2 * np.arange(1, warmup + 1) / (warmup + 1), rtol=1e-6)
  assert rates.argmax() == warmup and np.isclose(rates[warmup], 1e-2) and np.isclose(rates[-1], 1e-3)
  progress = np.arange(config.steps - warmup) / (config.steps - 1 - warmup)
  np.testing.assert_allclose(rates[warmup:], 1e-3 + 9e-3 * (1 + np.cos(np.pi * progress)) / 2, rtol=1e-5)


def rates(config):
  return [float(learning_rate(config)(jnp.int32(i))) for i in range(config.steps)]


def test_a_lengthened_run_keeps_the_rate_at_which_its_decay_ended():
  old = OptimConfig(steps=8, warmup_steps=2, learning_rate=1e-2, final_learning_rate=1e-3)
  new, note = lengthened(old, dataclasses.replace(old, steps=12))
  assert new.decay_steps == 8 and "decays until step 8" in note and "stays at 0.001" in note
  assert rates(new) == rates(old) + [rates(old)[-1]] * 4
  assert lengthened(new, dataclasses.replace(old, steps=12)) == (new, "")  # the same command resumes it
  assert lengthened(new, dataclasses.replace(old, steps=20))[0].decay_steps == 8
  assert lengthened(old, old) == (old, "")


def test_a_run_at_a_constant_rate_is_lengthened_to_the_one_planned_so():
  old = OptimConfig(steps=8, warmup_steps=2, learning_rate=1e-2, final_learning_rate=1e-2)
  planned = dataclasses.replace(old, steps=12)
  assert lengthened(old, planned) == (planned, "lengthened from 8 to 12 steps at a constant rate")
  assert rates(planned)[:8] == rates(old)


@pytest.mark.parametrize("changes, message", [
    (dict(steps=7), "steps=7: this run has 8 steps, and a run is not shortened"),
    (dict(steps=12, decay_steps=10), "decay_steps=10: the learning rate of this run decays until step 8"),
    (dict(steps=12), "steps=12: the learning rate of this run is 0 after step 8"),
])
def test_what_a_run_cannot_be_lengthened_to_is_refused(changes, message):
  old = OptimConfig(steps=8, warmup_steps=2, final_learning_rate=0.0)
  with pytest.raises(ValueError, match=message):
    lengthened(old, dataclasses.replace(old, **changes))


def test_decay_mask_counts_the_axes_of_one_layer():
  params = nnx.state(jax.eval_shape(lambda: LanguageModel(tiny.config("").model, rngs=nnx.Rngs(0))))
  decayed = {jax.tree_util.keystr(path, simple=True): decay
             for path, decay in jax.tree_util.tree_leaves_with_path(matrices(params))}
  vectors = {name for name, decay in decayed.items() if not decay}
  assert vectors == {name for name in decayed if name.endswith(("scale", "bias"))}
  stacked = params["runs"][0][0]["mixer_norm"]["scale"]
  assert len(vectors) >= 3 and len(decayed) - len(vectors) >= 8 and stacked.shape == (2, 32)
  assert matrices({"w": jnp.ones((2, 3)), "b": jnp.ones(3)}) == {"w": True, "b": False}


def test_updates_equal_adamw_by_hand():
  config = OptimConfig(steps=5, warmup_steps=1, learning_rate=0.1, final_learning_rate=0.01, beta1=0.8, beta2=0.9,
                       eps=1e-6, weight_decay=0.1, clip_norm=1.0)
  random = np.random.default_rng(0)
  params = {"w": random.normal(size=(3, 2)).astype(np.float32), "b": random.normal(size=2).astype(np.float32)}
  optimizer, actual = make_optimizer(config), jax.tree.map(jnp.array, params)
  state = optimizer.init(actual)
  first, second = ({name: np.zeros_like(p) for name, p in params.items()} for _ in range(2))
  for count in range(config.steps):
    grads = {name: random.normal(size=p.shape).astype(np.float32) for name, p in params.items()}
    updates, state = optimizer.update(jax.tree.map(jnp.array, grads), state, actual)
    actual = jax.tree.map(jnp.add, actual, updates)
    norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
    rate = float(learning_rate(config)(jnp.int32(count)))
    for name, p in params.items():
      g = grads[name] * min(1.0, config.clip_norm / norm)
      first[name] = config.beta1 * first[name] + (1 - config.beta1) * g
      second[name] = config.beta2 * second[name] + (1 - config.beta2) * g**2
      m, v = first[name] / (1 - config.beta1 ** (count + 1)), second[name] / (1 - config.beta2 ** (count + 1))
      decay = config.weight_decay * p if p.ndim == 2 else 0.0
      params[name] = p - rate * (m / (np.sqrt(v) + config.eps) + decay)
  for name, p in params.items():
    np.testing.assert_allclose(actual[name], p, rtol=2e-5)


def test_wsd_stays_at_the_peak_until_the_decay():
  config = OptimConfig(schedule="wsd", steps=12, warmup_steps=3, decay_steps=4, learning_rate=1e-2,
                       final_learning_rate=2e-3)
  expected = [2.5e-3, 5e-3, 7.5e-3, *[1e-2] * 5, 8e-3, 6e-3, 4e-3, 2e-3]
  np.testing.assert_allclose(rates(config), expected, rtol=1e-6)
  np.testing.assert_allclose(learning_rate(config)(jnp.int32(30)), 2e-3, rtol=1e-6)
  np.testing.assert_allclose(rates(dataclasses.replace(config, decay_steps=0))[3:], 1e-2, rtol=1e-6)


def test_a_wsd_run_is_lengthened_before_its_decay_to_the_one_planned_so():
  old = OptimConfig(schedule="wsd", steps=8, warmup_steps=2)
  planned = dataclasses.replace(old, steps=12, decay_steps=4)
  assert lengthened(old, planned) == (planned, "lengthened from 8 to 12 steps, of which the last 4 are the decay")
  assert rates(planned)[:8] == rates(old)
  assert lengthened(planned, planned) == (planned, "")
  with pytest.raises(ValueError, match="decay_steps=5: the decay would begin at step 7: this run is planned at"):
    lengthened(old, dataclasses.replace(old, steps=12, decay_steps=5))
  with pytest.raises(ValueError, match="this run of 12 steps ends with a decay of 4: only a run without a decay"):
    lengthened(planned, dataclasses.replace(planned, steps=14))


def second_update(params, grads, **optim):
  """The update of the second step, which depends on the momentum, and the state after it."""
  optimizer = make_optimizer(OptimConfig(warmup_steps=0, learning_rate=0.1, weight_decay=0.01, **optim))

  @jax.jit
  def steps(params, grads):
    _, state = optimizer.update(grads, optimizer.init(params), params)
    return optimizer.update(jax.tree.map(lambda g: 2 * g, grads), state, params)

  return steps(params, grads)


def test_muon_treats_stacked_layers_as_separate_matrices_and_leaves_the_rest_to_adamw():
  shapes = {"embedding": ((7, 4), 2), "kernel": ((3, 8, 4), 2), "wide": ((3, 4, 8), 2), "scale": ((3, 4), 1),
            "convolution": ((3, 4, 8), 2)}
  random, params, grads = np.random.default_rng(0), {}, {}
  for name, (shape, axes) in shapes.items():
    params[name], grads[name] = (
        nnx.Param(jnp.asarray(random.normal(size=shape), jnp.float32), out_sharding=(None,) * axes,
                  eager_sharding=False) for _ in range(2))
  updates, state = second_update(params, grads, name="muon")
  separate, _ = second_update(apart(params), apart(grads), name="muon")
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), together(separate), updates)
  for name in ("kernel", "wide"):
    # Newton-Schulz brings every singular value near 1, and 0.2 sqrt(8) gives entries of AdamW's size.
    moved = updates[name][...] + 0.1 * 0.01 * params[name][...]
    values = np.linalg.svd(moved, compute_uv=False) / (0.1 * 0.2 * np.sqrt(8))
    assert values.shape == (3, 4) and 0.3 < values.min() and values.max() < 1.5
  moments = {name.split(".nu.")[1] for name in names(state) if ".nu." in name}
  assert moments == {"embedding", "scale", "convolution"}
  adamw, _ = second_update(params, grads, name="adamw")
  for name in moments:
    np.testing.assert_allclose(updates[name][...], adamw[name][...], rtol=1e-4)


def names(tree):
  return [parameter_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
