"""The page that sample.py --html writes: what it holds, and what a browser makes of it."""

import html
import json
import re
import shutil
import subprocess

import pytest
from test_figures import write_run

import sample
from harness.errors import UserError
from pages.collect import collect
from pages.formulas import PIECES, formulas, to_mathml
from pages.write import as_script

ATTACK = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def row(problem, *completions, answer="4", **more):
    return {"problem": problem, "answer": answer, "completions": list(completions), **more}


RIGHT, WRONG = "So \\boxed{4}.", "So \\boxed{5}."
CODE_RIGHT, CODE_WRONG = "```python\n2+2\n``` \\boxed{4}", "```python\n2-2\n``` \\boxed{0}"


@pytest.fixture
def two_files(tmp_path):
    """Before and after: 2 problems x 2 samples, one of each transition of the verdict."""
    before = [row("one", RIGHT, WRONG, level="1"), row("two", CODE_RIGHT, WRONG, level="2")]
    after = [row("two", CODE_RIGHT, WRONG), row("one", CODE_WRONG, CODE_RIGHT)]
    return [write_rows(tmp_path / f"{name}.jsonl", rows)
            for name, rows in (("before", before), ("after", after))]  # fmt: skip


@pytest.fixture
def run_folder(tmp_path):
    """A run with two evals and logged samples with token values, one of them clipped."""
    folder = write_run(tmp_path / "run", reward=f"contains({ATTACK!r})", clip_high=0.2)
    for step, text in ((0, WRONG), (4, RIGHT)):
        write_rows(folder / f"eval/step_{step:05d}.jsonl", [row("one", text, correct=[step == 4])])
    logged = {"step": 1, "row": 0, "problem": "p", "answer": "4", "response": "ab" + ATTACK}
    logged |= {"reward": 1.0, "advantage": 0.5, "correct": True, "finished": True}
    values = {"tokens": ["a", "b", ATTACK], "entropy": [0.0, 1.5, 0.2]}
    values["log_ratio"] = [0.0, 0.3, None]
    write_rows(folder / "samples.jsonl", [logged | values, logged | {"step": 2}])
    return str(folder)


# ---- formulas


def test_formulas_of_a_text_by_their_source_with_delimiters():
    text = r"$x^2$ and \(y\) and \[z\] and $$\frac{1}{2}$$, for $5 or $6; ```python a = '$q$'```"
    found = formulas([text])
    assert list(found) == ["$x^2$", r"\(y\)", r"\[z\]", r"$$\frac{1}{2}$$"]
    assert "<msup>" in found["$x^2$"] and "<mfrac>" in found[r"$$\frac{1}{2}$$"]
    assert 'display="block"' in found[r"\[z\]"] and 'display="inline"' in found[r"\(y\)"]


def test_a_formula_that_cannot_be_read_stays_text():
    assert to_mathml(r"$\frac{1}$") is None or "<mfrac>" in to_mathml(r"$\frac{1}$")
    assert to_mathml(r"$\begin{matrix} 1 \\$") is None
    assert to_mathml("$" + "{" * 1500 + "$") is None
    assert to_mathml("```$x$```") is None


@pytest.mark.parametrize(
    "source",
    [
        r"$\text{<script>alert(1)</script>}$",
        r"$\text{&lt;script&gt;}<script>&#60;script&#62;$",
        r"$\href{javascript:alert(1)}{x}$",
        r"$\style{background:url(http://a.b)}{y} \class{c}{z}$",
    ],
)
def test_a_formula_brings_no_html_no_link_and_no_style(source):
    """Of a model's text; only names of elements and attributes from the lists may come through."""
    mathml = to_mathml(source) or ""
    assert "<script" not in mathml and "javascript" not in mathml
    assert not re.search(r"\b(href|style|class|on\w+)=", mathml)


# ---- what the page holds


def test_completions_are_paired_by_problem_and_sample(two_files):
    page = collect(two_files)
    assert page["columns"] == ["before", "after"] and page["runs"] == []
    assert [p["problem"] for p in page["problems"]] == ["one", "two"]
    pairs = [
        [(cell["right"], cell["code"]) for cell in cells]
        for p in page["problems"]
        for cells in p["samples"]
    ]
    assert pairs == [
        [(True, False), (False, True)],
        [(False, False), (True, True)],
        [(True, True), (True, True)],
        [(False, False), (False, False)],
    ]


def test_a_saved_verdict_stands_and_repeated_problems_are_paired_in_order(tmp_path):
    rows = [row("one", WRONG, correct=[True]), row("one", RIGHT, RIGHT, correct=[False, True])]
    page = collect(
        [write_rows(tmp_path / "a.jsonl", rows), write_rows(tmp_path / "b/a.jsonl", rows)]
    )
    assert page["columns"] == [f"{tmp_path.name}/a", "b/a"]
    shown = [[cells[1]["right"] for cells in p["samples"]] for p in page["problems"]]
    assert shown == [[True], [False, True]]


