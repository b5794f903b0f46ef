"""The standard streams of a process that was started without some of them."""

from __future__ import annotations

import os
import sys


def open_missing() -> None:
    """Give each closed one of the three /dev/null, before a file of ours gets its number.

    What is written to a closed stream is lost, as whoever closed it wants; without this the next
    file that is opened gets its number, and with it what libraries print.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(
                os.devnull, os.O_RDWR
            )  # the lowest free number, as all before are open
            os.set_inheritable(opened, True)
        if getattr(sys, name) is None:
            # Not closed at the end of the process, when others still write.
            stream = open(number, "w" if number else "r", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)
