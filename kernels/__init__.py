"""Recurrent sequence-mixing ops: each has a definition, a chunked form for every device, and Pallas kernels for GPUs.

Each op returns `(output, final_state)` and picks an implementation by the inputs and the default backend; `explain`
says which. `rms_norm`, `short_convolution`, `skip_gate_norm` and `swiglu` are the work around them, with a definition
and with kernels. Importing this package starts no device.
"""

from kernels.delta_rule import delta_rule
from kernels.dispatch import explain
from kernels.gla import gla
from kernels.linear_attention import linear_attention
from kernels.rms_norm import rms_norm
from kernels.selective_scan import selective_scan
from kernels.short_convolution import short_convolution
from kernels.skip_gate_norm import skip_gate_norm
from kernels.swiglu import swiglu

__all__ = ["delta_rule", "explain", "gla", "linear_attention", "rms_norm", "selective_scan", "short_convolution",
           "skip_gate_norm", "swiglu"]
