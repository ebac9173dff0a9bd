"""What a command does first: Ctrl-C, and a reader of its output that goes away (`| head`), are not errors."""

import io
import os
import signal
import sys


def guard() -> None:
    """From now on Ctrl-C ends the process silently with status 130, unless a run handles it, and what nobody reads is
    discarded.

    The process ends in the handler: an exception from there would be printed by whatever is being imported.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # and not ignored, as under nohup
        signal.signal(signal.SIGINT, lambda *_: os._exit(128 + signal.SIGINT))
    for name in ("stdout", "stderr"):
        if stream := getattr(sys, name):  # None where it is closed
            line_buffering = stream.line_buffering or stream.write_through
            file = io.BufferedWriter(_Pipe(stream.fileno(), "w", closefd=False))
            setattr(sys, name, io.TextIOWrapper(file, stream.encoding, stream.errors, line_buffering=line_buffering))


class _Pipe(io.FileIO):
    """A file that goes on as the null device where its reader has gone."""

    def write(self, data):  # type: ignore[no-untyped-def, override]
        try:
            return super().write(data)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            return len(data)
