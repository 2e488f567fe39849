"""A progress bar for decoding."""

import time

from tqdm import tqdm


class Progress:
    """A progress bar over rows that shows tokens/s. Pass it to generate."""

    def __init__(self, rows: int, desc: str, **kwargs):
        self.bar = tqdm(total=rows, desc=desc, unit="row", **kwargs)
        self.tokens, self.start = 0, time.monotonic()

    def __call__(self, tokens: int, rows: int) -> None:
        self.tokens += tokens
        speed = self.tokens / max(time.monotonic() - self.start, 1e-9)
        self.bar.set_postfix_str(f"{speed:,.0f} tokens/s", refresh=False)
        self.bar.update(rows)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error) -> None:
        self.bar.close()
