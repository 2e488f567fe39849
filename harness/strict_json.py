"""Parse JSON that somebody else wrote, so that nothing in it can end the program with a traceback.

Python's parser raises RecursionError for deep nesting, and accepts half of a surrogate pair, which
no file, terminal or tokenizer takes afterwards.
"""

import json
import re
from pathlib import Path
from typing import Any

SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(text: str) -> Any:
    """The value of a JSON text. Raises ValueError if it is not JSON or cannot be used as text."""
    try:
        value = json.loads(text)
        if SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except UnicodeEncodeError:
        raise ValueError("holds half of a surrogate pair, which is not a character") from None
    return value


def read_json(path: Path | str) -> dict:
    """The object in a JSON file. Raises OSError or ValueError if there is none."""
    value = parse_json(Path(path).read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value
