"""Sampling: distributions, agreement of prefill and decode with the full forward pass, and refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lin_jax import mixers
from lin_jax.config import ModelConfig
from lin_jax.generate import Sampling, compile_generate, generate, keep_top_k, keep_top_p, sample, state_bytes
from lin_jax.model import LanguageModel

VOCABULARY = 50
PROBABILITIES = np.array([0.05, 0.4, 0.15, 0.3, 0.1])


@pytest.fixture(scope="module", params=["gla", "attention"])
def model(request):
  mixer = mixers.config_class(request.param).examples()[-1]
  config = ModelConfig(mixer=mixer, vocab_size=VOCABULARY, width=32, depth=2, mlp_width=48, dtype="float32")
  # Larger weights than at initialization, so that the argmax changes from token to token.
  return jax.tree.map(lambda x: 3 * x, LanguageModel(config, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def prompt():
  return np.random.default_rng(0).integers(VOCABULARY, size=(2, 7))


def frequencies(sampling, draws=40_000):
  logits = jnp.broadcast_to(jnp.log(jnp.asarray(PROBABILITIES)), (draws, len(PROBABILITIES)))
  tokens = jax.jit(sample, static_argnums=2)(logits, jax.random.key(0), sampling)
  return np.bincount(tokens, minlength=len(PROBABILITIES)) / draws


def renormalized(probabilities, kept):
  kept = np.isin(np.arange(len(probabilities)), kept) * probabilities
  return kept / kept.sum()


@pytest.mark.parametrize(("sampling", "expected"), [
    (Sampling(), PROBABILITIES),
    (Sampling(temperature=0.5), PROBABILITIES**2 / (PROBABILITIES**2).sum()),
    (Sampling(temperature=0.0), np.eye(5)[1]),
    (Sampling(top_k=2), renormalized(PROBABILITIES, [1, 3])),
    (Sampling(top_k=99), PROBABILITIES),
    (Sampling(top_p=0.69), renormalized(PROBABILITIES, [1, 3])),
    (Sampling(top_p=0.71), renormalized(PROBABILITIES, [1, 3, 2])),
    (Sampling(top_p=0.01), np.eye(5)[1]),
    (Sampling(vocab_size=3), renormalized(PROBABILITIES, [0, 1, 2])),
    (Sampling(temperature=0.0, vocab_size=1), np.eye(5)[0]),
    (Sampling(top_k=1, vocab_size=1), np.eye(5)[0]),
    (Sampling(top_p=0.1, vocab_size=1), np.eye(5)[0]),
    # Top-p acts on what top-k leaves: of 0.57 and 0.43, the first alone reaches 0.5.
    (Sampling(top_k=2, top_p=0.5), np.eye(5)[1]),
], ids=str)
def test_sampling_frequencies(sampling, expected):
  found = frequencies(sampling)
  assert np.all(found[expected == 0] == 0)
  # 4.5 standard deviations of a frequency over 40,000 draws.
  assert np.all(np.abs(found - expected) <= 4.5 * np.sqrt(expected * (1 - expected) / 40_000))


def test_filters_leave_kept_logits_unchanged():
  logits = jnp.asarray([[0.0, 3.0, 1.0, 2.0], [5.0, -1.0, 5.5, 0.0]])
  inf = np.inf
  np.testing.assert_array_equal(keep_top_k(logits, 2), [[-inf, 3, -inf, 2], [5, -inf, 5.5, -inf]])
  np.testing.assert_array_equal(keep_top_p(logits, 0.8), [[-inf, 3, -inf, 2], [5, -inf, 5.5, -inf]])


def test_greedy_is_the_argmax_of_the_full_forward_pass(model, prompt):
  steps = 9
  tokens = generate(model, prompt, steps, temperature=0.0)
  assert tokens.shape == (2, steps) and tokens.dtype == jnp.int32
  forward = jax.jit(lambda model, tokens: model(tokens)[0])
  # Causality lets one padded shape serve every prefix.
  sequence = np.zeros((2, prompt.shape[1] + steps), np.int32)
  sequence[:, :prompt.shape[1]] = prompt
  for i in range(prompt.shape[1], sequence.shape[1]):
    sequence[:, i] = np.argmax(forward(model, sequence)[:, i - 1], axis=-1)
  np.testing.assert_array_equal(tokens, sequence[:, prompt.shape[1]:])
  assert len(np.unique(tokens)) > 3


def test_equal_keys_give_equal_tokens(model, prompt):
  run = compile_generate(model, 2, 7, 12, Sampling(temperature=1.5))
  first, again, other = (np.asarray(run(prompt, jax.random.key(seed))) for seed in (1, 1, 2))
  np.testing.assert_array_equal(first, again)
  assert np.any(first != other)
  assert first.min() >= 0 and first.max() < VOCABULARY
  # Rows draw independently: the same prompt twice does not give the same text twice.
  same = np.asarray(run(np.repeat(prompt[:1], 2, axis=0), jax.random.key(1)))
  assert np.any(same[0] != same[1])


def test_state_is_constant_for_gla_and_grows_with_length_for_attention():
  def size(mixer, length):
    config = ModelConfig(mixer=mixer, vocab_size=8, width=32, depth=3, mlp_width=16, dtype="bfloat16")
    return state_bytes(LanguageModel(config, rngs=nnx.Rngs(0)), 2, length)

  gla, attention = mixers.config_class("gla")(heads=2), mixers.config_class("attention")(heads=4)
  assert size(gla, 10) == size(gla, 10_000_000) == 3 * 2 * 2 * 8 * 16 * 4
  # Keys and values in bfloat16 and one int32 position a slot, one int32 length a row.
  assert size(attention, 1000) == 3 * 2 * (1000 * (2 * 32 * 2 + 4) + 4)


def test_too_long_for_memory_is_refused_with_the_size():
  config = ModelConfig(mixer=mixers.config_class("attention")(heads=4), vocab_size=8, width=32, depth=2, mlp_width=16,
                       dtype="float32")
  model = LanguageModel(config, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match=r"10 new tokens .* needs [\d,.]+ GiB .* more than the [\d,.]+ GiB of "):
    compile_generate(model, 1, 10**10, 10, Sampling())
  # The cache alone would fit here; the scores of the prefill do not.
  assert state_bytes(model, 1, 10**6) < 2**30
  with pytest.raises(ValueError, match="a prompt of 1,000,000 .* needs"):
    compile_generate(model, 1, 10**6, 10, Sampling())


def test_more_tokens_than_memory_holds_are_refused_whatever_the_state(model):
  with pytest.raises(ValueError, match=r"100,000,000,000,000 new tokens .* needs"):
    compile_generate(model, 1, 10, 10**14, Sampling())


@pytest.mark.parametrize(("arguments", "message"), [
    (dict(temperature=-0.1), "temperature=-0.1: must be finite and not negative"),
    (dict(temperature=float("nan")), "temperature=nan: must be finite"),
    (dict(top_k=-1), "top_k=-1: must not be negative"),
    (dict(top_p=0.0), r"top_p=0.0: must lie in \(0, 1\]"),
    (dict(top_p=1.1), r"top_p=1.1: must lie in \(0, 1\]"),
    (dict(vocab_size=-1), "vocab_size=-1: must not be negative"),
    (dict(prompt=np.zeros((1, 2))), "prompt of float64: must hold integers"),
    (dict(steps=0), "steps=0: each must be at least 1"),
    (dict(prompt=np.zeros((1, 0), int)), "prompt_length=0"),
    (dict(prompt=np.zeros(3, int)), r"prompt of shape \(3,\): must be \[batch, tokens\]"),
    (dict(prompt=np.array([[0, VOCABULARY]])), r"prompt token 50: ids must lie in \[0, 50\)"),
    (dict(prompt=np.array([[0, -1]])), r"prompt token -1: ids must lie in \[0, 50\)"),
])
def test_bad_arguments_are_refused(model, arguments, message, unchecked_arrays):
  with pytest.raises(ValueError, match=message):
    generate(model, **{"prompt": np.zeros((1, 2), int), "steps": 2, **arguments})
