"""The page on rows of a million tokens: collectives read off a program, the predicted time, the page as committed."""

import pathlib

import pytest

from configs import CONFIGS
from lin_jax import flops
from lin_jax.config import to_dict
from running import records
from speed import plan, prediction
from speed.collectives import Collective, collectives

RESULTS = pathlib.Path(__file__).resolve().parents[2] / "experiments/results"
PROGRAM = """HloModule jit_train_step
%inner (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %gather = ((f32[1,8,4]{2,1,0}), f32[8,8,4]{2,1,0}) all-gather-start(%x), \
replica_groups=mesh['data'=1,'fsdp'=8,'context'=8,'tensor'=1] {'context'}, dimensions={0}
}
%outer (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %while.1 = (s32[], f32[4]{0}) while(%t), condition=%c, body=%inner, backend_config={"known_trip_count":{"n":"3"}}
  %scatter = bf16[16]{0} reduce-scatter(%y), replica_groups=[8,8]<=[8,8]T(1,0), dimensions={0}, to_apply=%add
}
%add (a: f32[], b: f32[]) -> f32[] {
  %sum = f32[] add(%a, %b)
}
ENTRY %main (p: f32[4]) -> f32[4] {
  %while.2 = (s32[], f32[4]{0}) while(%t), condition=%c, body=%outer, backend_config={"known_trip_count":{"n":"5"}}
  %sum.1 = (f32[100]{0}, s32[7]{0}) all-reduce(%u, %v), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %next = f32[6]{0} collective-permute(%w), source_target_pairs={{0,1},{7,8}}
}
"""


def test_collectives_are_counted_as_often_as_their_loops_run():
  assert set(collectives(PROGRAM)) == {
      Collective("all-gather", 15, 8 * 8 * 4 * 4, 8, False),
      Collective("reduce-scatter", 5, 16 * 2 * 8, 8, True),
      Collective("all-reduce", 1, 4 * 100 + 4 * 7, 4, False),
      Collective("collective-permute", 1, 24, 2, True)}


def test_a_loop_of_unknown_length_is_refused():
  with pytest.raises(ValueError, match="loop of unknown length has the collective"):
    collectives(PROGRAM.replace('"known_trip_count":{"n":"3"}', ""))


@pytest.mark.parametrize("name, extra", [("gla_1b3", 24 * 4 * 2 * 256 * 512),
                                         ("gated_deltanet_1b3", 21 * 6 * 6 * 256 * 256)])
def test_the_time_of_a_step_by_hand(name, extra):
  config = CONFIGS[name]()
  setting = {"mesh": "context=8", "devices": 8, "batch_size": 1, "sequence_length": 8000, "remat": "full",
             "model": to_dict(config)["model"]}
  kinds = (("all-gather", 2, 8e6, 8, False), ("all-reduce", 1, 4e6, 8, True), ("collective-permute", 3, 1e6, 2, False))
  moved = [dict(zip(("kind", "times", "bytes", "group", "crosses_hosts"), kind, strict=True)) for kind in kinds]
  step = prediction.predict({"setting": setting, "collectives": moved}, 0.5)
  work = flops.training_flops_per_token(config.model, 8000) * 4 / 3
  assert step.flops == pytest.approx(1000 * work) and step.context_flops == pytest.approx(1000 * 4 * extra)
  assert step.compute == pytest.approx(1000 * (work + 4 * extra) / (0.5 * 989e12))
  assert step.inside == pytest.approx((14e6 + 3e6) / 450e9) and step.between == pytest.approx(7e6 / 50e9)
  assert step.serial == pytest.approx(step.compute + step.inside + step.between)


def test_a_model_without_a_measured_step_is_named():
  with pytest.raises(ValueError, match="no record of tnl_385m with remat dots"):
    prediction.fraction_of_peak("tnl_7b", [])


def test_the_page_is_current_and_has_every_mesh():
  found = [records.load(RESULTS / name) if (RESULTS / name).exists() else []
           for name in ("scaling_compiled.jsonl", *plan.RECORDS)]
  assert (RESULTS / "scaling.md").read_text() == plan.render(*found), "run experiments/report_scaling.py"
  compiled_programs = {(row["setting"]["name"], row["setting"]["mesh"]) for row in found[0] if not row["reason"]}
  planned = {(name, mesh) for _, models, meshes in plan.PLANS for name in models for mesh in meshes}
  assert planned < compiled_programs and len(compiled_programs - planned) == len(plan.CHECKS)
