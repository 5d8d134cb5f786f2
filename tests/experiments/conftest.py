"""Input that several tests of datasets read."""

import pytest

from tests.experiments.datasets import TEXTS


@pytest.fixture
def text_file(tmp_path):
  (tmp_path / "in").mkdir()
  path = tmp_path / "in" / "all.txt"
  path.write_text("\0".join(TEXTS))
  return path
