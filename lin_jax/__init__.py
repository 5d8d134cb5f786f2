"""Linear-attention language models in JAX: mixers, model, data, training, evaluation and generation.

Submodules are imported by name (`from lin_jax.model import LanguageModel`), so that importing the package costs
nothing and touches no device.
"""
