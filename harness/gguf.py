"""Models from GGUF files: written once as a Hugging Face folder into cache/, dequantised."""

import hashlib
import importlib.util
import os
import tempfile
from functools import lru_cache
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from harness.errors import UserError
from harness.files import UMASK

CACHE = Path(__file__).parents[1] / "cache"


def resolve(name: str) -> str:
    """The folder of a model: FILE.gguf is converted on first use, any other name is returned.

    The folder is named after the content of the file. Raises UserError if the file is missing or
    damaged, if its architecture is unknown, or if the package gguf is not installed.
    """
    if not name.endswith(".gguf"):
        return name
    path = Path(name).expanduser()
    if not path.is_file():
        raise UserError(f"model {name!r}: no such file")
    status = path.stat()
    folder = CACHE / f"gguf-{_content(path, status.st_mtime_ns, status.st_size)}"
    if not folder.exists():
        _convert(path, folder)
    return str(folder)


@lru_cache
def _content(path: Path, changed: int, size: int) -> str:
    """A hash of the file's content. The other arguments tell when it must be read again."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


def _convert(path: Path, folder: Path) -> None:
    """Write the model and its tokenizer into the folder, whole or not at all."""
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"model {str(path)!r}: GGUF files need a package: pip install gguf==0.19.0")
    print(f"{path}: converting it once into {folder}")
    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            **where, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
        tokenizer = AutoTokenizer.from_pretrained(**where)
    except Exception as error:  # foreign files fail in many ways inside foreign code
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"model {str(path)!r}: not a GGUF file of a supported architecture ({reason})"
        ) from error
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=folder.name + ".", dir=folder.parent) as work:
            half = Path(work) / "model"
            model.save_pretrained(half)
            tokenizer.save_pretrained(half)
            for file in half.iterdir():  # safetensors makes files that only their owner reads
                os.chmod(file, 0o666 & ~UMASK)
            if not folder.exists():  # another process may have been faster
                os.rename(half, folder)
    except OSError as error:
        raise UserError(f"{folder}: the converted model cannot be written: {error}") from error
