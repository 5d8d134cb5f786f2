"""The process of one peer's model: prepares it, says so, waits for a line, trains, and prints the results as JSON.

  python -m speed.peer_process '{"library": "jla", "name": "gla_1b3", ...}'
"""

import importlib
import json
import os
import sys
import time

# Reads the peer's setting, prepares its training, and returns the function that trains and returns the results.
_PREPARE = {"jla": "speed.peer_jla", "fla": "speed.peer_fla"}


def main() -> None:
  start = time.monotonic()
  replies = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)  # the library's own output must not mix with the replies

  def reply(**fields):
    replies.write(json.dumps(fields) + "\n")
    replies.flush()

  setting = json.loads(sys.argv[1])
  try:
    train = importlib.import_module(_PREPARE[setting["library"]]).prepare(setting)
    seconds = time.monotonic() - start
    reply(seconds=seconds)
    if not sys.stdin.readline():
      return  # nobody waits for the results any more
    begin = time.monotonic()
    results, first = train()  # `first`: the time.monotonic at which the first step had ended
    reply(**{"compile_s": round(seconds, 1)} | results, first_step_s=round(seconds + first - begin, 1))
  except Exception as e:  # every failure of a library is a result
    reply(reason=f"{type(e).__name__}: {e}".splitlines()[0][:300])


if __name__ == "__main__":
  main()
