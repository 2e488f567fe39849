"""The runs of sweeps: load complete runs, pool several sweeps, average arms."""

import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path

from harness.errors import UserError
from harness.runfiles import is_complete, read_jsonl
from settings import Config, read_settings
from tools.parts.arms import (
    MEMORY_KEYS,
    RUN_KEYS,
    Arm,
    differences,
    every_setting,
    load_metrics,
    mean_run,
)

IN_ONE_ARM = (*RUN_KEYS, *MEMORY_KEYS)  # settings in which the runs of one arm may differ


def load_sweep_arm(folder: Path, wanted: dict | None = None) -> Arm:
    """The complete runs in the folder of an arm, OUT/ARM, sorted by seed.

    Raises UserError for a run whose configuration differs from `wanted` (None: from the first
    run's).
    """
    arm = Arm(folder.name, [], [], wanted or {})
    seeds = [path.name.removeprefix("seed") for path in folder.glob("seed*") if path.is_dir()]
    for seed in sorted(int(seed) for seed in seeds if seed.isdigit()):
        run = folder / f"seed{seed}"
        if not read_jsonl(run / "metrics.jsonl") or not is_complete(run):
            continue
        config = every_setting(read_settings(run))
        arm.config = arm.config or config
        for key, (here, there) in differences(config, arm.config, IN_ONE_ARM).items():
            first = f" as in {arm.folders[0]}" if arm.folders else ""
            raise UserError(
                f"{run}: holds a run with {key}={here}, not {there}{first}: the runs of an arm "
                "differ only in their seed: move it away"
            )
        arm.folders.append(run)
        arm.runs.append(load_metrics(run))
    return arm


def load_sweep(out: Path) -> list[Arm]:
    """The arms of a sweep's folder in their order, each with its complete runs, by seed."""
    try:
        names = json.loads((out / "sweep.json").read_text())["arms"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{out}: has no readable sweep.json: name the --out of a sweep") from error
    return [load_sweep_arm(out / name) for name in names]


# ---- pooling sweeps


def pool_sweeps(outs: Sequence[Path]) -> tuple[list[Arm], dict[str, list]]:
    """The arms of several sweeps, where the runs of each further sweep count as further seeds.

    Also returns the settings in which the sweeps differ: key -> values. Raises UserError for sweeps
    that cannot be pooled.
    """
    sweeps = [{arm.label: arm for arm in load_sweep(out)} for out in outs]
    different: dict[str, list] = {}
    for (here, ours), (there, theirs) in itertools.combinations(zip(outs, sweeps, strict=True), 2):
        if here.resolve() == there.resolve():
            raise UserError(f"pool={there}: the same folder as {here}: name it once")
        _check_same_arms(here, ours, there, theirs)
        for key, value in _differing_settings(here, ours, there, theirs):
            known = different.setdefault(key, [])
            if value not in known:
                known.append(value)
    arms = list(sweeps[0].values())
    for arm, more in itertools.product(arms, sweeps[1:]):
        arm.folders += more[arm.label].folders
        arm.runs += more[arm.label].runs
    return arms, different


def _check_same_arms(here: Path, ours: dict[str, Arm], there: Path, theirs: dict[str, Arm]) -> None:
    for name in [*ours, *theirs]:
        for out, arms in ((here, ours), (there, theirs)):
            if name not in arms:
                raise UserError(
                    f"pool={there}: {out} has no arm {name}: pool sweeps of the same arms"
                )


def _differing_settings(
    here: Path, ours: dict[str, Arm], there: Path, theirs: dict[str, Arm]
) -> list[tuple]:
    """The settings in which two sweeps of the same arms differ: (key, value) of both.

    Raises UserError if the sweeps share a run. Also if their arms differ in different settings: the
    report would then compare arms that differ in more than their names say.
    """
    found: list[tuple] = []
    arm_with: dict[str, str] = {}  # the settings that differ -> an arm that differs in them
    for name, arm in ours.items():
        other = theirs[name]
        if not (arm.runs and other.runs):
            continue
        changes = differences(arm.config, other.config, IN_ONE_ARM)
        shared = {f.name for f in arm.folders} & {f.name for f in other.folders}
        if shared and not changes:
            run = f"{name}/{min(shared)}"
            raise UserError(
                f"pool={there}: its {run} has the configuration and seed of {here / run}: "
                "a run counts once"
            )
        arm_with.setdefault(", ".join(changes) or "nothing", name)
        found += [(key, value) for key, values in changes.items() for value in values]
    if len(arm_with) > 1:
        (some, a), (others, b), *_ = arm_with.items()
        raise UserError(
            f"pool={there}: its arm {a} differs from that of {here} in {some}, but arm {b} in "
            f"{others}: pool sweeps whose arms all differ in the same settings"
        )
    return found


# ---- averaging arms


def average_arms(arms: list[Arm], key: str) -> list[Arm]:
    """Merge arms that differ only in `key`. A seed's new run is the mean of its runs.

    The configurations decide which arms belong together, because an experiment file may set the key
    too. MEMORY_KEYS tell arms apart only if they are in an arm's name, that is, were asked for. A
    merged arm has the name of its first arm without the key.
    """
    groups: dict[str, list[Arm]] = {}
    for arm in arms:
        if not arm.config:
            raise UserError(f"average={key}: no run of {arm.label} is complete: wait for one")
        rest = {k: v for k, v in arm.config.items() if k not in (*IN_ONE_ARM, key)}
        memory_keys = set(MEMORY_KEYS) - {key}
        asked = [p for p in parts_of(arm.label) if p.partition("=")[0] in memory_keys]
        groups.setdefault(json.dumps([rest, asked], sort_keys=True), []).append(arm)
    if len(groups) == len(arms):
        raise UserError(f"average={key}: no two arms differ only in it: sweep it with --{key}=A,B")
    return [_merge(members, key) for members in groups.values()]


def _merge(members: list[Arm], key: str) -> Arm:
    """One arm made of several, from the seeds that all of them have."""
    first = members[0]
    name = [part for part in parts_of(first.label) if not part.startswith(f"{key}=")]
    by_seed = [dict(zip(map(seed_of, arm.folders), arm.runs, strict=True)) for arm in members]
    folders = [folder for folder in first.folders if all(seed_of(folder) in r for r in by_seed)]
    means = [mean_run([runs[seed_of(folder)] for runs in by_seed]) for folder in folders]
    return Arm(",".join(name).strip("_") or key, folders, means, first.config)


def parts_of(name: str) -> list[str]:
    """The parts of an arm's name: the experiment file, and KEY=VALUE. Values may hold commas."""
    keys = "|".join(Config.__dataclass_fields__)
    return re.split(rf",(?=(?:{keys})=)", name)


def seed_of(folder: Path) -> tuple[str, int]:
    """(OUT, N) of the folder OUT/ARM/seedN. Runs of two arms with the same pair are compared."""
    return str(folder.parent.parent), int(folder.name.removeprefix("seed"))
