"""README.md and WORKSPACE.md name files that exist, and the map names every module once."""

import pathlib
import re

import pytest

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


@pytest.mark.parametrize("page", sorted(path.name for path in (ROOT / "experiments/results").glob("*.md")))
def test_results_pages_link_to_what_exists(page):
  folder = ROOT / "experiments/results"
  text = (folder / page).read_text()
  links = re.findall(r"\]\((?!https?://|#)([^)#]+)", text)
  links += re.findall(r"`((?:raw/)?[\w-]+\.(?:md|txt))`", text)  # named without a link
  missing = [link for link in links if not ((folder / link).exists() or (folder / "raw" / link).exists())]
  assert missing == []
