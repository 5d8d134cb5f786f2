"""The ops' recurrence and its derivative, token by token in NumPy and float64.

It shares no code with the ops, knows nothing of JAX, and compiles nothing: a scan of JAX took most of the time of the
tests that compare with it. `test_recurrence.py` holds its derivative, which is written by hand, to autodiff.
"""

import numpy as np


def results(arrays, segment_ids, cotangents, normalize_qk=False) -> dict:
  """Output, final state and gradients by name, for arrays and cotangents as in `tests.kernels.cases.Inputs`."""
  x = {name: np.asarray(a, np.float64) for name, a in arrays.items() if a is not None}
  shape = (*x["v"].shape[:3], x["q"].shape[3])
  spread = {name: _spread(name, a, shape) for name, a in x.items()}
  for name in ("q", "k") if normalize_qk else ():
    spread[name], x[f"norm of {name}"] = _normalized(spread[name])
  scale = shape[3]**-0.5
  spread["kept"] = _kept(segment_ids, shape)
  states, errors, output = _forward(spread)
  doutput, dstate = (np.array(a, np.float64) for a in cotangents)
  gradients = _backward(spread, states, errors, scale * doutput, dstate)
  for name in ("q", "k") if normalize_qk else ():
    d, y = gradients[name], spread[name]
    gradients[name] = (d - y * np.sum(y * d, axis=-1, keepdims=True)) / x[f"norm of {name}"]
  return {"output": scale * output, "final_state": states[-1]} | {
      f"d{name}": _folded(name, gradients[name], np.shape(a)) for name, a in arrays.items() if a is not None}


def _spread(name, x, shape):
  """`x` with a row per head instead of per key head, and a log_decay `[B, T, H, K]` whatever its form."""
  if name == "log_decay" and x.ndim < 4:
    return np.broadcast_to(x[..., None], shape)
  return np.repeat(x, shape[2] // x.shape[2], axis=2) if name in ("q", "k", "log_decay") else x


def _folded(name, gradient, shape):
  """The transpose of `_spread`: the sum over all that read the same number of an array of this shape."""
  if name == "log_decay" and len(shape) < 4:
    return gradient.sum(axis=3) if len(shape) == 3 else gradient.sum(axis=(0, 1, 3))
  if name in ("q", "k", "log_decay"):
    return gradient.reshape(*shape[:3], -1, shape[3]).sum(axis=3)
  return gradient


def _normalized(x):
  norm = np.sqrt(np.sum(x**2, axis=-1, keepdims=True) + 1e-6)
  return x / norm, norm


def _kept(segment_ids, shape):
  """1 where a token's segment has an earlier token, whose state it keeps, else 0: `[T, B, 1, 1, 1]`."""
  kept = np.ones(shape[:2])
  if segment_ids is not None:
    ids = np.asarray(segment_ids)
    kept[:, 1:] = ids[:, 1:] == ids[:, :-1]
  return kept.T[..., None, None, None]


def _forward(x):
  """States `[T + 1, B, H, K, V]` from the initial one on, values less what the state held of them, outputs `q S`."""
  (B, T, H, K), V = x["k"].shape, x["v"].shape[3]
  states, errors, output = np.zeros((T + 1, B, H, K, V)), np.array(x["v"]), np.zeros((B, T, H, V))
  states[0] = x.get("initial_state", 0.0)
  for t in range(T):
    k, decayed, written = x["k"][:, t], _decayed(x, t, states[t]), errors[:, t]
    if "beta" in x:
      errors[:, t] -= np.einsum("bhk,bhkv->bhv", k, decayed)
      written = x["beta"][:, t, :, None] * errors[:, t]
    states[t + 1] = decayed + k[..., None] * written[:, :, None]
    output[:, t] = np.einsum("bhk,bhkv->bhv", x["q"][:, t], states[t + 1])
  return states, errors, output


def _decayed(x, t, state):
  """What token t keeps of a state, or the transpose of that, which is the same."""
  kept = x["kept"][t] * state
  return np.exp(x["log_decay"][:, t])[..., None] * kept if "log_decay" in x else kept


def _backward(x, states, errors, doutput, dstate):
  """Gradients by name, of outputs `q S`. `dstate` is that of each state after a token, from the last one back."""
  found = {name: np.zeros(a.shape) for name, a in x.items()}
  for t in reversed(range(len(states) - 1)):
    k, error, do, decayed = x["k"][:, t], errors[:, t], doutput[:, t], _decayed(x, t, states[t])
    found["q"][:, t] = np.einsum("bhkv,bhv->bhk", states[t + 1], do)
    dstate = dstate + x["q"][:, t, :, :, None] * do[:, :, None]
    beta = x["beta"][:, t, :, None] if "beta" in x else 1.0
    dwritten = np.einsum("bhk,bhkv->bhv", k, dstate)
    found["k"][:, t] = np.einsum("bhkv,bhv->bhk", dstate, beta * error)
    found["v"][:, t] = derror = beta * dwritten
    if "beta" in x:
      found["beta"][:, t] = np.sum(dwritten * error, axis=-1)
      found["k"][:, t] -= np.einsum("bhkv,bhv->bhk", decayed, derror)
      dstate = dstate - k[..., None] * derror[:, :, None]
    if "log_decay" in x:
      found["log_decay"][:, t] = np.einsum("bhkv,bhkv->bhk", dstate, decayed)
    dstate = _decayed(x, t, dstate)
  return found | {"initial_state": dstate}
