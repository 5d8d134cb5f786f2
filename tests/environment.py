"""The environment of commands that tests start: one device, as most users have, and little compiling."""

import atexit
import os
import shutil
import tempfile

# Commands compile the same programs again and again. Each worker has a folder, because JAX writes entries in place.
_CACHE = tempfile.mkdtemp(prefix="lin_jax_xla")
atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)

ENVIRONMENT = os.environ | {
    "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
    "JAX_COMPILATION_CACHE_DIR": _CACHE, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
