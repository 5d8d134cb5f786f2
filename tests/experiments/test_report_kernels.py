"""The kernels' page of known records, and the committed page, which must follow from the committed records."""

import dataclasses
import json
import subprocess
import sys

import pytest

from kernel_bench.cases import Case, named
from kernel_bench.page import draw, render
from kernel_bench.records import Records, aims
from tests.forked import ROOT, Command

COMMITTED = ROOT / "experiments/results/kernels.jsonl"
DEVICE = "NVIDIA H100 80GB HBM3"


def record(case, implementation, label, ms, **changes):
  return {"device": DEVICE, "platform": "gpu", "run": "2026-01-01T00:00:00+00:00", "command": "python bench",
          "implementation": implementation, "versions": {"jax": "0.11.2"}, "pass": label, **dataclasses.asdict(case),
          "ms": ms, "gb_per_s": 1000.0, "peak_mib": 64.0, "errors": {"output": 1e-3}, "within_bounds": True, **changes}


def records(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return Records(path)


def rows_of_grid():
  gla = Case("gla", "channel", 16, 2048, 16, 128, 128, "bfloat16")
  attention = dataclasses.replace(gla, op="attention", gate="none")
  refused = {"ms": None, "gb_per_s": None, "peak_mib": None, "reason": "RuntimeError: none here"}
  yield record(gla, "pallas_triton", "forward", 9.0)
  yield record(gla, "pallas_triton", "forward", 0.4)
  yield record(gla, "fla", "forward", 1.0, run="2025-01-01T00:00:00+00:00")
  yield record(gla, "jla", "forward", 0.2, within_bounds=False, errors={"output": 0.25})
  yield record(attention, "cudnn", "forward", 0.3)
  yield record(gla, "pallas_triton", "forward_backward", 3.0)
  yield record(gla, "fla", "forward_backward", None, **{k: v for k, v in refused.items() if k != "ms"})


def line(text, *starts):
  found = [row for row in text.splitlines() if all(start in row for start in starts)]
  assert len(found) == 1, (starts, found)
  return [cell.strip() for cell in found[0].strip("|").split("|")]


def test_page_says_what_is_won_lost_refused_and_wrong(tmp_path):
  text = render(records(tmp_path / "k.jsonl", rows_of_grid()))
  # The newest record counts; a wrong peer is shown and wins nothing.
  assert line(text, "| B16 T2048 H16 K128 V128 | forward |") == [
      "B16 T2048 H16 K128 V128", "forward", "0.400", "1.00*", "0.200 (off by 2e-01)", "0.300", "1000", "64", "x2.50",
      "", "x0.75", "lost to cudnn", "2026-01-01", "", "unknown"]
  assert line(text, "| forward_backward | 3.00 |")[3] == "cannot run"
  assert "`fla` cannot run B16 T2048 H16 K128 V128 forward_backward: RuntimeError: none here" in text
  assert "\\* measured in another run" in text
  assert line(text, "| `gla` | channel | forward | fla |")[4:6] == ["1 of 1", "0"]
  assert line(text, "| `gla` | channel | forward | cudnn |")[4:6] == ["0 of 1", "1"]
  assert not [row for row in text.splitlines() if row.startswith("| `gla` |") and "| jla |" in row]


@pytest.mark.parametrize("ms, verdict", [(0.38, "lost to fla"), (0.395, "even with fla"), (0.42, "won")])
def test_a_difference_within_the_noise_is_no_win(tmp_path, ms, verdict):
  case = Case("gla", "channel", 16, 2048, 16, 128, 128, "bfloat16")
  rows = [record(case, "pallas_triton", "forward", 0.4), record(case, "fla", "forward", ms)]
  text = render(records(tmp_path / "k.jsonl", rows))
  assert line(text, "| B16 T2048 H16 K128 V128 | forward | 0.400 |")[-4] == verdict


def test_page_says_of_which_sources_a_record_is(tmp_path):
  square = Case("gla", "channel", 16, 2048, 16, 128, 128, "bfloat16")
  described = {
      "aaa": {"date": "2026-01-01", "what": "1st.", "same_program_as_ships": ["gla channel"], "loop_start_differs": []},
      "bbb": {"date": "2026-01-02", "what": "2nd.", "same_program_as_ships": [], "loop_start_differs": ["gla channel"]},
      "ccc": {"date": "2026-01-03", "what": "3rd.", "same_program_as_ships": ["gla token"], "loop_start_differs": []}}
  (tmp_path / "kernel_sources.json").write_text(json.dumps(described))
  rows = [record(dataclasses.replace(square, B=B), "pallas_triton", "forward", 0.4, versions={"kernels": digest})
          for B, digest in ((1, "aaa"), (2, "bbb"), (4, "ccc"), (8, "ddd"))]
  text = render(records(tmp_path / "k.jsonl", rows))
  origins = [line(text, f"| B{B} T2048 H16 K128 V128 | forward |")[-3:] for B in (1, 2, 4, 8)]
  assert {date for date, *_ in origins} == {"2026-01-01"}  # when it was measured
  assert [rest for _, *rest in origins] == [
      ["`aaa`", "yes"], ["`bbb`", "no (loop starts)"], ["`ccc`", "no"], ["`ddd`", "unknown"]]
  assert line(text, "| `aaa` | 2026-01-01 |") == ["`aaa`", "2026-01-01", "gla channel: yes", "1st."]


def test_committed_records_are_of_described_sources():
  known = Records(COMMITTED).sources
  digests = [json.loads(text)["versions"].get("kernels") for text in COMMITTED.read_text().splitlines()]
  assert {digest for digest in digests if digest} == known.keys()


def test_aims_are_met_missed_or_not_measured(tmp_path):
  text = render(records(tmp_path / "k.jsonl", rows_of_grid()))
  shape = "| gla channel B16 T2048 H16 K128 V128 bfloat16"
  assert line(text, f"{shape} forward |")[1:] == ["<= 0.5 ms", "0.400 ms", "1.25", "yes"]
  assert line(text, f"{shape} forward_backward |")[1:] == ["<= 2 ms", "3.00 ms", "0.67", "**no**"]
  assert line(text, "| gla channel B16 T2048 H4 K256 V512 bfloat16 forward,")[2] == "not measured"
  assert "cpu" not in text and "float32 forward_backward" not in text


def test_aims_that_compare(tmp_path):
  wide = Case("gla", "channel", 16, 2048, 4, 256, 512, "bfloat16")
  rows = [record(wide, "pallas_triton", "forward", 0.5), record(wide, "fla", "forward", 1.5)]
  lengths = [case for case in named("length", ["linear_attention"]) if case.gate == "token"]
  rows += [record(case, "xla_chunked", "forward", 1.0 + 0.02 * (case.T == 1024)) for case in lengths]
  found = records(tmp_path / "k.jsonl", rows)
  values = {aim.text: (aim.value(found, DEVICE), aim) for aim in aims()}
  value, aim = values[f"{wide} forward, speed over FLA's"]
  assert value == 3.0 and aim.margin(value) == pytest.approx(1.2)
  value, aim = values["linear_attention token forward, slowest over fastest length, 1K to 128K"]
  assert value == pytest.approx(1.02) and aim.margin(value) > 1
  plot = draw(found, DEVICE, tmp_path)
  assert plot.read_bytes().startswith(b"\x89PNG") and plot.name in render(found)


def report(*arguments):
  """(exit code, stderr)"""
  process = Command("report_kernels.py", *arguments)
  _, err = process.communicate()
  return process.returncode, err


def test_check_tells_a_stale_page(tmp_path):
  path = tmp_path / "k.jsonl"
  records(path, rows_of_grid())
  written = subprocess.run([sys.executable, "experiments/report_kernels.py", f"--records={path}"], cwd=ROOT,
                           capture_output=True, text=True)
  assert written.returncode == 0, written.stderr
  assert report(f"--records={path}", "--check")[0] == 0
  path.write_text(path.read_text().replace("0.4,", "0.6,"))
  code, err = report(f"--records={path}", "--check")
  assert code == 1 and "run report_kernels.py" in err
  path.write_text("{}\n")
  code, err = report(f"--records={path}")
  assert code == 2 and "line 1: not a record" in err and "Traceback" not in err


def test_committed_page_is_that_of_the_committed_records():
  assert COMMITTED.with_suffix(".md").read_text() == render(Records(COMMITTED))
