"""Scalars for TensorBoard in one event file, where every step occurs once and is in the file as soon as it is written.

The writer of tensorboardX hands events to a queue and a thread, so that a killed process loses up to two minutes of
them. Steps that a resumed run repeats also stay in the file of the first process. Only its events and checksums are
used here.
"""

import pathlib
import socket
import struct
import time
from collections.abc import Iterator

from google.protobuf.message import DecodeError
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c


class Board:
  """Adds scalars to the events in `folder`. Events beyond `resume_step` are dropped first."""

  def __init__(self, folder: pathlib.Path, resume_step: int = 0):
    folder.mkdir(parents=True, exist_ok=True)
    earlier = sorted(folder.glob("events.out.tfevents.*"))
    kept = {key: record for path in earlier if resume_step for key, record in scalars(path) if key[0] <= resume_step}
    # A running TensorBoard takes a new file for a later one, and the second event makes it forget the other files.
    head = [Event(wall_time=time.time(), file_version="brain.Event:2"),
            Event(wall_time=time.time(), step=0, session_log=SessionLog(status=SessionLog.START))]
    unfinished = folder / "unfinished"
    unfinished.write_bytes(b"".join([*map(_record, head), *kept.values()]))
    # In this order a kill loses nothing, and events that it leaves twice are one event for the next process.
    path = unfinished.rename(folder / f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}")
    for old in earlier:
      old.unlink()
    self._file = path.open("ab", buffering=0)

  def write(self, step: int, scalars: dict[str, float]) -> None:
    """Adds the scalars of one step. They may be infinite or not a number."""
    values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
    self._file.write(_record(Event(wall_time=time.time(), step=step, summary=Summary(value=values))))

  def close(self) -> None:
    self._file.close()


def _record(event) -> bytes:
  data = event.SerializeToString()
  size = struct.pack("<Q", len(data))
  return size + struct.pack("<I", masked_crc32c(size)) + data + struct.pack("<I", masked_crc32c(data))


def scalars(path: pathlib.Path) -> Iterator[tuple[tuple, bytes]]:
  """Yields ((step, names), record) for the scalars in an event file, up to where a kill has cut it short."""
  data, start = path.read_bytes(), 0
  while start + 12 <= len(data):
    stop = start + 16 + int.from_bytes(data[start:start + 8], "little")
    try:
      event = Event.FromString(data[start + 12:stop - 4])
    except DecodeError:
      return
    if stop <= len(data) and event.HasField("summary"):
      yield (event.step, *(value.tag for value in event.summary.value)), data[start:stop]
    start = stop
