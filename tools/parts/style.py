"""What all figures share: fonts, colours, markers and how a figure is saved."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from harness.errors import UserError
from tools.parts.arms import Arm

WIDTH = 32 / 3  # inches; 1600 pixels at DPI
DPI = 150
FIGURE_STYLE = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}

# The palette of Okabe and Ito, which people with any colour vision can tell apart. Its yellow is
# left out because it is too pale for lines.
BLUE, VERMILION, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
SKY, ORANGE, BLACK = "#56B4E9", "#E69F00", "#000000"
COLOURS = (BLUE, VERMILION, GREEN, PINK, SKY, ORANGE, BLACK)
LINE_STYLES = ("-", "--", ":")
MARKERS = "osD^vPX"

# A reward looks the same in every figure: colour and line style of each reward in config/, but for
# `constant`, which moves nothing. Variants of a reward share its colour.
REWARD_STYLES = {
    "ground_truth": (BLUE, "-"),
    "ground_truth & ~python": (BLUE, "--"),
    "cross_model": (BLUE, ":"),
    "random(0.5)": (VERMILION, "-"),
    "random": (VERMILION, "-"),  # the same reward: 0.5 is its default
    "length": (VERMILION, "--"),
    "no_repetition": (VERMILION, ":"),
    "format": (GREEN, "-"),
    "format & ~python": (GREEN, "--"),
    "semantic_entropy": (GREEN, ":"),
    "python": (PINK, "-"),
    "logp(mean)": (PINK, "--"),
    "logp(sum)": (PINK, ":"),
    "majority": (SKY, "-"),
    "majority(online)": (SKY, "--"),
    "soft_majority": (SKY, ":"),
    "incorrect": (ORANGE, "-"),
    "incorrect & ~python": (ORANGE, "--"),
    "neg_entropy(sum)": (ORANGE, ":"),
    "self_certainty": (BLACK, "-"),
    "self_certainty(base)": (BLACK, "--"),
    "neg_entropy(mean, no_answer=-7)": (BLACK, ":"),
}
# If all arms have the same reward, the clip decides. tools.clip_bias uses the same colours.
CLIP_COLOURS = {"both": BLUE, "high": VERMILION, "low": GREEN, "off": PINK}


def series_style(number: int) -> dict:
    """Colour and line style of the series with this number, for lines that are not arms."""
    n = len(COLOURS)
    return {"color": COLOURS[number % n], "linestyle": LINE_STYLES[number // n % len(LINE_STYLES)]}


def arm_styles(arms: Sequence[Arm]) -> list[dict]:
    """Colour and line style of each arm, no two alike (up to 21 arms).

    The first arm of a reward, or of a clip, takes its fixed style. All others take the styles that
    are left.
    """
    rewards = [arm.config.get("reward") for arm in arms]
    clips = [arm.config.get("clip") for arm in arms]
    if len(set(rewards)) == 1 and len(set(clips)) > 1:
        wanted = [(CLIP_COLOURS[clip], "-") if clip in CLIP_COLOURS else None for clip in clips]
    else:
        wanted = [REWARD_STYLES.get(reward) for reward in rewards]
    order = (BLACK, *(colour for colour in COLOURS if colour != BLACK))
    free = [(colour, line) for line in LINE_STYLES for colour in order]
    left = itertools.cycle([pair for pair in free if pair not in wanted] or free)
    styles, used = [], set()
    for pair in wanted:
        if pair is None or pair in used:
            pair = next(left)
        used.add(pair)
        styles.append({"color": pair[0], "linestyle": pair[1]})
    return styles


def save_figure(figure: Figure, path: Path | str) -> None:
    """Write a figure; the suffix chooses the format. Raises UserError if that is impossible."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with matplotlib.rc_context(FIGURE_STYLE):  # tick labels are made when a figure is drawn
            figure.savefig(path, dpi=DPI)
    except (OSError, ValueError) as error:
        raise UserError(f"--out={path}: cannot be written: {error}") from error
