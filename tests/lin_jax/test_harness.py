"""The adapter to lm-evaluation-harness, against sums of log-softmax and step-by-step decoding, and in the package."""

import json
import types

import datasets
import jax
import jax.numpy as jnp
import lm_eval
import numpy as np
import pytest
from flax import nnx
from lm_eval.tasks import TaskManager

from lin_jax import harness, mixers, sharding
from lin_jax.config import MeshConfig, ModelConfig
from lin_jax.harness import HarnessModel
from lin_jax.mixers.attention import AttentionConfig
from lin_jax.mixers.gla import GLAConfig
from lin_jax.model import LanguageModel
from lin_jax.tokenizer import ByteTokenizer

CONTEXT = 40
LONGEST = 120
TEXTS = ["The quick brown fox", "jumps", "over the lazy dog; " * 4, "ünïcödé"]


class NumberTokenizer(ByteTokenizer):
  """Reads bytes and writes each id as "<id>", so that every sequence of ids is a text of its own."""

  def token_bytes(self, token):
    return f"<{token}>".encode()


def build(mixer, **model):
  config = ModelConfig(mixer=mixer, **model, vocab_size=257, width=32, depth=2, mlp_width=48, dtype="float32")
  # Larger weights than at initialization, so that no two tokens are nearly as likely.
  return jax.tree.map(lambda x: 3 * x, LanguageModel(config, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module", params=[GLAConfig(heads=2, gate_rank=4, conv_width=3, implementation="reference"),
                                        AttentionConfig(heads=2)], ids=mixers.name_of)
def model(request):
  return build(request.param)


@pytest.fixture(scope="module")
def adapter(model):
  return HarnessModel(model, NumberTokenizer(), context=CONTEXT, batch_size=3)


def requests(*arguments):
  return [types.SimpleNamespace(args=args) for args in arguments]


@jax.jit
def log_softmax(model, ids):
  return jax.nn.log_softmax(model(ids[None])[0][0])


def log_probabilities(model, ids):
  """Of every token after each prefix of `ids`, from one forward pass; what follows `ids` in it has no influence."""
  return np.asarray(log_softmax(model, jnp.asarray([*ids, *[0] * (LONGEST - len(ids))])), np.float64)[:len(ids)]


def expected(model, before, new):
  ids = [*before, *new]
  scores = log_probabilities(model, ids[:-1])[len(before) - 1:]
  return scores[np.arange(len(new)), new].sum(), scores.argmax(axis=1).tolist() == list(new)


def greedy(model, ids, count):
  ids = list(ids)
  for _ in range(count):
    ids.append(int(log_probabilities(model, ids)[-1].argmax()))
  return ids[-count:]


def test_loglikelihood_is_the_sum_of_log_softmax(adapter, model):
  pairs = [("The cat sat on", " the mat"), ("", "start"), ("a", "b"), ("ä ", "ö"), ("0123456789" * 2, "x" * 15)]
  results = adapter.loglikelihood(requests(*pairs), disable_tqdm=True)
  pairs[3] = ("ä", " ö")  # the package moves spaces to where a word piece has them
  for (context, continuation), (logprob, best) in zip(pairs, results, strict=True):
    wanted, wanted_best = expected(model, list(context.encode()) or [256], list(continuation.encode()))
    assert logprob == pytest.approx(wanted, rel=1e-5)
    assert best == wanted_best


def test_tokens_of_texts_are_split_over_devices(adapter):
  pairs = [("The cat sat on", " the mat"), ("0123456789" * 2, "x" * 15)]
  expected = adapter.loglikelihood(requests(*pairs), disable_tqdm=True)
  with jax.set_mesh(sharding.make_mesh(MeshConfig(data=1, context=8))):
    found = adapter.loglikelihood(requests(*pairs), disable_tqdm=True)
  for (logprob, best), (wanted, wanted_best) in zip(found, expected, strict=True):
    assert logprob == pytest.approx(wanted, rel=1e-5) and best == wanted_best


