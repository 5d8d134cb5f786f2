"""The environment of commands that tests start: one device, as most users have, and little compiling."""

import atexit
import os
import shutil
import tempfile

# Tests compile far more than they compute, so the compiler's optimisations cost more than they save. XLA's new emitters
# of fusions would take more than half of the CPU time that is left in tests, which compile many programs and run each a
# few times. `tests/default_flags.py` has none of these flags, as users have not.
QUICK_COMPILATION = " ".join([
    "--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"])
# Options of `jax.jit` that bring the new emitters back to one program. With the old ones every step of a loop copies
# the array into which it writes its result, so that a scan over 2,000 tokens takes half a minute.
LONG_LOOPS = {"xla_backend_extra_options": ""}

# Commands compile the same programs again and again. Each worker has a folder, because JAX writes entries in place.
_CACHE = tempfile.mkdtemp(prefix="lin_jax_xla")
atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)

ENVIRONMENT = os.environ | {
    "XLA_FLAGS": QUICK_COMPILATION,
    "JAX_COMPILATION_CACHE_DIR": _CACHE, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}

if __name__ == "__main__":
  print(QUICK_COMPILATION)
