"""A model as EleutherAI's lm-evaluation-harness wants it. Nothing else here imports that package (extra `evaluation`).

Rows of a batch are padded to a few lengths, so that few programs are compiled. A model whose state has a fixed size
reads texts of any length. It reads long texts piece by piece with its state carried over, and nothing is cut. A model
with a growing cache reads at most `context` tokens: prompts lose their beginning, and documents are scored in windows
of that many tokens, where each new token is scored once. Prompts begin with the tokenizer's `begin_ids`. A text
without a context follows the last of these, or the end-of-document token if there are none.
"""

import functools
import json
import logging
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from lin_jax.generate import ENDLESS, Sampling, decode, has_growing_state, padded, read
from lin_jax.model import LanguageModel
from lin_jax.tokenizer import Tokenizer, require_vocabulary

try:
  from lm_eval.api.model import TemplateLM
  from lm_eval.models.utils import normalize_gen_kwargs
  from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
  from tqdm import tqdm
except ImportError as e:
  raise ImportError(f"lin_jax.harness needs lm-eval, the extra `evaluation` ({e})") from e

PIECE = 2048  # tokens that a model with a fixed state reads at once
DECODED = 32  # tokens between two looks for stop strings
_HEAD_TOKENS = 32  # tokens per row whose logits exist at once

_log = logging.getLogger(__name__)


