"""Lines of requests and of prompts, as `generate.py` reads them, and the texts of the answers."""

import io

import pytest

from lin_jax.chat import ChatTemplate
from lin_jax.serving import Progress
from lin_jax.tokenizer import ByteTokenizer, load_tokenizer
from serving import answers, requests
from tests.lin_jax.fast_tokenizers import byte_level, save

DEFAULTS = requests.TextRequest("", 9, 0.5, 3, 0.9, 7)


class Echo:
  """A server of one row that answers a prompt with the prompt, two ids at a time."""

  rows, row_bytes, total_bytes = 1, (1000, 24), 2048

  def __init__(self):
    self.waiting, self.submitted, self.cancelled = [], [], []

  def check(self, request):
    if len(request.prompt) > 30:
      raise ValueError("a prompt of too many")

  def submit(self, request):
    self.check(request)
    self.waiting.append((len(self.submitted), request))
    self.submitted.append(request)
    return len(self.submitted) - 1

  def cancel(self, number):
    self.cancelled.append(number)

  def warm_up(self, lengths):
    self.warm = list(lengths)

  def finish(self):
    while self.waiting:
      number, request = self.waiting.pop(0)
      ids = request.prompt[:request.max_tokens]
      for i in range(0, len(ids), 2):
        if number not in self.cancelled:
          yield Progress(number, ids[i:i + 2], "length" if i + 2 >= len(ids) else "")


def load(tmp_path, *lines):
  (tmp_path / "file").write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines))
  return requests.load(tmp_path / "file", DEFAULTS, Echo(), ByteTokenizer())


def test_a_line_has_what_it_says_and_otherwise_the_flags(tmp_path):
  (first, ids), (second, other) = load(
      tmp_path, '{"prompt": "", "seed": 4, "stop": "."}', "",
      ' {"prompt": "\u2028é", "id": "b", "max_tokens": 2, "temperature": 0, "top_k": 1, "top_p": 1}\r')
  assert (first.id, first.stop, second.id, second.stop) == (1, (".",), "b", ())
  assert (ids.prompt, ids.max_tokens, ids.seed, ids.stop) == ([256], 9, 4, (256,))
  assert (ids.sampling.temperature, ids.sampling.top_k, ids.sampling.top_p, ids.sampling.vocab_size) == (.5, 3, .9, 257)
  assert bytes(other.prompt).decode() == "\u2028é" and (other.max_tokens, other.seed) == (2, 7)
  assert (other.sampling.temperature, other.sampling.top_k, other.sampling.top_p) == (0, 1, 1)


def test_prompts_become_messages_of_a_user_in_a_chat(tmp_path, capsys):
  folder = save(tmp_path / "fast", byte_level(), eos_token="<|endoftext|>",
                chat_template="{% for m in messages %}{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}")
  tokenizer = load_tokenizer(folder)
  (tmp_path / "file").write_text('{"prompt": "it"}')
  asked = requests.load(tmp_path / "file", DEFAULTS, Echo(), tokenizer, ChatTemplate(tokenizer))
  (_, request), = asked
  assert request.prompt == tokenizer.encode("user it<|im_end|>") and request.stop == (0, 2)
  result, = answers.answer(Echo(), tokenizer, asked, answers.Counts(), ChatTemplate(tokenizer))
  assert result["text"] == "user it"
  answers.converse(Echo(), tokenizer, DEFAULTS, io.BytesIO(b"was"), answers.Counts(), ChatTemplate(tokenizer))
  assert capsys.readouterr().out == "user was\n"


@pytest.mark.parametrize("line, message", [
    ("{", "'{': not JSON"),
    ("[1]", r"\[1\]: must be an object with a prompt"),
    ('{"id": 3}', "{'id': 3}: must be an object with a prompt"),
    ('{"prompt": 3}', "prompt=3: must be a text"),
    ('{"prompt": "a", "tokens": 3}', "no field 'tokens'"),
    ('{"prompt": "a", "seed": 1.5}', "seed=1.5: must be a whole number"),
    ('{"prompt": "a", "temperature": -1}', "temperature=-1: must be finite and not negative"),
    ('{"prompt": "a", "stop": ["b", ""]}', r"stop=\['b', ''\]: must be a text or a list of texts"),
    ('{"prompt": "a", "id": null}', "id=None: must be a text or a whole number"),
    ('{"prompt": "a", "id": 1}', "id=1: an earlier line has it too"),
    ('{"prompt": "\\ud800"}', "no UTF-8 text has surrogates"),
    ('{"prompt": "%s"}' % ("x" * 31), "a prompt of too many"),
])
def test_a_bad_line_is_named(tmp_path, line, message):
  with pytest.raises(ValueError, match=f"file: line 2: .*{message}"):
    load(tmp_path, '{"prompt": "a"}', line)


def test_files_without_requests_or_of_another_encoding_are_refused(tmp_path):
  with pytest.raises(ValueError, match="file: must hold at least one request"):
    load(tmp_path, "", " ")
  with pytest.raises(ValueError, match="file: must be UTF-8"):
    load(tmp_path, b"\xff")


def test_answers_end_before_their_stop_texts(tmp_path):
  server, counts = Echo(), answers.Counts()
  asked = load(tmp_path, '{"prompt": "abcdefgh", "stop": ["x", "ef", "de"]}', '{"prompt": "éabc", "max_tokens": 4}',
               '{"prompt": "abc", "stop": "ca"}')
  assert list(answers.answer(server, ByteTokenizer(), asked, counts)) == [
      {"id": 1, "text": "abc", "tokens": 6, "ended": "stop"},
      {"id": 2, "text": "éab", "tokens": 4, "ended": "length"},
      {"id": 3, "text": "abc", "tokens": 3, "ended": "length"}]
  assert server.cancelled == [0] and server.warm == [8, 5, 3]
  assert (counts.read, counts.drawn) == (16, 13)
  assert "state of 1,024 bytes per row (1,000 recurrent, 24 in caches), 2,048 bytes in all" in counts.line(server)


def test_a_conversation_answers_every_line_it_can(capsys):
  counts = answers.Counts()
  lines = io.BytesIO(b"ab\xc3\xa9\r\n" + b"x" * 31 + b"\n\xff\nlast")
  answers.converse(Echo(), ByteTokenizer(), DEFAULTS, lines, counts)
  out, err = capsys.readouterr()
  assert out == "abé\nlast\n" and (counts.read, counts.drawn) == (8, 8)
  assert [line.split(":")[0] for line in err.splitlines()] == ["line 2", "line 3"]
