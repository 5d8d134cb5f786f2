"""The page of models follows from the configs, its sizes are the papers', and its numbers follow from the layouts."""

import functools
import json
import pathlib

import pytest

from configs import CONFIGS, page, support

PAGE = pathlib.Path(__file__).resolve().parents[2] / "experiments/results/models.md"
# Configs whose count neither lies within 1% of the printed size nor rounds to it; the page says why.
OFF = {"retnet_340m"}


@pytest.fixture(scope="module", autouse=True)
def measured_once():
  """All pages have the same models, whose shapes take seconds to find."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(page, "measure", functools.cache(page.measure))
    yield


@pytest.fixture(scope="module")
def models():
  return {name: page.measure(name) for name in CONFIGS}


def test_the_page_is_current():
  assert PAGE.read_text() == page.render(PAGE.with_name(page.SMOKE)), "run experiments/report_models.py"


def test_every_config_is_on_the_page_with_its_command():
  text = PAGE.read_text()
  assert set(page.SIZES) == set(CONFIGS)
  for name in CONFIGS:
    assert f"`python experiments/train.py --config={name}`" in text


def test_sizes_are_those_of_the_papers(models):
  assert {name for name, model in models.items() if page.verdict(model) == "off"} == OFF
  assert all(models[name].size.note for name in OFF)
  peers = {name: model.peer_difference for name, model in models.items() if model.size.peer}
  assert len(peers) >= 10 and {name for name, off in peers.items() if abs(off) > 0.003} == set()


def test_released_models_have_every_parameter(models):
  released = {name: model for name, model in models.items() if model.size.released}
  assert sorted(released) == ["olmo_hybrid_7b", "qwen35_0b8", "qwen35_2b", "qwen35_4b", "qwen35_9b"]
  for name, model in released.items():
    assert model.parameters == model.size.released, name
    assert model.config.model.hybrid_layers == tuple(range(3, model.config.model.depth, 4))


def test_the_papers_vocabulary_counts(models):
  assert models["mamba_340m"].compared == models["mamba_340m"].parameters + (50280 - 32000) * 1024
  assert models["gla_340m"].compared == models["gla_340m"].parameters


@pytest.mark.parametrize(("count", "size", "same"), [
    (1_286e6, "1.3B", True), (1_349e6, "1.3B", True), (1_351e6, "1.3B", False), (347e6, "340M", False),
    (2.88e9, "3B", True)])
def test_rounding(count, size, same):
  assert page.rounds_to(count, size) == same


def test_state_of_each_kind(models):
  gla, transformer = models["gla_340m"], models["transformer_340m"]
  assert (gla.state, gla.growth, gla.window) == (24 * 4 * 128 * 256 * 4, 0, 0)
  # Keys and values in bfloat16 and an int32 position per token; one length per layer.
  assert transformer.growth == 24 * (2 * 1024 * 2 + 4) and transformer.state == 2048 * transformer.growth + 24 * 4
  assert transformer.window == 0
  window, globe = models["deltanet_swa_340m"], models["deltanet_global_340m"]
  assert (window.growth, window.window) == (transformer.growth // 2, 2048)
  assert (globe.growth, globe.window) == (transformer.growth // 12, 0)


def test_arithmetic_is_six_times_the_products(models):
  for name in ("gla_1b3", "deltanet_1b3", "mamba2_1b3"):
    # The embedding is also the head, so that every parameter but a few is in one product.
    assert models[name].flops == pytest.approx(6 * models[name].parameters, rel=0.06)


def test_a_config_without_a_size_is_refused(monkeypatch):
  monkeypatch.delitem(page.SIZES, "gla_340m")
  monkeypatch.setattr(page, "measure", page.measure.__wrapped__)
  with pytest.raises(ValueError, match="config 'gla_340m' has no entry in SIZES of experiments/configs/page.py"):
    page.render()


def record(**fields):
  return dict(family="gla_340m", parameters=341707776, device="NVIDIA H100", sequence_length=2048, batch_size=16,
              dtype="bfloat16", remat="dots", steps=30, timed_steps=15, data="drawn", versions={"jax": "0.11.2"},
              command="python x", reason="", loss_first=10.5, loss_last=7.25, tokens_per_s=150000.4, mfu=0.3171,
              step_ms=218.4, memory_gib=41.23, compile_s=31.0) | fields


def test_the_smoke_joins_the_page(tmp_path):
  path = tmp_path / page.SMOKE
  path.write_text(json.dumps([record(), record(family="other", reason="out of memory")]))
  text = page.render(path)
  assert "| `gla_340m` | 341,707,776 | 10.50 to 7.25 | 150,000 | 31.7% | 218 | 41.2 | 31 |" in text
  assert "| `other` | 341,707,776 | failed: out of memory |" in text
  assert "### NVIDIA H100\n\n16 sequences of 2,048 tokens (drawn), bfloat16, remat `dots`, 30 steps" in text
  assert "Training smoke" not in page.render(tmp_path / "none.json")


def test_foreign_records_are_refused(tmp_path):
  path = tmp_path / page.SMOKE
  path.write_text('[{"op": "gla"}]')
  with pytest.raises(ValueError, match="not the records of smoke_models.py"):
    page.render(path)


def test_a_family_shows_the_largest_config_with_a_record_of_a_gpu(tmp_path):
  record = {"device": "NVIDIA H200", "reason": "", "setting": {"name": "small"}}
  lines = [record, record | {"setting": {"name": "large"}, "reason": "out of memory"}, record | {
      "setting": {"name": "large", "tiny": True}}, record | {"setting": {"name": "large"}, "device": "cpu"}]
  path = tmp_path / "training.jsonl"
  path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
  configs = [("tiny", 1, None), ("small", 2, None), ("large", 3, None)]
  assert support.largest(configs, support.recorded(path)) == "`small`"
  assert support.largest(configs[:1], support.recorded(path)) == ""