class HarnessModel(TemplateLM):
  """Puts `model` behind `loglikelihood`, `loglikelihood_rolling` and `generate_until`, greedy unless a task samples.

  Log-probabilities are float32, come from logits whose products are in the model's dtype, and are summed in float64.
  """

  def __init__(self, model: LanguageModel, tokenizer: Tokenizer, *, context: int, batch_size: int = 16, seed: int = 0):
    """`context` bounds the tokens that models with a growing cache read, for instance by their training length. Other
    models do not use it."""
    super().__init__()
    if context < 2 or batch_size < 1:
      raise ValueError(f"context={context}, batch_size={batch_size}: must be at least 2 and 1")
    require_vocabulary(tokenizer, model.embedding.shape[0])
    self.model, self.text, self.batch_size, self.seed = model, tokenizer, batch_size, seed
    self.context = context if has_growing_state(model) else None

  @property
  def eot_token_id(self) -> int:
    return self.text.eos_id

  @property
  def prefix_token_id(self) -> int:
    return (self.eot_token_id, *self.text.begin_ids)[-1]

  def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
    """Ids of a text. They start with the tokenizer's `begin_ids`, unless the caller or the text has these already."""
    begin, ids = list(self.text.begin_ids), self.text.encode(string)
    return ids if add_special_tokens is False or ids[:len(begin)] == begin else begin + ids

  def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
    """The log-probability of each whole text after `prefix_token_id`."""
    owners, rows = [], []
    for i, request in enumerate(requests):
      ids = self.tok_encode(request.args[0], add_special_tokens=False)
      windows = get_rolling_token_windows(ids, self.prefix_token_id, self.context or len(ids) or 1, context_len=1)
      for before, new in map(make_disjoint_window, windows):
        owners.append(i)
        rows.append((before + new, len(new)))
    totals = np.zeros(len(requests))
    for i, (logprob, _) in zip(owners, self._score(rows, disable_tqdm), strict=True):
      totals[i] += logprob
    for request, total in zip(requests, totals, strict=True):
      self.cache_hook.add_partial("loglikelihood_rolling", request.args, float(total))
    return totals.tolist()

  def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
    """The text that follows each prompt, up to a stop string, the end of the document or the task's `max_gen_toks`.

    Raises ValueError for a generation option other than until, max_gen_toks, do_sample, temperature, top_k, top_p.
    """
    groups = {}
    for i, request in enumerate(requests):
      groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
    texts = [""] * len(requests)
    with tqdm(total=len(requests), desc="generate_until", disable=disable_tqdm) as progress:
      for options, members in groups.items():
        stops, most, sampling = _generation(json.loads(options), self.text.vocab_size)
        prompts = {i: self._prompt(requests[i].args[0], most) for i in members}
        for batch in self._batches({i: len(ids) for i, ids in prompts.items()}):
          for i, text in zip(batch, self._continue([prompts[i] for i in batch], stops, most, sampling)):
            texts[i] = text
            self.cache_hook.add_partial("generate_until", requests[i].args, text)
          progress.update(len(batch))
    return texts

  def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **_) -> list[tuple[float, bool]]:
    rows, cut = [], 0
    for _, before, new in requests:
      if self.context and len(new) > self.context:
        raise ValueError(f"a continuation of {len(new)} tokens does not fit context={self.context}")
      rows.append(((before + new)[-self.context - 1:] if self.context else before + new, len(new)))
      cut += len(before + new) > len(rows[-1][0])
    if cut:
      _log.warning("%d of %d contexts lost their beginning: the model reads %d tokens", cut, len(rows), self.context)
    results = self._score(rows, disable_tqdm)
    for (key, _, _), result in zip(requests, results, strict=True):
      self.cache_hook.add_partial("loglikelihood", key, result)
    return results

  def _score(self, rows, disable_tqdm):
    """Returns for each (ids, n) the log-probability of the last n ids after the ids before them, and whether greedy
    decoding gives them. The first id is never scored."""
    results = [(0.0, True)] * len(rows)
    with tqdm(total=len(rows), desc="loglikelihood", disable=disable_tqdm) as progress:
      for batch in self._batches({i: len(ids) for i, (ids, _) in enumerate(rows)}):
        for i, result in zip(batch, self._score_batch([rows[i] for i in batch])):
          results[i] = result
        progress.update(len(batch))
    return results

  def _score_batch(self, rows):
    longest = max(len(ids) for ids, _ in rows) - 1
    piece = padded(longest) if self.context else min(padded(longest), PIECE)
    tokens, targets, scored = np.zeros((3, self.batch_size, -(-longest // piece) * piece), np.int32)
    for row, (ids, count) in enumerate(rows):
      length = len(ids) - 1
      tokens[row, :length], targets[row, :length], scored[row, length - count:length] = ids[:-1], ids[1:], 1
    state = self.model.init_state(self.batch_size, ENDLESS) if longest > piece else None
    logprob, best = np.zeros(self.batch_size), np.ones(self.batch_size, bool)
    for part in (slice(start, start + piece) for start in range(0, longest, piece)):
      values, greedy, state = _token_logprobs(self.model, tokens[:, part], targets[:, part], state)
      logprob += np.where(scored[:, part], np.asarray(values, np.float64), 0).sum(axis=1)
      best &= (np.asarray(greedy) | (scored[:, part] == 0)).all(axis=1)
    return zip(logprob.tolist(), best.tolist())

  def _prompt(self, text, most):
    if self.context and most >= self.context:
      raise ValueError(f"max_gen_toks={most}: leaves no room for a prompt in context={self.context}")
    ids = self.tok_encode(text) or [self.eot_token_id]
    return ids[-(self.context - most):] if self.context else ids

  def _continue(self, prompts, stops, most, sampling):
    """Texts of up to `most` tokens. It looks for stop strings every `DECODED` tokens."""
    length, pieces = padded(max(map(len, prompts))), -(-most // DECODED)
    tokens, segments = np.zeros((2, self.batch_size, length), np.int32)
    for row, ids in enumerate(prompts):
      tokens[row, -len(ids):], segments[row, -len(ids):] = ids, 1
    logits, state = _prefill(self.model, tokens, segments, length + pieces * DECODED)
    generated, texts = [[] for _ in prompts], [None] * len(prompts)
    for i in range(pieces):
      new, logits, state = _decode(self.model, logits, state, jax.random.fold_in(jax.random.key(self.seed), i), DECODED,
                                   sampling)
      for row, ids in enumerate(np.asarray(new)[:len(prompts)].tolist()):
        if texts[row] is None:
          generated[row] += ids
          texts[row] = self._finished(generated[row][:most], stops, last=i == pieces - 1)
      if None not in texts:
        break
    return texts

  def _finished(self, ids, stops, last):
    """The text if it has ended or this is the `last` look, and None otherwise."""
    ended = self.eot_token_id in ids
    ids = ids[:ids.index(self.eot_token_id)] if ended else ids
    # Unlike a text's own decoding, this keeps the space that separates the text from the prompt.
    text = b"".join(map(self.text.token_bytes, ids)).decode(errors="replace")
    ends = [at for stop in stops if (at := text.find(stop)) >= 0]
    return text[:min(ends)] if ends else text if ended or last else None

  def _batches(self, lengths: dict[int, int]) -> Iterator[list[int]]:
    """Yields the longest rows first, so that padding is little and a batch too big for the memory fails at once."""
    ordered = sorted(lengths, key=lengths.get, reverse=True)
    return (ordered[i:i + self.batch_size] for i in range(0, len(ordered), self.batch_size))


def _generation(options, vocab_size):
  options = dict(normalize_gen_kwargs(options))
  sampled = options.pop("do_sample")
  sampling = Sampling(options.pop("temperature", 0.0) if sampled else 0.0, options.pop("top_k", 0),
                      options.pop("top_p", 1.0), vocab_size)
  stops, most = options.pop("until"), options.pop("max_gen_toks")
  if options:
    raise ValueError(f"generation option {next(iter(options))!r}: known are until, max_gen_toks, do_sample, "
                     "temperature, top_k and top_p")
  if most < 1:
    raise ValueError(f"max_gen_toks={most}: must be at least 1")
  return [stop for stop in stops if stop], most, sampling


@jax.jit
def _token_logprobs(model: LanguageModel, tokens: Int[Array, "B T"], targets: Int[Array, "B T"], state,
                    ) -> tuple[Float[Array, "B T"], Bool[Array, "B T"], object]:
  """Log-probability of each target, whether it is the most likely token, and the state after the last token."""
  hidden, state = model.hidden(tokens, state)
  weights = model.unembedding().astype(hidden.dtype)

  def score(part):
    h, target = part
    logits = jnp.einsum("bcd,dv->bcv", h, weights, preferred_element_type=jnp.float32)
    chosen = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1) == target

  parts = [jnp.moveaxis(x.reshape(x.shape[0], -1, _HEAD_TOKENS, *x.shape[2:]), 1, 0) for x in (hidden, targets)]
  values, greedy = (jnp.moveaxis(x, 0, 1).reshape(tokens.shape) for x in jax.lax.map(score, tuple(parts)))
  return values, greedy, state


@functools.partial(jax.jit, static_argnames="max_length")
def _prefill(model, tokens, segment_ids, max_length):
  """Logits after the last token, and the state of its segment, without the effects of the padding on the left."""
  return read(model, tokens, model.init_state(tokens.shape[0], max_length), segment_ids)


@functools.partial(jax.jit, static_argnames=("steps", "sampling"), donate_argnames="state")
def _decode(model, logits, state, key, steps, sampling):
  tokens, (logits, state) = decode(model, logits, state, key, steps, sampling)
  return tokens, logits, state
