"""Parts of the mixers' formulas in numpy float64."""

import numpy as np


def wide(array):
  """A parameter, or another array, in float64."""
  return np.asarray(array[...], np.float64)


def weights(mixer, *names):
  """The kernels of the mixer's layers in float64, by name."""
  return {name: wide(getattr(mixer, name).kernel) for name in names}


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def silu(x):
  return x * sigmoid(x)


def unit(x):
  """x with an L2 norm of 1."""
  return x / np.sqrt((x**2).sum(axis=-1, keepdims=True) + 1e-6)


def rms_norm(x, eps=1e-6):
  return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps)


def convolve(x, kernel):
  """The causal convolution of each channel of x [B,T,C] with its taps [taps,C], of which the last meets the present."""
  padded = np.pad(x, ((0, 0), (len(kernel) - 1, 0), (0, 0)))
  return sum(tap * padded[:, i:i + x.shape[1]] for i, tap in enumerate(wide(kernel)))


def by_heads(x, *heads):
  """The channels of x [B,T,C] as those of heads."""
  return x.reshape(*x.shape[:2], *heads, -1)
