"""The commands that write, into which faults are injected, each with the least that it needs to run."""

import pathlib
import shutil

RECORDS = pathlib.Path(__file__).resolve().parents[1] / "results" / "kernels.jsonl"


def generate(inputs):
  """The words of a command that prints a text."""
  return ["generate.py", f"--workdir={inputs.run}", "--tokens=4"]


def copied(source, target):
  """The file or folder `target`, copied from `source` if it is not there."""
  if not target.exists():
    (shutil.copytree if source.is_dir() else shutil.copyfile)(source, target)
  return target


# By name: a function of the inputs and the place to write, which returns the command's words.
WRITERS = {
    "train": lambda i, out: i.train(out / "run"),
    "evaluate": lambda i, out: ["evaluate.py", f"--workdir={copied(i.run, out / 'run')}", "--batches=1"],
    "generate": lambda i, out: [*generate(i), f"--out={out}/sample.txt"],
    "generate_requests": lambda i, out: [*generate(i), f"--requests={i.requests}", "--rows=2",
                                         f"--out={out}/answers.jsonl"],
    "prepare_data": lambda i, out: i.prepare(out / "data"),
    "pack": lambda i, out: ["prepare_data.py", f"--pack={i.data}", f"--out={out}/packed"],
    "unpack": lambda i, out: ["prepare_data.py", f"--unpack={i.packed}", f"--out={out}/data"],
    "convert_to": lambda i, out: ["convert.py", f"--workdir={i.run}", f"--to={out}/hub"],
    "convert_from": lambda i, out: ["convert.py", f"--from={i.hub}", f"--workdir={out}/run"],
    "run_synthetic": lambda i, out: ["run_synthetic.py", "--task=mqar", "--mixer=linear_attention", "--width=16",
                                     "--steps=2", "--evaluate_every=1", "--batch_size=4", "--test_examples=4",
                                     "--examples=8", f"--out={out}/mqar.jsonl"],
    "run_language": lambda i, out: ["run_language.py", "--sweep=main", "--tiny", "--models=gla", "--steps=2",
                                    f"--data={i.data}", f"--workdir={out}/runs", f"--out={out}/language.jsonl"],
    "smoke_models": lambda i, out: ["smoke_models.py", "--tiny", "--families=gla_340m", "--batch_size=2", "--steps=3",
                                    "--timed_steps=1", "--sequence_length=32", f"--out={out}/smoke.json"],
    "bench_kernels": lambda i, out: ["bench_kernels.py", "--ops=gla", "--batch=1", "--length=16", "--heads=1",
                                     "--key=8", "--value=8", "--peers=none", "--implementations=reference",
                                     f"--out={out}/kernels.jsonl"],
    "bench_scaling": lambda i, out: ["bench_scaling.py", "--tiny", "--models=tnl_385m", "--meshes=context=1",
                                     "--length=16", "--batch=1", "--unroll=1", "--steps=2", "--timed_steps=1",
                                     f"--out={out}/scaling.jsonl"],
    "report_models": lambda i, out: ["report_models.py", f"--out={out}/models.md"],
    "report_scaling": lambda i, out: ["report_scaling.py", f"--out={out}/scaling.md"],
    "report_kernels": lambda i, out: ["report_kernels.py", f"--records={copied(RECORDS, out / 'kernels.jsonl')}"],
}
