"""Conversations: from JSON Lines to a dataset with masks, and an answer in a chat template."""

import functools
import json

import numpy as np
import pytest
from flax import nnx

from corpora import documents, tokenize
from lin_jax.checkpoint import save_model
from lin_jax.data import TokenDataset
from lin_jax.manifests import read_manifest, verify
from lin_jax.model import LanguageModel
from lin_jax.tokenizer import load_tokenizer
from tests.experiments.datasets import content, interrupt
from tests.forked import Command
from tests.lin_jax import tiny
from tests.lin_jax.fast_tokenizers import byte_level, save
from tests.lin_jax.test_chat import FIXTURES

CHATS = [[{"role": "user", "content": f"was it {i}?"}, {"role": "assistant", "content": "it was " * (i % 5 + 1)}] * 2
         for i in range(40)]


@pytest.fixture
def tokenizer(tmp_path):
  return save(tmp_path / "tokenizer", byte_level(), eos_token="<|endoftext|>",
              chat_template=(FIXTURES / "chatml.jinja").read_text())


def write(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


def prepare(out, path, tokenizer, stream=None):
  found = documents.find([str(path)], "messages")
  stream = stream or functools.partial(documents.read, found, field="text", separator="", kind="messages")
  return tokenize.prepare(out, stream, tokenize.hash_split(0, 0.2, 0), splits=["train", "val"],
                          recipe=dict(sources=documents.describe(found)), tokenizer=load_tokenizer(tokenizer),
                          conversations=True, shard_tokens=300, checkpoint_tokens=100)


def run(command, *arguments):
  process = Command(command, *arguments)
  out, err = process.communicate()
  return process.returncode, out, err


def test_a_command_makes_a_masked_dataset_of_conversations(tmp_path, tokenizer):
  path = write(tmp_path / "chats.jsonl", [{"messages": chat, "id": i} for i, chat in enumerate(CHATS)])
  code, _, err = run("prepare_data.py", f"--input={path}", "--format=messages", f"--tokenizer={tokenizer}",
                     "--val_fraction=0.2", "--test_fraction=0", f"--out={tmp_path}/out")
  assert code == 0, err
  verify(tmp_path / "out")
  read, found = load_tokenizer(tmp_path / "out"), []
  for split in ("train", "val"):
    data = TokenDataset(tmp_path / "out", split)
    ids, mask = data.read(0, data.tokens), data.read_mask(0, data.tokens)
    starts = data.document_starts.astype(int)
    assert (ids[starts - 1] == read.eos_id).all() and not mask[starts - 1].any()
    found += [read.decode(part) for part in np.split(ids, starts[1:])]
    answers = [read.decode(ids[run]) for run in np.split(np.flatnonzero(mask), np.flatnonzero(
        np.diff(np.flatnonzero(mask)) > 1) + 1)]
    assert len(answers) == 2 * data.documents and set(answers) <= {"it was " * i for i in range(1, 6)}
    assert (ids[mask] == 2).sum() == len(answers)
    assert data.bytes_per_token == sum(map(len, answers)) / mask.sum()
  assert sorted(found) == sorted("".join(f"{m['role']}\n{m['content']}\n" for m in chat) for chat in CHATS)
  assert read_manifest(tmp_path / "out")["version"] == 2


def test_an_interrupted_run_continues_to_the_same_masks(tmp_path, tokenizer):
  path = write(tmp_path / "chats.jsonl", [{"messages": chat} for chat in CHATS])
  prepare(tmp_path / "whole", path, tokenizer)

  def broken(skip):
    found = documents.find([str(path)], "messages")
    for i, document in enumerate(documents.read(found, skip, field="text", separator="", kind="messages")):
      yield document if i < 25 else interrupt()

  with pytest.raises(KeyboardInterrupt):
    prepare(tmp_path / "out", path, tokenizer, broken)
  assert prepare(tmp_path / "out", path, tokenizer)
  assert content(tmp_path / "out") == content(tmp_path / "whole")
  assert len([name for name in content(tmp_path / "out") if name.endswith(".mask")]) > 3


BAD = {
    "no messages": ({"text": "a"}, "chats.jsonl: line 1 has no list under 'messages'"),
    "no answer": ({"messages": CHATS[0][:1]}, "document 0: the conversation has no answer of the assistant to learn"),
    "empty": ({"messages": []}, "document 0: a conversation without messages"),
    "no role": ({"messages": [{"from": "user"}]}, r"document 0: messages\[0\]={'from': 'user'}: must be an object"),
    "no content": ({"messages": [{"role": "user"}]}, "document 0: the chat template failed: .*no attribute 'content'"),
}


@pytest.mark.parametrize("row, message", BAD.values(), ids=BAD)
def test_bad_conversations_are_refused_and_nothing_is_left(tmp_path, tokenizer, row, message):
  with pytest.raises(ValueError, match=message):
    prepare(tmp_path / "out", write(tmp_path / "chats.jsonl", [row]), tokenizer)
  assert sorted(path.name for path in tmp_path.iterdir()) == ["chats.jsonl", "tokenizer"]


@pytest.mark.parametrize("flags, message", [
    ([], "--format=messages: needs --tokenizer, a tokenizer.json with a chat template or its folder"),
    (["--tokenizer=bytes"], "tokenizer 'bytes' has no chat template: it must be a tokenizer.json with"),
    (["--tokenizer={tokenizer}", "--chat_template={tokenizer}/none"], "none: not readable as UTF-8"),
    (["--tokenizer={tokenizer}", "--chat_template={tokenizer}/bad"], "the chat template is not Jinja: line 1: ")])
def test_bad_flags_are_refused(tmp_path, tokenizer, flags, message):
  (tokenizer / "bad").write_text("{% for %}")
  path = write(tmp_path / "chats.jsonl", [{"messages": CHATS[0]}])
  code, _, err = run("prepare_data.py", f"--input={path}", "--format=messages", f"--out={tmp_path}/out",
                     *(flag.format(tokenizer=tokenizer) for flag in flags))
  assert code == 2 and message in err and "Traceback" not in err
  assert not list(tmp_path.glob("out*"))


def test_generation_answers_in_the_chat_template(tmp_path, tokenizer):
  config = tiny.config(tokenizer)
  config.model.vocab_size = 384
  save_model(tmp_path / "run", config, LanguageModel(config.model, rngs=nnx.Rngs(0)))
  code, out, err = run("generate.py", f"--workdir={tmp_path}/run", "--chat", "--prompt=was it?", "--tokens=8")
  assert code == 0, err
  prompt = len(load_tokenizer(tokenizer).encode("<|im_start|>user\nwas it?<|im_end|>\n<|im_start|>assistant\n"))
  assert f"\n{prompt} tokens read and 8 generated" in err and "was it?" not in out
