"""A server's answers equal those of one prompt at a time, whatever else its rows do, and its memory stays the same."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lin_jax import serving_rows
from lin_jax.config import ModelConfig
from lin_jax.generate import Sampling, generate, sample
from lin_jax.mixers.attention import AttentionConfig
from lin_jax.mixers.delta_net import DeltaNetConfig
from lin_jax.mixers.gla import GLAConfig
from lin_jax.model import LanguageModel
from lin_jax.serving import Request, Server

VOCABULARY, MAX_LENGTH, PIECE, STRIDE = 50, 36, 8, 3
MODELS = {
    "gla": dict(mixer=GLAConfig(heads=2, gate_rank=4, conv_width=3, implementation="reference")),
    "hybrid": dict(mixer=DeltaNetConfig(heads=2, implementation="reference"),
                   hybrid_mixer=AttentionConfig(heads=2, window=5), hybrid_layers=(1,)),
    "attention": dict(mixer=AttentionConfig(heads=4, kv_heads=2)),
}
SAMPLINGS = [Sampling(temperature=0), Sampling(), Sampling(0.7, top_k=5), Sampling(1.5, top_p=0.8),
             Sampling(temperature=0, vocab_size=20), Sampling(1.3, top_k=30, top_p=0.9, vocab_size=40)]


def build(name):
  config = ModelConfig(**MODELS[name], vocab_size=VOCABULARY, width=32, depth=2, mlp_width=48,
                       dtype="float32")
  # Larger weights than at initialization, so that no two tokens are nearly as likely.
  return jax.jit(lambda: jax.tree.map(lambda x: 3 * x, LanguageModel(config, rngs=nnx.Rngs(0))))()


@pytest.fixture(scope="module", params=MODELS)
def model(request):
  return build(request.param)


@pytest.fixture(scope="module")
def server(model):
  return Server(model, rows=2, max_length=MAX_LENGTH, piece=PIECE, stride=STRIDE)


def requests():
  """Prompts shorter than a piece, of exactly one and of several, which ask for different numbers of tokens."""
  random = np.random.default_rng(0)
  return [Request(random.integers(VOCABULARY, size=length).tolist(), tokens, sampling, seed)
          for seed, (length, tokens, sampling) in enumerate(zip(
              (3, 19, 8, 1, 9, 16), (10, 7, 1, 12, 8, MAX_LENGTH - 16), SAMPLINGS, strict=True))]


@jax.jit
def logits_of(model, ids):
  return model(ids[None])[0][0]


def alone(model, request):
  """The answer to one request from full forward passes. Causality lets one padded shape serve every length."""
  ids, key = list(request.prompt), jax.random.key(request.seed)
  for i in range(request.max_tokens):
    logits = logits_of(model, jnp.asarray([*ids, *[0] * (MAX_LENGTH - len(ids))]))[len(ids) - 1]
    ids.append(int(sample(logits[None], jax.random.fold_in(key, i), request.sampling)[0]))
  return ids[len(request.prompt):]


def answers(server, numbers):
  """The tokens and the ends of the requests `numbers`, once the server has finished."""
  tokens, ends = {n: [] for n in numbers}, {}
  for progress in server.finish():
    assert progress.id not in ends
    tokens[progress.id] += progress.tokens
    if progress.ended:
      ends[progress.id] = progress.ended
  return [tokens[n] for n in numbers], [ends[n] for n in numbers]


def programs():
  """How many programs each function of the server has compiled."""
  return {name: getattr(serving_rows, name)._cache_size() for name in ("read", "place", "decode")}


def test_answers_equal_those_of_one_prompt_at_a_time(model, server):
  every, before = requests(), programs()
  numbers, early = [server.submit(request) for request in every[:3]], {}
  for _ in range(2):  # the others come while these are under way
    for progress in server.step():
      early[progress.id] = early.get(progress.id, []) + progress.tokens
  assert early
  numbers += [server.submit(request) for request in every[3:]]
  found, ends = answers(server, numbers)
  found = [early.get(n, []) + tokens for n, tokens in zip(numbers, found, strict=True)]
  assert found == [alone(model, request) for request in every]
  assert set(ends) == {"length"} and not server.busy
  # A single program of each kind: all pieces are padded to one length here.
  assert {name: count - before[name] for name, count in programs().items()} == {"read": 1, "place": 1, "decode": 1}


@pytest.mark.parametrize("model", ["attention"], indirect=True)  # it compiles for seconds
def test_an_answer_equals_that_of_generate(model, server):
  request = requests()[3]
  expected = generate(model, [request.prompt], request.max_tokens, **dataclasses.asdict(request.sampling),
                      key=jax.random.key(request.seed))
  assert answers(server, [server.submit(request)])[0] == expected.tolist()


def test_a_stop_token_ends_an_answer_and_is_not_part_of_it(model, server):
  request = requests()[0]
  tokens = alone(model, request)
  stop = tokens[4]
  numbers = [server.submit(dataclasses.replace(request, stop=ids)) for ids in ((VOCABULARY - 1, stop), (tokens[0],))]
  assert answers(server, numbers) == ([tokens[:tokens.index(stop)], []], ["stop", "stop"])


def test_a_cancelled_request_gives_its_row_to_the_next(model, server):
  short, long = requests()[:2]
  answering, reading, waiting, last = (server.submit(request) for request in (short, long, long, short))
  assert [progress.id for progress in server.step() + server.step()] == [answering] * 2
  for number in (answering, reading, waiting):  # the second prompt has been read in part
    server.cancel(number)
  assert [progress.id for progress in server.step()] == [last]
  server.cancel(last)
  assert not server.busy and server.step() == []
  found, _ = answers(server, [server.submit(long)])
  assert found == [alone(model, long)]


# In float32. Two GLA layers have memories of 2 x 8 x 16 and two inputs of 64 channels. A DeltaNet layer has a memory of
# 2 x 16 x 16 and three inputs of 96 channels. Caches have a key, a value and a position per token, and a length.
ROW_BYTES = {"gla": (2 * 4 * (256 + 128), 0), "hybrid": (4 * (512 + 288), 5 * (2 * 32 + 1) * 4 + 4),
             "attention": (0, 2 * (MAX_LENGTH * (2 * 16 + 1) * 4 + 4))}


def test_rows_have_the_bytes_that_are_reported(server, request):
  recurrent, cache = server.row_bytes
  assert (recurrent, cache) == ROW_BYTES[request.node.callspec.params["model"]]
  held = sum(leaf.nbytes for leaf in jax.tree.leaves(server._state.layers))
  assert held == server.rows * (recurrent + cache) == server.total_bytes - recurrent - cache


def test_only_a_growing_cache_bounds_requests(model, server):
  request = Request([0] * (MAX_LENGTH + 5), 1, Sampling(temperature=0))
  if server.max_length is None:
    assert answers(server, [server.submit(request)])[1] == ["length"]
    return
  with pytest.raises(ValueError, match="a prompt of 41 and 1 new tokens: .* not be more than max_length=36, because"):
    server.submit(request)
  with pytest.raises(ValueError, match="max_length=1: must be at least 2, because this model's cache"):
    Server(model, rows=1, max_length=1)
  with pytest.raises(ValueError, match=r"a server of 9 rows of 10,000,000,000 tokens needs .* GiB .* fewer rows"):
    Server(model, rows=9, max_length=10**10)
  assert not server.busy


def test_bad_requests_are_refused(server, unchecked_arrays):
  for fields, message in [
      (dict(prompt=[]), "a prompt of 0 and max_tokens=1: each must be at least 1"),
      (dict(max_tokens=0), "a prompt of 1 and max_tokens=0"),
      (dict(prompt=[VOCABULARY]), r"prompt token 50: ids must lie in \[0, 50\)"),
      (dict(prompt=[0.5]), "prompt of float64: must hold integers"),
      (dict(stop=[-1]), r"stop token -1: ids must lie in \[0, 50\)"),
      (dict(seed=-1), r"seed=-1: must lie in \[0, 2\*\*32\)")]:
    with pytest.raises(ValueError, match=message):
      server.submit(Request(**dict(prompt=[1], max_tokens=1) | fields))
  assert not server.busy


def test_a_server_of_nothing_is_refused(model):
  for name in ("rows", "piece", "stride"):
    with pytest.raises(ValueError, match=f"{name}=0: must be at least 1"):
      Server(model, **dict(rows=1) | {name: 0})


def test_warming_up_reads_one_prompt_for_each_program(server, monkeypatch):
  submitted = []
  monkeypatch.setattr(server, "piece", 64)
  monkeypatch.setattr(server, "submit", lambda request: submitted.append(len(request.prompt)))
  # Of a first piece of 1 to 32 and of 33 to 64 tokens, alone and before others.
  server.warm_up([1000, 20, 31, 40, 64, 64 * 3 + 1, 64 * 4])
  assert sorted(submitted) == [31, 64, 65, 128]


def test_every_row_has_a_sampling_of_its_own():
  logits = jax.random.normal(jax.random.key(1), (len(SAMPLINGS), VOCABULARY))
  rows = [serving_rows.settings(sampling, seed, VOCABULARY) for seed, sampling in enumerate(SAMPLINGS)]
  keys, _, *cuts = jax.tree.map(lambda *x: jnp.concatenate(x), *rows)
  draw = jax.jit(serving_rows.sample_rows)
  for i in range(8):
    found = draw(logits, jax.vmap(jax.random.fold_in, (0, None))(keys, i), *cuts)
    expected = [sample(logits[row][None], jax.random.fold_in(jax.random.key(row), i), sampling)
                for row, sampling in enumerate(SAMPLINGS)]
    np.testing.assert_array_equal(found, jnp.concatenate(expected))
