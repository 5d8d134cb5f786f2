"""Every mixer under the compiler's default flags, parallel against step by step, at the edges of its chunks."""

import pytest

from lin_jax import mixers
from tests import default_flags, differential


@pytest.mark.parametrize("name", mixers.MIXERS)
def test_a_mixer_equals_its_steps_under_default_flags(name):
  for result, errors in default_flags.run(differential.mixer_errors, name, 0).items():
    assert not {T: error for T, error in errors.items() if not error <= 2e-5}, result
