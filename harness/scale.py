"""Choose the scale file of a run that names none."""

from dataclasses import fields, replace
from pathlib import Path

import torch
from transformers import AutoConfig

from harness.configurator import configure
from harness.plan import USABLE, device_memory
from harness.runfiles import read_config
from harness.shapes import planned
from settings import Config
from tasks import tiny


def choose_scale(given: dict) -> tuple[str | dict, str]:
    """Choose the resumed run's own configuration, or else a scale that fits this machine.

    `given` holds the settings that the user gave. Returns a scale file or a dict of settings, and
    the reason.
    """
    if given.get("resume") and given.get("out_dir"):
        saved = read_config(given["out_dir"])
        known = {f.name for f in fields(Config)}  # an old run may hold settings that are gone
        known -= {"resume", "resume_step"}  # those of the last call
        values = {key: value for key, value in saved.items() if key in known}
        return values, f"the configuration of {given['out_dir']}"
    how = "choose by naming one, e.g. config/model/tiny.py"
    big, small = "config/model/qwen2.5_math_1.5b.py", "config/model/tiny.py"
    if not torch.cuda.is_available():
        return small, f"no CUDA here; {how}"
    model = given.get("model", Config.model)
    if not _within_reach(model):
        return small, f"{model} is not on disk and no hub can be reached; {how}"
    free, need = _free_and_needed(big, given)
    sizes = f"{big} needs {need / 1e9:.1f} GB, and the GPU has {free / 1e9:.1f} for it"
    return small if need > free else big, f"{sizes}; {how}"


def _free_and_needed(scale: str, given: dict) -> tuple[float, float]:
    """Bytes of the GPU that a run may have, and the planned need of the weights and rows of
    decoding that rollout_weights chooses there."""
    cfg = replace(configure(Config, [scale])[0], **given)
    free = device_memory(torch.device("cuda", 0))
    plan = planned(cfg, AutoConfig.from_pretrained(tiny.resolve(cfg.model)), free)
    decode_weights, rows, _ = plan.choose(cfg.rollout_weights)
    return USABLE * free, plan.need(decode_weights, rows)


def _within_reach(model: str) -> bool:
    """Whether the model is on disk or on a hub that answers."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    if Path(model).is_dir() or isinstance(try_to_load_from_cache(model, "config.json"), str):
        return True
    try:
        HfApi().model_info(model, timeout=5)
        return True
    except Exception:  # such as offline or unknown; the reason does not matter
        return False
