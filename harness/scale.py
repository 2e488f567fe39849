"""Which scale file a run gets when none is named."""

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
    """The scale when none is named: the resumed run's own, else what fits this machine."""
    if given.get("resume") and given.get("out_dir"):
        saved = read_config(given["out_dir"])
        known = {f.name for f in fields(Config)}  # a setting that is gone says nothing any more
        values = {key: value for key, value in saved.items() if key in known}
        return values, f"the configuration of {given['out_dir']}"
    how = "choose by naming one, e.g. config/model/tiny.py"
    big, small = "config/model/qwen2.5_math_1.5b.py", "config/model/tiny.py"
    if not torch.cuda.is_available():
        return small, f"no CUDA here; {how}"
    model = given.get("model", Config.model)
    if not _within_reach(model):
        return small, f"{model} is neither on disk nor is a hub within reach; {how}"
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
    from huggingface_hub import HfApi, try_to_load_from_cache

    if Path(model).is_dir() or isinstance(try_to_load_from_cache(model, "config.json"), str):
        return True
    try:
        HfApi().model_info(model, timeout=5)
        return True
    except Exception:  # offline, refused, unknown: whatever the reason, it is not within reach
        return False
