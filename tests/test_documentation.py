"""Pages name files that exist, the map names every module once, and the Python of the front page runs."""

import inspect
import pathlib
import re

import pytest
from flax import nnx

from lin_jax import checkpoint, ops, tokenizer
from lin_jax.mixers import MIXERS
from lin_jax.model import LanguageModel
from tests.lin_jax import tiny

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGES = ("kernels", "lin_jax", "experiments")


def mapped_paths():
  """The paths of the map's table; a row in bold opens the folder to which the rows below it are relative."""
  table = (ROOT / "WORKSPACE.md").read_text().split("## Map")[1].split("\n## ")[0]
  folder = ""
  for cell in re.findall(r"^\| *(.+?) *\|", table, flags=re.MULTILINE):
    names = re.findall(r"`([^`]+)`", cell)
    if cell.startswith("**"):
      folder, = names
    yield from (name if cell.startswith("**") else folder + name for name in names)


def test_map_names_what_exists_once():
  paths = list(mapped_paths())
  assert {f"{package}/" for package in PACKAGES} <= set(paths)
  assert [path for path in paths if not (ROOT / path).exists()] == []
  assert sorted(paths) == sorted(set(paths))


@pytest.mark.parametrize("package", PACKAGES)
def test_map_names_every_module(package):
  paths = set(mapped_paths())
  folders = tuple(path for path in paths if path.endswith("/") and path != f"{package}/")
  modules = [path.relative_to(ROOT).as_posix() for path in (ROOT / package).rglob("*.py") if path.read_text().strip()]
  assert modules
  assert [path for path in modules if path not in paths and not path.startswith(folders)] == []


@pytest.mark.parametrize("page", ["README.md", "WORKSPACE.md"])
def test_named_files_exist(page):
  text = (ROOT / page).read_text()
  named = set(re.findall(rf"(?<![\w./-])(?:{'|'.join(PACKAGES)}|tests)/[\w./-]*[\w/]", text))
  named |= set(re.findall(r"`([\w-]+\.(?:md|toml|txt))`", text))
  assert named
  assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


def python_blocks(page):
  return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)


def test_the_front_page_is_short_and_its_picture_exists():
  text = (ROOT / "README.md").read_text()
  assert len(text.splitlines()) <= 100
  assert all((ROOT / path).exists() for path in re.findall(r"\]\((?!http)([^)#]+)", text))


def test_the_front_page_counts_claims_as_their_page_does():
  counted, = re.findall(r"^Of (.*) are undecided", (ROOT / "experiments/results/README.md").read_text(), re.MULTILINE)
  front = re.search(r"of \d+ claims,.*", (ROOT / "README.md").read_text())[0]
  assert re.findall(r"\d+", counted) == re.findall(r"\d+", front)


def test_the_front_page_calls_an_op():
  call, _ = python_blocks("README.md")
  names = {}
  exec(compile(call, "README.md", "exec"), names)  # the page's own text
  assert names["output"].shape == (1, 2048, 4, 64) and names["state"].shape == (1, 4, 64, 64)
  assert all(float(abs(names[name]).max()) > 0 for name in ("dq", "dk", "dv"))


def test_the_front_page_generates(tmp_path, monkeypatch, capsys):
  _, load = python_blocks("README.md")
  config = tiny.config("bytes")
  config.model.vocab_size = tokenizer.ByteTokenizer().vocab_size
  checkpoint.save_model(tmp_path / "runs" / "gla_tiny", config, LanguageModel(config.model, rngs=nnx.Rngs(0)))
  monkeypatch.chdir(tmp_path)
  names = {}
  exec(compile(load, "README.md", "exec"), names)
  assert names["tokens"].shape == (1, 100) and capsys.readouterr().out.strip()


def test_the_page_of_ops_has_every_signature_and_mixer():
  text = (ROOT / "kernels" / "README.md").read_text()
  for op in ops.__all__:
    if op == "Implementation":
      continue
    listed, = re.findall(rf"^    {op}\(([^)]*)\)", text, flags=re.MULTILINE)
    names = [word.split("=")[0] for word in re.split(r",\s*", listed) if word != "*"]
    wanted = [str(p) for p in inspect.signature(getattr(ops, op)).parameters]
    assert [name.lstrip("*") for name in names] == wanted, op
  assert [name for name in MIXERS if f"| `{name}` |" not in text] == []


@pytest.mark.parametrize("page", sorted(path.name for path in (ROOT / "experiments/results").glob("*.md")))
def test_results_pages_link_to_what_exists(page):
  folder = ROOT / "experiments/results"
  text = (folder / page).read_text()
  links = re.findall(r"\]\((?!https?://|#)([^)#]+)", text)
  links += re.findall(r"`((?:raw/)?[\w-]+\.(?:md|txt))`", text)  # named without a link
  missing = [link for link in links if not ((folder / link).exists() or (folder / "raw" / link).exists())]
  assert missing == []
