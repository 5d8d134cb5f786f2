"""The page on long rows over many GPUs: what is compiled, what is predicted from it, and what has been measured."""

from collections.abc import Sequence

from configs import CONFIGS
from lin_jax.config import TrainConfig
from running.meshes import name_of, parse, size_of
from speed import compiled, prediction, scaling, training

LENGTH = 2**20
RECORDS = "training.jsonl", "multi_gpu_h200.jsonl", "scaling.jsonl", "scaling_equality.jsonl"
"""The files of the records that `render` takes after the compiled programs."""
_LARGE = "gla_1b3", "gated_deltanet_1b3", "tnl_7b"
PLANS = ((2, ("gla_1b3", "gated_deltanet_1b3", "tnl_385m"), ("context=2",)),
         (8, _LARGE, ("context=8", "fsdp=2,context=4", "data=2,context=4")),
         (64, _LARGE, ("context=64", "fsdp=4,context=16", "fsdp=8,context=8", "data=8,context=8")))
"""Numbers of GPUs, the models for them, and their meshes. Each device on data and fsdp has a row of `LENGTH` tokens."""
CHECKS = (("gla_1b3", "data=1", "one8"), ("gla_1b3", "data=2", "data"), ("gla_1b3", "fsdp=2", "fsdp"),
          ("gated_deltanet_1b3", "fsdp=2", "fsdp"))
"""Steps of 8 rows of 2,048 tokens per GPU whose memory was measured: model, mesh, and the mesh's name in the record."""
LIMIT = 75
"""GiB of an H100's 79 that a program may take, with XLA_PYTHON_CLIENT_MEM_FRACTION=0.95."""
_HEAD = ("mesh", "rows", "each on one host", "tokens per GPU", "state, GiB", "temporary, GiB", "all, GiB", "fits",
         "PFLOP per GPU", "GB sent in the host", "GB sent between hosts", "compute, s", "NVLink, s", "InfiniBand, s",
         "step, s", "if all overlaps, s", "tokens/s per GPU")
_HEAD_BEST = "model", "GPUs", "fastest mesh that fits", "rows", "GiB per GPU", "step, s", "tokens/s per GPU"
_HEAD_CHECK = "model", "mesh", "rows x tokens", "compiled without a GPU, GiB", "on H200s, GiB", "difference"
_MEASURED = ("model", "mesh", "rows x tokens", "remat", "tokens/s", "per GPU", "of one GPU", "GiB per GPU",
             "loss differs, first step", "at most")
_EQUAL = "model", "mesh", "rows x tokens", "loss", "one GPU's", "largest error", "one GPU's error", "within twice that"


def runs() -> list[tuple[tuple[TrainConfig, int], dict]]:
  """Returns the programs to compile, as pairs of a config with its number of GPUs and a setting."""
  meshes = [(name, parse(mesh)) for _, models, meshes in PLANS for name in models for mesh in meshes]
  checks = [(name, parse(mesh)) for name, mesh, _ in CHECKS]
  return ([_run(name, mesh, mesh.data * mesh.fsdp, LENGTH, "full") for name, mesh in meshes]
          + [_run(name, mesh, 8 * size_of(mesh), 2048, "dots") for name, mesh in checks])


def _run(name, mesh, rows, length, remat):
  devices = size_of(mesh)
  size = scaling.Size(0, rows, steps=20, timed=12, remat=remat, unroll=1, tiny=False)
  config = scaling.configured(CONFIGS[name], mesh, size, rows, length)
  return (config, devices), {"name": name, "mesh": name_of(mesh), "devices": devices,
                             **training.description(config)}


def line(row: dict) -> str:
  return (f"{row['setting']['mesh']:<18} {row['memory_gib']:.1f} GiB per GPU, {len(row['collectives'])} kinds of "
          f"collectives, compiled in {row['compile_s']:.0f} s")


FIELDS = "memory_gib", "state_gib", "temporary_gib", "compile_s", "collectives"


