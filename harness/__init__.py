"""What keeps runs safe and simple: settings, checkpoints, memory, errors. Unix only.

Importing it before torch makes torch's idle threads sleep instead of spinning. Spinning
threads waste cores that other work keeps busy. Set OMP_WAIT_POLICY=active to have them spin.

Imports take seconds. Ctrl-C during them ends the program with one line, as harness.errors.run does
afterwards.
"""

import os
import sys
from types import TracebackType

try:
    import fcntl  # noqa: F401  (run folders are locked by it)
    import resource  # noqa: F401  (memory of the process)
except ImportError:
    print(
        f"error: nanoRLVR runs on Linux, macOS (CPU) and WSL2, not on {sys.platform}: "
        "start it there",
        file=sys.stderr,
    )
    raise SystemExit(2) from None

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # torch reads it when it is imported


def _end(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A sys.excepthook that does not show where Ctrl-C came."""
    if issubclass(kind, KeyboardInterrupt) and "--debug" not in sys.argv:
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _end
