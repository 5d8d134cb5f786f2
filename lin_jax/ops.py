"""The recurrent ops in one place: `from lin_jax.ops import gla`.

Each op maps arrays of a whole sequence to `(output, final_state)` and has gradients. Each `*_step` advances the state
by one token, for decoding: `step(state, q, k, v, ...) -> (state, output)`. `explain` says which implementation an op
would run on given arrays, and why not the others. `Implementation` is the type of their names. `kernels/README.md`
lists every op with its formula and what each implementation supports.
"""

from kernels import delta_rule, explain, gla, linear_attention, selective_scan
from kernels.delta_rule import step as delta_rule_step
from kernels.dispatch import Implementation
from kernels.gla import step as gla_step
from kernels.linear_attention import step as linear_attention_step
from kernels.selective_scan.reference import step as selective_scan_step

__all__ = ["Implementation", "delta_rule", "delta_rule_step", "explain", "gla", "gla_step", "linear_attention",
           "linear_attention_step", "selective_scan", "selective_scan_step"]
