"""Our training steps stand beside other libraries' in one table, with wins, losses and failures."""

import pathlib

import pytest

from speed import packing, page

PAGE = pathlib.Path(__file__).resolve().parents[2] / "experiments/results/training.md"


def record(name, rate, library="lin_jax", run="2026-01-01", version="1", reason="", **setting):
  how = {"remat": "dots", "unroll": 0} if library == "lin_jax" else {"variant": "lean"}
  setting = {"library": library, "name": name, "tiny": False, "batch_size": 8, "sequence_length": 2048} | how | setting
  return {"device": "GPU", "versions": {library: version}, "setting": setting, "run": run, "reason": reason,
          "tokens_per_s": rate, "step_ms": 1.0, "memory_gib": 40.0, "first_step_s": None if reason else 12.0}


def test_the_table_has_wins_losses_and_failures():
  rows = [record("gla_1b3", 60000.0, unroll=1), record("gla_1b3", 70000.0), record("gla_1b3", 50000.0, "jla"),
          record("gla_1b3", 40000.0, "jla", variant="dots", layout="16 heads"), record("gla_1b3", 69000.0, "fla"),
          record("deltanet_1b3", 99000.0, version="0", run="2025-01-01"), record("deltanet_1b3", 50000.0),
          record("deltanet_1b3", 60000.0, "jla", layout="as ours") | {"kernels": 0},
          record("transformer_1b3", None, "jla", reason="TimeoutError: stopped after 240 s"),
          record("gla_1b3", 1.0, sequence_length=4096), record("gla_1b3", 9e9, tiny=True)]
  text = page.beside_peers(rows)
  assert "| `gla_1b3` | lin_jax | remat dots, unroll 0 | 70,000 | 1 | 40 | 12 |  |  |" in text
  assert "| `gla_1b3` | jla | lean | 50,000 | 1 | 40 | 12 | x1.40 | won |" in text
  assert "| `gla_1b3` | fla | lean | 69,000 | 1 | 40 | 12 | x1.01 | even |" in text
  assert "| `deltanet_1b3` | lin_jax | remat dots, unroll 0 | 50,000 |" in text  # the newest versions, not the fastest
  assert "| `deltanet_1b3` | jla | lean, without its kernels | 60,000 |" in text
  assert "| x0.83 | **lost** |" in text and "40,000" not in text and "99,000" not in text
  assert "Against fla: 0 of 1 won, 0 lost, ratios 1.01 to 1.01. Against jla: 1 of 2 won, 1 lost" in text
  assert "- `jla` has no result for `transformer_1b3`: TimeoutError: stopped after 240 s" in text


def test_only_records_of_one_command_are_compared():
  old, both, alone = ({"command": f"bench {name}"} for name in ("old", "both", "alone"))
  day = lambda rate, number, library="lin_jax", name="gla_1b3": record(name, rate, library, run=f"2026-01-0{number}")
  rows = [day(65000.0, 1) | old, day(60000.0, 1, "jla") | old, day(63000.0, 2) | both, day(60000.0, 2, "jla") | both,
          day(61000.0, 2, name="retnet_1b3") | both, day(99000.0, 3) | alone]
  text = page.beside_peers(rows)
  assert "63,000" in text and "x1.05" in text and "61,000" in text and "65,000" not in text and "99,000" not in text


def test_the_table_replaces_itself_and_needs_its_place():
  text = f"a\n{page.BEGIN}\nold\n{page.END}\n{page.BEGIN_PACKED}\nold\n{page.END}\nb"
  once = page.with_tables(text, [])
  assert once == page.with_tables(once, []) and once.startswith("a\n") and once.endswith("\nb") and "old" not in once
  with pytest.raises(ValueError, match="the page has no part between"):
    page.with_tables("a", [])
  assert page.BEGIN in PAGE.read_text() and page.BEGIN_PACKED in PAGE.read_text()


def test_packed_documents_stand_beside_windows_of_one():
  one, packed = ({"documents": how} for how in packing.DOCUMENTS.values())
  rows = [record("gla_1b3", 60000.0, **one), record("gla_1b3", 59000.0, **packed),
          record("gla_1b3", 65000.0, remat="none", **one), record("gla_1b3", 58000.0, remat="none", **packed),
          record("gla_1b3", 90000.0, version="0", run="2025-01-01", **one),
          record("gla_1b3", 90000.0, version="0", run="2025-01-01", **packed),
          record("retnet_1b3", 60000.0, **one), record("retnet_1b3", 50000.0, **packed),
          record("deltanet_1b3", 60000.0, **one), record("gla_1b3", 99000.0, "jla", **one)]
  text = page.with_documents(rows)
  assert "| `gla_1b3` | remat dots, unroll 0 | 60,000 | 59,000 | x0.983 | yes | 40.0 | 40.0 |" in text
  assert "| `retnet_1b3` | remat dots, unroll 0 | 60,000 | 50,000 | x0.833 | **no** |" in text
  assert "deltanet" not in text and "90,000" not in text
  assert "59,000" not in page.beside_peers(rows)
