"""What keeps runs safe and simple: settings, checkpoints, memory, errors. Unix only.

Importing it before torch makes torch's idle threads sleep instead of spinning. On cores that other
work keeps busy, spinning threads can make a step many times slower; on idle cores it costs a few
percent. Set OMP_WAIT_POLICY=active to have them spin.
"""

import os
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

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # torch reads it when it is imported
