"""A run as event files of TensorBoard, written anew from the run's own files whenever it is opened.

Records are written directly, as the summary writers of TensorBoard do it, but in the thread that calls: what they
cannot write to a full disk they report from a thread of their own.
"""

import json
import math
import os
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.record_writer import RecordWriter


class TensorBoardRun:
    """The newest event file of a folder; those before it, which hold the same and less, are removed."""

    settled_only = False

    def __init__(self, folder: Path) -> None:
        """Begin a file; whatever a reader has of the run until now is void."""
        self.last = -math.inf
        folder.mkdir(parents=True, exist_ok=True)
        before = list(folder.glob("events.out.tfevents.*"))
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        self._file = (folder / name).open("wb")
        self._records = RecordWriter(self._file)
        self._write(Event(file_version="brain.Event:2"))
        self._write(Event(step=0, session_log=SessionLog(status=SessionLog.START)))
        self._file.flush()
        for path in before:
            path.unlink()

    def configuration(self, document: Mapping[str, Any]) -> None:
        shown = "\n".join(f"    {line}" for line in json.dumps(document, indent=2, ensure_ascii=False).splitlines())
        self._write(Event(step=0, summary=text_pb("config", shown)))  # in Markdown
        self._file.flush()

    def scalars(self, lines: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        for x, numbers in lines:
            values = [Summary.Value(tag=name, simple_value=number) for name, number in numbers.items()]
            self._write(Event(step=x, summary=Summary(value=values)))
        self._file.flush()

    def picture(self, path: Path, x: int) -> None:
        with Image.open(path) as picture:
            width, height, channels = *picture.size, len(picture.getbands())
        image = Summary.Image(width=width, height=height, colorspace=channels, encoded_image_string=path.read_bytes())
        self._write(Event(step=x, summary=Summary(value=[Summary.Value(tag="samples", image=image)])))
        self._file.flush()

    def close(self, status: str) -> None:
        self._file.close()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())