def render(programs: Sequence[dict], steps: Sequence[dict], memory: Sequence[dict], measured: Sequence[dict],
           equal: Sequence[dict]) -> str:
  """Returns the page.

  Args:
    programs: records of compiled steps; of equal settings the last counts.
    steps: records of `bench_training.py`, for the fraction of the peak.
    memory: records of steps on one and two H200s, for the memory of `CHECKS`.
    measured, equal: records of `bench_scaling.py`, the latter with --check.
  """
  found = {(row["setting"]["name"], row["setting"]["mesh"]): row for row in programs if not row["reason"]}
  best, tables = [], []
  for devices, models, meshes in PLANS:
    for name in models:
      rows = [found[name, mesh] for mesh in meshes if (name, mesh) in found]
      if not rows:
        continue
      pairs = [(row, prediction.predict(row, prediction.fraction_of_peak(name, steps))) for row in rows]
      best.append(_best(name, devices, pairs))
      tables += [f"### `{name}` on {devices} GPUs", _table(_HEAD, [_line(*pair) for pair in pairs])]
  parts = [_INTRODUCTION, _table(_HEAD_BEST, best), _FINDINGS, "## Compiled and predicted", *tables, _METHOD,
           _table(_HEAD_CHECK, _checked(found, memory)), "## Measured", _results(measured, equal), _MEASURED_ONCE,
           _COMMANDS]
  return "\n\n".join(parts) + "\n"


def _best(name, devices, pairs):
  fitting = [pair for pair in pairs if pair[0]["memory_gib"] <= LIMIT]
  if not fitting:
    least = min(row["memory_gib"] for row, _ in pairs)
    return [f"`{name}`", devices, "none", "", f"at least {least:.0f}", "", ""]
  row, step = max(fitting, key=lambda pair: _speed(*pair))
  return [f"`{name}`", devices, f"`{row['setting']['mesh']}`", row["setting"]["batch_size"], f"{row['memory_gib']:.0f}",
          f"{step.serial:.2f}", f"{_speed(row, step):,.0f}"]