def test_texts_begin_as_documents_do(model):
  tokenizer = NumberTokenizer()
  tokenizer.begin_ids = (255,)
  adapter = HarnessModel(model, tokenizer, context=CONTEXT, batch_size=3)
  pairs = [("The cat sat on", " the mat"), ("", "start")]
  found = [logprob for logprob, _ in adapter.loglikelihood(requests(*pairs), disable_tqdm=True)]
  found += adapter.loglikelihood_rolling(requests(("jumps",)), disable_tqdm=True)
  wanted = [expected(model, [255, *before.encode()], list(new.encode()))[0] for before, new in [*pairs, ("", "jumps")]]
  assert found == pytest.approx(wanted, rel=1e-5)
  assert adapter._prompt("ab", 5) == [255, *b"ab"] and adapter._prompt("", 5) == [255]


def test_greedy_continuation_is_recognised(adapter, model):
  prompt = list(b"Once")
  ids = greedy(model, prompt, 3)
  other = [*ids[:2], (ids[2] + 1) % 256]
  results = adapter._loglikelihood_tokens([(None, prompt, ids), (None, prompt, other)], disable_tqdm=True)
  assert [best for _, best in results] == [True, False]


def test_rolling_is_the_whole_document(adapter, model, monkeypatch):
  monkeypatch.setattr(harness, "PIECE", 32)
  results = adapter.loglikelihood_rolling(requests(*((text,) for text in [*TEXTS, ""])), disable_tqdm=True)
  for text, found in zip(TEXTS, results):
    ids = list(text.encode())
    if adapter.context is None or len(ids) <= CONTEXT:
      wanted = expected(model, [256], ids)[0]
    else:  # the last window is full too, and only its new tokens count
      wanted = expected(model, [256], ids[:CONTEXT])[0]
      wanted += expected(model, ids[-CONTEXT - 1:CONTEXT], ids[CONTEXT:])[0]
    assert found == pytest.approx(wanted, rel=1e-5)
  assert len(TEXTS[2]) > CONTEXT and results[-1] == 0


def test_only_a_growing_cache_has_a_context(adapter, model, caplog):
  long, new = "x" * 100, "yz"
  assert adapter.context == (CONTEXT if harness.has_growing_state(model) else None)
  (logprob, _), = adapter.loglikelihood(requests((long, new)), disable_tqdm=True)
  ids = list(long.encode())
  if adapter.context:
    ids = ids[-CONTEXT - 1 + len(new):]
    assert "1 of 1 contexts lost their beginning" in caplog.text
  assert logprob == pytest.approx(expected(model, ids, list(new.encode()))[0], rel=1e-5)


def test_a_hybrid_with_a_window_reads_everything(monkeypatch):
  monkeypatch.setattr(harness, "PIECE", 32)
  gla, tokenizer = GLAConfig(heads=2, gate_rank=4, implementation="reference"), ByteTokenizer()
  growing = build(gla, hybrid_mixer=AttentionConfig(heads=2), hybrid_layers=(1,))
  assert HarnessModel(growing, tokenizer, context=CONTEXT).context == CONTEXT

  windowed = build(gla, hybrid_mixer=AttentionConfig(heads=2, window=8), hybrid_layers=(1,))
  adapter = HarnessModel(windowed, tokenizer, context=CONTEXT, batch_size=1)
  found, = adapter.loglikelihood_rolling(requests((TEXTS[2],)), disable_tqdm=True)
  assert adapter.context is None
  assert found == pytest.approx(expected(windowed, [256], list(TEXTS[2].encode()))[0], rel=1e-5)


def text_of(ids):
  return "".join(f"<{token}>" for token in ids)


def test_generation_is_greedy_and_ends_at_the_stop_string(adapter, model):
  prompts = ["ab", "The quick", "x" * 37]
  options = {"max_gen_toks": 5, "until": []}
  ids = [greedy(model, prompt.encode()[-(CONTEXT - 5):] if adapter.context else prompt.encode(), 5)
         for prompt in prompts]
  assert adapter.generate_until(requests(*((prompt, options) for prompt in prompts)), disable_tqdm=True) == [
      text_of(row) for row in ids]

  stop = f"<{ids[1][2]}>"
  options["until"] = ["never", stop]
  text, = adapter.generate_until(requests((prompts[1], options)), disable_tqdm=True)
  assert text == text_of(ids[1]).split(stop)[0]


