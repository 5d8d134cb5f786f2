"""The environment of commands that tests start: one device, as most users have, and little compiling."""

import atexit
import os
import shutil
import tempfile

# Tests compile far more than they compute, so the compiler's optimisations cost more than they save.
UNOPTIMIZED = " ".join([
    "--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1"])
# XLA's new emitters of fusions take more than half of the CPU time that is left in tests, which compile many programs
# and run each a few times. The old ones make loops over tokens 20 times as slow, so the tests of long sequences, which
# the Makefile names, have the new ones. `tests/default_flags.py` has neither of these flags, as users have not.
QUICK_COMPILATION = f"{UNOPTIMIZED} --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"

# Commands compile the same programs again and again. Each worker has a folder, because JAX writes entries in place.
_CACHE = tempfile.mkdtemp(prefix="lin_jax_xla")
atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)

ENVIRONMENT = os.environ | {
    "XLA_FLAGS": QUICK_COMPILATION,
    "JAX_COMPILATION_CACHE_DIR": _CACHE, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}

if __name__ == "__main__":
  print(QUICK_COMPILATION)
