"""The environment of commands that tests start: one device, as most users have, and little compiling."""

import os

ENVIRONMENT = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"}