def test_generation_ends_with_the_document(adapter, model, monkeypatch):
  monkeypatch.setattr(harness, "DECODED", 2)
  ids = greedy(model, b"ab", 5)
  adapter = HarnessModel(model, NumberTokenizer(), context=CONTEXT, batch_size=1)
  request = requests(("ab", {"max_gen_toks": 5}))
  assert adapter.generate_until(request, disable_tqdm=True) == [text_of(ids)]
  adapter.text.eos_id = ids[3]
  assert adapter.generate_until(request, disable_tqdm=True) == [text_of(ids[:ids.index(ids[3])])]


def test_generation_never_draws_the_padding_of_a_vocabulary(model, monkeypatch):
  monkeypatch.setattr(harness, "DECODED", 2)
  adapter = HarnessModel(model, NumberTokenizer(), context=CONTEXT, batch_size=1)
  limit = adapter.text.vocab_size = min(greedy(model, b"ab", 4))  # not one of the model's own choices is left
  text, = adapter.generate_until(requests(("ab", {"max_gen_toks": 4})), disable_tqdm=True)
  assert max(int(token) for token in text.strip("<>").split("><")) < limit


def test_refusals(adapter, model):
  with pytest.raises(ValueError, match="generation option 'num_beams'"):
    adapter.generate_until(requests(("a", {"num_beams": 4})), disable_tqdm=True)
  with pytest.raises(ValueError, match="max_gen_toks=0: must be at least 1"):
    adapter.generate_until(requests(("a", {"max_gen_toks": 0})), disable_tqdm=True)
  with pytest.raises(ValueError, match="context=1, batch_size=3"):
    HarnessModel(model, ByteTokenizer(), context=1, batch_size=3)
  tokenizer = types.SimpleNamespace(name="large", vocab_size=300, eos_id=0)
  with pytest.raises(ValueError, match="tokenizer 'large' has 300 tokens, the model 257"):
    HarnessModel(model, tokenizer, context=CONTEXT)


def test_padded_lengths_are_few():
  assert [harness.padded(n) for n in (1, 32, 33, 64, 65, 2048)] == [32, 32, 64, 64, 128, 2048]


STOP = "7>"
TASKS = {
    "choices": dict(output_type="multiple_choice", doc_to_text="{{query}}", doc_to_choice="{{choices}}",
                    doc_to_target="{{gold}}", target_delimiter="", metric_list=[{"metric": "acc"}]),
    "text": dict(output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{query}}",
                 metric_list=[{"metric": "byte_perplexity"}]),
    "answers": dict(output_type="generate_until", doc_to_text="{{query}}", doc_to_target="{{answer}}",
                    generation_kwargs={"until": [STOP], "max_gen_toks": 4},
                    metric_list=[{"metric": "exact_match"}]),
}


def write_tasks(folder, docs):
  data = folder / "docs.jsonl"
  data.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
  for name, task in TASKS.items():
    source = dict(task=name, dataset_path="json", test_split="test",
                  dataset_kwargs={"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")})
    (folder / f"{name}.yaml").write_text(json.dumps(source | task))  # JSON is YAML


def test_lm_eval_runs_the_three_kinds_of_tasks(adapter, model, tmp_path, monkeypatch):
  monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
  docs = []
  for query in ("ab", "The quick"):
    ids = greedy(model, query.encode(), 4)
    docs.append({"query": query, "choices": [" one", "2", " three!"], "gold": 1,
                 "answer": text_of(ids).split(STOP)[0]})
  docs[0]["answer"] = "another"
  write_tasks(tmp_path, docs)
  manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
  results = lm_eval.simple_evaluate(adapter, tasks=list(TASKS), task_manager=manager, log_samples=False,
                                    bootstrap_iters=0)["results"]

  chosen = [np.argmax([expected(model, doc["query"].encode(), list(choice.encode()))[0] for choice in doc["choices"]])
            for doc in docs]
  assert results["choices"]["acc,none"] == np.mean(np.equal(chosen, 1))
  nats = sum(expected(model, [256], list(doc["query"].encode()))[0] for doc in docs)
  assert results["text"]["byte_perplexity,none"] == pytest.approx(np.exp(-nats / 11), rel=1e-5)
  assert results["answers"]["exact_match,none"] == 0.5
