"""Records of language models that were not trained."""

import dataclasses

from language.runs import TOKENS_PER_STEP, Run


def modelled(run: Run, bits_per_byte: float | None) -> dict:
  """The record of a run, which diverged if its loss is None."""
  setting = {"name": run.model, "seed": run.seed, "optim": {"steps": run.steps, "learning_rate": run.learning_rate},
             "data": {"sequence_length": run.sequence_length, "batch_size": TOKENS_PER_STEP // run.sequence_length}}
  return {"model": run.model, "learning_rate": run.learning_rate, "seed": run.seed, "parameters": 42_000_000,
          "tokens": 1, "epochs": 1, "diverged": bits_per_byte is None, "bits_per_byte": bits_per_byte,
          "held_out_loss": bits_per_byte, "tokens_per_second": 1.0, "device": "X", "setting": setting}


def branched(run: Run, steps: int, bits_per_byte: float | None, seed: int = 0) -> dict:
  """The record of a branch of `steps` at the run's rate, whose loss on test is that on val, and half of it on code."""
  branch = dataclasses.replace(run, steps=steps, decay_steps=steps // 5, seed=seed)
  losses = {split: {"bits_per_byte": bits_per_byte and bits_per_byte / scale}
            for split, scale in (("test", 1), ("test_english", 1), ("test_code", 2))}
  return modelled(branch, bits_per_byte) | {"tokens": steps * TOKENS_PER_STEP, "losses": losses}
