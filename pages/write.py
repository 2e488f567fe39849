"""One self-contained HTML file from run folders and completion files."""

import base64
import io
import json
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

import matplotlib

from harness.errors import UserError
from pages.collect import collect
from pages.formulas import PIECES, formulas
from tools.parts.arms import load_arms
from tools.parts.panels import draw_metrics
from tools.parts.style import FIGURE_STYLE

HERE = Path(__file__).parent


def write_page(file: str, sources: Sequence[str]) -> None:
    """Write the page of one or two run folders or completion files, and print what it holds.

    Raises UserError where a source cannot be read or the file cannot be written.
    """
    page = collect(sources)
    curves = draw_curves([source for source in sources if Path(source).is_dir()])
    page["formulas"] = formulas(_texts(page))
    page["pieces"] = PIECES
    text = (HERE / "page.html").read_text()
    parts = {
        "TITLE": escape(page["title"]),
        "STYLE": (HERE / "page.css").read_text(),
        "SCRIPT": (HERE / "page.js").read_text(),
        "CURVES": curves,
        "DATA": as_script(page),
    }
    before, *after = text.split("{{")
    filled = [before]
    for piece in after:  # one pass: what is filled in is not searched again
        name, _, rest = piece.partition("}}")
        filled += [parts[name], rest]
    try:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).write_text("".join(filled), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--html={file}: cannot be written: {error.strerror}") from error
    answers = sum(len(p["samples"]) for p in page["problems"]) * len(page["columns"])
    samples = sum(len(run["samples"]) for run in page["runs"])
    size = Path(file).stat().st_size / 1e6
    print(
        f"{file}: {len(page['problems'])} problems, {answers} answers, {samples} training samples, "
        f"{len(page['formulas'])} distinct formulas; {size:.1f} MB"
    )


def as_script(value: dict) -> str:
    r"""JSON that may stand in a <script> element: no < is left in it to end or open an element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def draw_curves(folders: Sequence[str]) -> str:
    """The figure of tools.plot as an <img> that holds the whole SVG; "" without a run.

    A picture in an <img> runs no script and loads nothing.
    """
    if not folders:
        return ""
    file = io.BytesIO()
    figure = draw_metrics(load_arms(folders))
    with matplotlib.rc_context({**FIGURE_STYLE, "svg.fonttype": "path", "svg.hashsalt": "page"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="curves of the runs" src="data:image/svg+xml;base64,{data}">'


def _texts(page: dict) -> Iterator[str]:
    """Every text in which the page looks for formulas."""
    for problem in page["problems"]:
        yield problem["problem"]
        for cells in problem["samples"]:
            yield from (cell["text"] for cell in cells if cell)
    for run in page["runs"]:
        for sample in run["samples"]:
            yield from (sample["problem"], sample["response"])
