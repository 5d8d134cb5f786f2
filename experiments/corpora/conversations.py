"""Conversations as documents: the ids of a chat template, with a mask of the answers."""

import json
from collections.abc import Callable

import numpy as np

from corpora.dataset import token_sizes
from lin_jax.chat import ChatTemplate
from lin_jax.tokenizer import Tokenizer


def encoder(tokenizer: Tokenizer) -> Callable[[str], tuple[np.ndarray, int, np.ndarray, int]]:
  """Returns the function from the JSON text of a conversation's messages to the arguments of `SplitWriter.add`.

  The end id closes the conversation, if the template's text does not end with it. It belongs to the last answer if the
  text ends with this answer and no other special token. The bytes are those that the ids spell, which special tokens
  do not.

  Raises ValueError if the tokenizer has no chat template. The function raises it for a conversation without an answer,
  and as `ChatTemplate.encode` does.
  """
  chat, sizes = ChatTemplate(tokenizer), token_sizes(tokenizer)

  def encode(text):
    ids, mask = chat.encode(json.loads(text))
    if not any(mask):
      raise ValueError("the conversation has no answer of the assistant to learn")
    if ids[-1] != tokenizer.eos_id:
      mask.append(mask[-1] and ids[-1] not in tokenizer.special)
      ids.append(tokenizer.eos_id)
    ids, mask = np.array(ids), np.array(mask)
    return ids, int(sizes[ids].sum()) - len(tokenizer.prefix), mask, int(sizes[ids[mask]].sum())

  return encode