def _on_hosts(setting):
  """Whether each row lies on the GPUs of one host."""
  mesh = parse(setting["mesh"])
  return mesh.data * mesh.fsdp % max(1, setting["devices"] // compiled.HOST) == 0


def _speed(row, step):
  """Tokens per second and GPU, if nothing overlaps."""
  return row["setting"]["batch_size"] * LENGTH / row["setting"]["devices"] / step.serial


def _line(row, step):
  setting = row["setting"]
  sent = lambda seconds, rate: f"{seconds * rate / 1e9:.2f}"
  return [f"`{setting['mesh']}`", setting["batch_size"], "yes" if _on_hosts(setting) else "**no**",
          f"{setting['batch_size'] * LENGTH // setting['devices']:,}",
          f"{row['state_gib']:.1f}", f"{row['temporary_gib']:.1f}", f"{row['memory_gib']:.1f}",
          "yes" if row["memory_gib"] <= LIMIT else "**no**", f"{(step.flops + step.context_flops) / 1e15:.2f}",
          sent(step.inside, prediction.NVLINK), sent(step.between, prediction.INFINIBAND), f"{step.compute:.2f}",
          f"{step.inside:.3f}", f"{step.between:.3f}", f"{step.serial:.2f}", f"{step.overlapped:.2f}",
          f"{_speed(row, step):,.0f}"]


def _checked(found, memory):
  """The memory of steps that were compiled without a GPU beside the memory that they took."""
  for name, mesh, recorded in CHECKS:
    row = found.get((name, name_of(parse(mesh))))
    took = next((x["step_gib"] for x in memory if (x["config"], x["mesh"]) == (name, recorded)), None)
    if row and took:
      yield (f"`{name}`", f"`{row['setting']['mesh']}`", _shape(row["setting"]), f"{row['memory_gib']:.1f}",
             f"{took:.1f}", f"{row['memory_gib'] - took:+.1f}")


def _results(measured, equal):
  several = [row for row in measured if not row["reason"] and row["setting"]["devices"] > 1]
  if not several and not equal:
    return "Nothing of this has been measured yet."
  parts = []
  if several:
    parts += [f"{several[0]['device']}, {several[0]['setting']['host_devices']} of one host.",
              _table(_MEASURED, map(_measured, several))]
  too_large = [f"- `{row['setting']['name']}` on {row['setting']['mesh']} with {row['setting']['batch_size']} x "
               f"{row['setting']['sequence_length']:,} tokens: {row['reason']}" for row in measured if row["reason"]]
  parts += ["\n".join(too_large)] if too_large else []
  if equal:
    parts += ["Loss and gradients of one batch. Errors are the largest of all groups of parameters, relative to the "
              "gradients of one GPU in float32.", _table(_EQUAL, map(_equal, equal))]
  return "\n\n".join(parts)


def _measured(row):
  setting, shown = row["setting"], lambda x, form: "" if x is None else format(x, form)
  return [f"`{setting['name']}`", f"`{setting['mesh']}`", _shape(setting), setting["remat"],
          f"{row['tokens_per_s']:,.0f}", f"{row['tokens_per_s_per_device']:,.0f}", shown(row["fraction"], ".3f"),
          f"{row['memory_gib']:.1f}", shown(row["first_loss_difference"], ".0e"),
          shown(row["largest_loss_difference"], ".0e")]


def _equal(row):
  return [f"`{row['setting']['name']}`", f"`{row['setting']['mesh']}`", _shape(row["setting"]), f"{row['loss']:.5f}",
          f"{row['loss_one_device']:.5f}", f"{row['largest_error']:.1e}", f"{row['largest_error_one_device']:.1e}",
          "yes" if row["within_bounds"] else "**no**"]


def _shape(setting):
  return f"{setting['batch_size']} x {setting['sequence_length']:,}"


def _table(head, lines):
  rows = [head, ["---"] * len(head), *lines]
  return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


_INTRODUCTION = f"""# Rows of a million tokens on many GPUs

A training step on rows of {LENGTH:,} tokens, compiled for 2, 8 and 64 H100s, with the time that it should take. No
such machine has run it. The mesh axis `context` splits each row over GPUs, and every row is whole on one group of them
([`kernels/README.md`](../../kernels/README.md)). Meshes with `data` or `fsdp` take as many rows per step as these axes
have devices, so tokens per GPU differ from mesh to mesh. All layers run under a scan and keep only their inputs (remat
`full`)."""
_FINDINGS = """\
- **Within a host the links hardly count.** With `context=8` the step of `gla_1b3` sends 6.3 GB per GPU, worth 14 ms of
  2.9 s. About 1 GB of this are states, and the rest are sums of gradients. Meshes of one host differ by less than 1%,
  which says nothing, so the number of rows and the memory decide between them.
- **Between hosts, each row belongs on the GPUs of one host.** `data=8,context=8` and `fsdp=8,context=8` spend 4% to 5%
  of a step of the models of 1.3B on InfiniBand if nothing overlaps. One row on 64 GPUs spends about half of it there,
  because a GPU has only 16,384 tokens to hide the sum of all gradients behind.
- Of the meshes whose rows lie on several hosts, none is the fastest.
- **Rows of this length of `tnl_7b` fit on no mesh of 8 GPUs.** Parameters are copied along `context`, and with AdamW's
  moments they take 76 GiB. On 64 GPUs `fsdp=8,context=8` fits, and `data=8,context=8` does not.
- **On two GPUs only `tnl_385m` has room for such a row.** The others exceed the 133 GiB that JAX can take of an H200,
  GLA by 5, which is less than the error of memory that is compiled without a GPU (see the last table). If temporary
  memory halves with the row, 524,288 tokens of GLA take 76 GiB and of Gated DeltaNet 109."""
_METHOD = f"""## How the numbers come about

**Compiled**, from XLA's program for one GPU of the mesh (`speed/compiled.py`), with the kernels that train. The devices
are a description of H100s in hosts of eight, so no GPU is needed: the three columns in GiB, and each collective with
its bytes, how often it runs and who takes part ([`scaling_compiled.jsonl`](scaling_compiled.jsonl)). "State" is
parameters and AdamW's two moments in float32, and the batch. A step fits if it needs at most {LIMIT} of the 79 GiB.
XLA's autotuning needs a GPU, so its choice of products and their workspace may differ. The last table of this section
compares the compiled memory with steps that ran.

**Predicted** (`speed/prediction.py`):

- Compute: FLOPs of the model for the tokens of a GPU, times 4/3 because remat `full` runs the forward pass twice, over
  {prediction.PEAK / 1e12:.0f} TFLOP/s times the fraction of this peak that the model's step reached on one H200 with
  2,048 tokens per row ([`training.jsonl`](training.jsonl), remat `dots`, layers unrolled). The time of elementwise
  work, of the optimizer and of the recurrent kernels is in this fraction. `tnl_7b` has the fraction of `tnl_385m`. The
  scan of layers cost GLA a tenth of its speed, which is not in the fraction.
- Work of split rows alone is added: `2 K V` FLOPs per token and head for each part's update, and for the delta rule K
  more columns of its scan.
- Links: a GPU sends {prediction.NVLINK / 1e9:.0f} GB/s to GPUs of its host and {prediction.INFINIBAND / 1e9:.0f} GB/s
  to other hosts. A group with GPUs of several hosts is counted as if all its bytes went between hosts. In a group of g,
  an all-gather or a reduce-scatter sends (g - 1) / g of the whole array, and an all-reduce twice that.
- The step is the sum of these times, as if nothing overlapped; the column after it has the largest of them. Small
  messages reach less than a link's rate: two H200s moved 42 to 117 GB/s in calls of 16 MiB
  ([training.md](training.md)).

**Memory compiled without a GPU beside memory on H200s.** The steps ran with older sources of the same models
([`multi_gpu_h200.jsonl`](multi_gpu_h200.jsonl)), and took what XLA's program said when it was compiled on the GPU. The
numbers without a GPU are 7 to 10 GiB larger, so a step that fits by them probably has room left. Whether this comes
from autotuning or from the newer sources has not been looked into."""
_MEASURED_ONCE = """\
- One step of `tnl_7b` needs 102.5 GiB on one GPU and 52.6 with `fsdp=2`, where the programs that are compiled without a
  GPU have 102.2 and 53.1 ([`scaling_checks.txt`](raw/scaling_checks.txt)). With one row of 2,048 tokens per GPU its
  links count: FSDP keeps 71% of one GPU's speed.
- **A part's sums of gates once took a time that is quadratic in its length.** XLA joined the zeros behind a reversed
  cumulative sum with the sum, but in large programs only. `tnl_385m` on a row of 1,048,576 tokens took 10.9 s per step
  on two GPUs, where 4.2 are predicted ([`quadratic_sums_h200.jsonl`](raw/quadratic_sums_h200.jsonl)), and `gla_1b3` on
  131,072 did no step in 90 s. The zeros now follow the sum, and the compiled programs have no such sum
  ([`scaling_checks.txt`](raw/scaling_checks.txt)). No GPU has timed them since.
- With `tensor=2` the first gradient of `gla_1b3` differs from one GPU's by 6.7%, while both differ from float32 by 9.6
  to 10%. So this is the rounding of bfloat16 and no error of the mesh.
- A checkpoint of `gla_340m` that one GPU saved at SIGTERM gives the same loss on two (6.7134, `--mesh=fsdp=2`), and the
  same greedy text ([`sharded_checkpoint_h200.json`](raw/sharded_checkpoint_h200.json)). The run ended 84 s after the
  signal: its checkpoint has 4 GB, and 30 other processes ran."""
_COMMANDS = """## Commands

    python experiments/report_scaling.py --compile       # adds missing programs, with JAX's CUDA plugin, without a GPU
    python experiments/report_scaling.py                 # this page
    python experiments/bench_scaling.py --meshes=context=2 --global_batch=1 --length=131072 --remat=full --unroll=1 \\
        --steps=3 --timed_steps=2 --out=experiments/results/scaling.jsonl
    python experiments/bench_scaling.py --check --meshes=context=2 --global_batch=1 --length=65536 --remat=full \\
        --unroll=1 --out=experiments/results/scaling_equality.jsonl"""
