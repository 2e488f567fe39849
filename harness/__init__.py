"""The surroundings of training: configuration, run folders, memory, errors. Unix only."""

import sys

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
