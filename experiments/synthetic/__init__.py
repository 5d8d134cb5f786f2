"""Synthetic tasks by name: `TASKS["mqar"](sequence_length=512, pairs=64).draw(rng, count)` is a `Batch`.

A task is a frozen dataclass that is listed here. Its fields are its setting, and its constructor raises ValueError for
a setting that breaks the rules. Fields or properties say `vocab_size` and `sequence_length`. A task may also have:
  training          a field: True draws examples to train on, where they differ from those that the test scores
  train_examples    a field: how many different examples the protocol trains on
  decodes_last      a class attribute: the model answers every position from its last output, through a decoder
"""

from .batch import Batch
from .mad import Compression, FuzzyRecall, InContextRecall, Memorization, NoisyRecall, SelectiveCopying
from .mqar import MQAR
from .regbench import Regbench

__all__ = ["Batch", "TASKS"]

TASKS = {"mqar": MQAR, "in_context_recall": InContextRecall, "noisy_recall": NoisyRecall, "fuzzy_recall": FuzzyRecall,
         "selective_copying": SelectiveCopying, "compression": Compression, "memorization": Memorization,
         "regbench": Regbench}