def test_a_problem_may_be_a_number_and_reasons_may_be_missing(tmp_path):
    rows = [row(7, RIGHT, WRONG, finish_reason=["length", "stop"]), row("x", RIGHT)]
    page = collect([write_rows(tmp_path / "a.jsonl", rows)])
    assert [p["problem"] for p in page["problems"]] == ["7", "x"]
    cut = [[cell["cut"] for (cell,) in p["samples"]] for p in page["problems"]]
    assert cut == [[True, False], [False]]


def test_a_run_gives_its_first_and_last_eval_its_settings_and_samples(run_folder):
    page = collect([run_folder])
    assert page["columns"] == ["base", "step 4"]
    assert [cell["right"] for cell in page["problems"][0]["samples"][0]] == [False, True]
    (run,) = page["runs"]
    assert run["config"]["clip_high"] == "0.2" and "group_size" in run["config"]
    assert run["samples"][0]["clipped"] == [0, 1, 0]
    assert run["samples"][1]["tokens"] is None


def test_bad_sources_are_refused(two_files, run_folder, tmp_path):
    other = write_rows(tmp_path / "other.jsonl", [row("three", RIGHT)])
    with pytest.raises(UserError, match="before and other"):
        collect([two_files[0], other])
    for named, word in (([], "--html"), ([*two_files, other], "not 3"), (["--n=2", other], "n ")):
        with pytest.raises(UserError, match=word):
            sample.main([f"--html={tmp_path / 'page.html'}", *named])
    with pytest.raises(UserError, match="cannot be written"):
        sample.main([f"--html={other}/page.html", other])


def test_data_cannot_end_its_script_element():
    text = as_script({"a": "</script><!--<script>\u2028"})
    assert "<" not in text and json.loads(text) == {"a": "</script><!--<script>\u2028"}


# ---- in a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """dom(file, hash): the page's elements as text, after its script has run."""
    if not BROWSER:
        pytest.skip("needs chromium, which is not here")
    profile = tmp_path_factory.mktemp("profile")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]

    def dom(file, query=""):
        command = [BROWSER, *options, "--dump-dom", f"file://{file}#{query}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        return re.sub(r"<script.*?</script>", "", done.stdout, flags=re.DOTALL)

    return dom


def shown(dom):
    """(what the count says, the completions that are drawn)."""
    count = html.unescape(re.search(r'id="count"[^>]*>([^<]*)', dom)[1])
    cells = re.findall(r'<div class="cell (\w+)"', dom)
    return count, cells


def test_the_address_sets_the_filters(browser, two_files, tmp_path):
    file = tmp_path / "page.html"
    sample.main([f"--html={file}", *two_files])
    count, cells = shown(browser(file))
    assert count.startswith("4 of 4 answers, 2 of 2 problems")
    assert "before 50.0 % right, after 50.0 % right" in count and len(cells) == 8
    for query, first, drawn in (
        ("wrong=1&code=1", "1 of 4 answers, 1 of 2 problems", ["right", "wrong"]),
        ("change=wrong+to+right", "1 of 4 answers, 1 of 2", ["wrong", "right"]),
        ("habit=language+to+language&level=2", "1 of 4 answers", ["wrong", "wrong"]),
        ("q=2%2B2&correct=right", "2 of 4 answers, 2 of 2", ["wrong", "right", "right", "right"]),
    ):
        count, cells = shown(browser(file, query))
        assert (count.startswith(first), cells) == (True, drawn), (query, count)


def test_text_from_data_is_text(browser, tmp_path):
    r"""In problems, answers, completions and formulas; real formulas become MathML."""
    math = r"Then $x^2 < y$ and \[\frac{1}{2}\] and $\text{" + ATTACK + "}$"
    rows = [row(ATTACK, ATTACK + math, math, answer=ATTACK, level=ATTACK, subject=ATTACK)]
    file = tmp_path / "page.html"
    sample.main([f"--html={file}", write_rows(tmp_path / f"{ATTACK[:8]}.jsonl", rows)])
    dom = browser(file)
    assert "owned" not in re.search("<title>(.*)</title>", dom)[1]
    assert "<img" not in dom and dom.count(html.escape(ATTACK, quote=False)) == 5
    assert "<msup>" in dom and "<mfrac>" in dom


def test_samples_curves_and_settings_of_a_run(browser, run_folder, tmp_path):
    file = tmp_path / "page.html"
    sample.main([f"--html={file}", run_folder])
    assert not re.search(r'(src|href)="(?!data:)', file.read_text())
    dom = browser(file, "view=samples&clipped=yes&colour=entropy")
    assert shown(dom)[0] == "1 of 2 samples"
    assert re.search(r'<span class="token clipped"[^>]*entropy 1.5000[^>]*230, 159, 0[^>]*>b', dom)
    assert "owned" not in re.search("<title>(.*)</title>", dom)[1]
    assert '<img alt="curves of the runs" src="data:image/svg+xml;base64,' in dom
    assert "<td>clip_high</td><td>0.2</td>" in dom


def test_the_expression_for_pieces_is_one_that_javascript_has():
    assert not re.search(r"\(\?P|\(\?<|\\[AZz]", PIECES)
