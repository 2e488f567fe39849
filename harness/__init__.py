"""What keeps runs safe and simple: settings, checkpoints, memory, errors.

Importing it before torch makes torch's idle threads sleep instead of spinning. On cores that other
work keeps busy, spinning threads can make a step many times slower; on idle cores it costs a few
percent. Set OMP_WAIT_POLICY=active to have them spin.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # torch reads it when it is imported
