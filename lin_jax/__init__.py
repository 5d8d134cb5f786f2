"""Linear-attention language models in JAX: ops, mixers, model, data, training, evaluation and generation.

Submodules are imported by name (`from lin_jax.ops import gla`, `from lin_jax.model import LanguageModel`), so that
importing the package costs nothing and touches no device.
"""

import importlib.util
import pathlib


def _require_own_kernels():
  """Raises ImportError if another package, such as Hugging Face's, hides the `kernels` that comes with lin_jax."""
  found = importlib.util.find_spec("kernels")
  folders = [pathlib.Path(folder) for folder in (found and found.submodule_search_locations or ())]
  if not any((folder / "gla" / "reference.py").exists() for folder in folders):
    place = ", ".join(map(str, folders)) or "nothing"
    raise ImportError(f"lin_jax comes with a package named `kernels`, but `import kernels` finds {place}. Uninstall "
                      "the other package of that name (Hugging Face's `kernels`, for instance), or give lin_jax an "
                      "environment of its own.")


_require_own_kernels()
