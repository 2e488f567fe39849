"""data.py: reading problems, prompts, rollouts and the order of everything."""

import json
import re
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import made_up
from tokenizers import processors

import data
import engine
from data import PROMPTS, Problem, Rollouts, batch_indices, partition, prepare, render_prompt
from harness.errors import UserError
from model import turn_end_ids
from tasks import datasets
from tasks.datasets import drop_overlap, load_problems, subset
from tasks.rows import solution_box

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="no ../shared reference material")


def write(path: Path, *rows) -> str:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def refused(function, *args) -> str:
    with pytest.raises(UserError) as caught:
        function(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- reading problems


def test_rows_of_every_source_become_problems(tmp_path):
    rows = [
        {"problem": "p\n", "answer": " 1/2 ", "subject": "Algebra", "level": 5.0, "unique_id": "u"},
        {"question": "q", "answer": "3 * 4 = <<3*4=12>>\n#### 1,200"},
        {"prompt": "r", "final_answer": 27.0, "level": "Level 3", "type": "Geometry", "id": 0},
        {"problem": "s", "label": 7},
        {"problem": "t", "answer": None, "solution": r"\boxed{1} or so \boxed{\frac{1}{2}}."},
        {"problem": "u\u2028v", "answer": "0.25", "level": 2},
    ]
    expected = [
        Problem("p\n", "1/2", "u", "Algebra", "5"),
        Problem("q", "1200", "f/1"),
        Problem("r", "27", "0", "Geometry", "3"),
        Problem("s", "7", "f/3"),
        Problem("t", r"\frac{1}{2}", "f/4"),
        Problem("u\u2028v", "0.25", "f/5", "", "2"),
    ]
    assert load_problems(write(tmp_path / "f.jsonl", *rows), "train") == expected
    spaced = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]  # blank lines between
    assert load_problems(write(tmp_path / "f.jsonl", *spaced), "train") == expected
    assert load_problems(write(tmp_path / "f.json", json.dumps(rows, indent=1)), "test") == expected


def test_a_folder_holds_a_file_for_each_split(tmp_path):
    write(tmp_path / "train.jsonl", {"problem": "p", "answer": "1"})
    write(tmp_path / "test.json", [{"problem": "q", "answer": "2"}])
    assert load_problems(str(tmp_path), "train")[0].answer == "1"
    assert load_problems(str(tmp_path), "test")[0].answer == "2"
    (tmp_path / "test.json").unlink()
    message = refused(load_problems, str(tmp_path), "test")
    assert str(tmp_path) in message and "test.jsonl" in message


def test_chat_messages_are_read_by_their_user_turn(tmp_path, capsys):
    """The row of DAPO-Math-17k, as published: messages, and the answer in reward_model."""
    dapo = {
        "data_source": "math_dapo",
        "prompt": [{"role": "user", "content": "Solve.\n\nWhat is 2 + 3?"}],
        "reward_model": {"ground_truth": "5", "style": "rule"},
        "extra_info": {"index": "b426"},
    }
    system = {"role": "system", "content": "Think."}
    with_system = {"prompt": [system, {"role": "user", "content": "q"}], "answer": 7}
    file = write(tmp_path / "f.jsonl", dapo, with_system, {"prompt": "plain", "answer": "1"})
    assert load_problems(file, "train") == [
        Problem("Solve.\n\nWhat is 2 + 3?", "5", "f/0"),
        Problem("q", "7", "f/1"),
        Problem("plain", "1", "f/2"),
    ]
    assert "2 prompts" in capsys.readouterr().err
    user, assistant = dapo["prompt"][0], {"role": "assistant", "content": "4"}
    for messages in ([user, assistant, user], [user, user], [system], [], [{"content": "q"}]):
        bad = write(tmp_path / "bad.jsonl", {"prompt": messages, "answer": "1"})
        assert refused(load_problems, bad, "train").startswith(f"{bad}:1: ")


def test_a_gold_answer_with_a_box_is_the_box(tmp_path):
    golds = {
        r"The answer is \boxed{5}": "5",
        r"$\boxed{\frac{1}{2}}$.": r"\frac{1}{2}",
        r"so \boxed{1} or rather \boxed{2}": "2",
        r"6 - 1 #### \boxed{5}": "5",
        "The answer is 5": "The answer is 5",
    }
    for column in ("answer", "final_answer", "label"):
        rows = [{"problem": f"p{i}", column: gold} for i, gold in enumerate(golds)]
        problems = load_problems(write(tmp_path / "f.jsonl", *rows), "train")
        assert [p.answer for p in problems] == list(golds.values())
    cut = write(tmp_path / "f.jsonl", {"problem": "p", "answer": r"It is \boxed{5"})
    assert "no answer" in refused(load_problems, cut, "train")


def test_each_distinct_problem_is_used_once_unless_asked(tmp_path, capsys):
    rows = [{"problem": f"problem {i % 3}", "answer": str(i % 3)} for i in range(300)]
    rows += [{"problem": " Problem  1\n", "answer": "another"}, {"problem": "q", "answer": "1"}]
    file = write(tmp_path / "f.jsonl", *rows)
    assert [p.id for p in load_problems(file, "train")] == ["f/0", "f/1", "f/2", "f/301"]
    told = capsys.readouterr().err
    assert file in told and "302 rows" in told and "4 distinct" in told and "1 rows give" in told
    assert len(load_problems(file, "train", keep_duplicates=True)) == 302
    told = capsys.readouterr().err
    assert "302 rows" in told and "4 distinct" in told
    load_problems(write(tmp_path / "g.jsonl", *rows[:3]), "train")
    assert capsys.readouterr().err == ""


def test_faulty_rows_are_named_by_file_and_line(tmp_path):
    good, file = {"problem": "p", "answer": "1"}, tmp_path / "f.jsonl"
    for row, word in [
        ({"problem": "p"}, "no answer"),
        ({"problem": "p", "answer": " "}, "no answer"),
        ({"problem": "p", "answer": float("nan")}, "no answer"),
        ({"problem": "p", "answer": ["1"]}, "no answer"),
        ({"problem": "p", "solution": r"unfinished \boxed{1"}, "no answer"),
        ({"answer": "1"}, "no problem"),
        ({"problem": "", "answer": "1"}, "no problem"),
        ("[1]", "not a JSON object"),
        ('{"problem": "p"', "not JSON"),
    ]:
        message = refused(load_problems, write(file, good, "", row), "train")
        assert message.startswith(f"{file}:3: ") and word in message
    listed = write(tmp_path / "f.json", json.dumps([good, {"problem": "p"}]))
    assert refused(load_problems, listed, "train").startswith(f"{listed}: row 2: ")
    broken = write(tmp_path / "f.json", "[", '{"problem" "p"}', "]")
    assert refused(load_problems, broken, "train").startswith(f"{broken}:2: ")


def test_nothing_to_read(tmp_path):
    assert "empty" in refused(load_problems, write(tmp_path / "f.jsonl", ""), "train")
    assert "empty" in refused(load_problems, write(tmp_path / "f.json", "[]"), "train")
    (tmp_path / "f.parquet").write_bytes(b"PAR1\xff\xfe")
    assert "f.parquet" in refused(load_problems, str(tmp_path / "f.parquet"), "train")
    for source in ("nowhere", "data/nowhere.jsonl", "/no/such/folder"):
        message = refused(load_problems, source, "train")
        assert message.startswith(f"{source}: ") and "math500" in message


def test_last_box():
    assert solution_box(r"\boxed{a} then $\boxed{x_{1}^{2}}$ ok}") == "x_{1}^{2}"
    assert solution_box(r"$\boxed 2$.") == "2" and solution_box(r"is \boxed 7.") == "7"
    assert solution_box(r"\boxed{1} and \boxed{2") == "" == solution_box("2")


@pytest.fixture
def no_hub(monkeypatch):
    import huggingface_hub

    def fail(*args, **kwargs):
        raise ConnectionError("no network in this test")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", fail)


def test_without_a_hub_one_line_says_how_to_name_a_file(no_hub, tmp_path, monkeypatch, capfd):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    before = datasets.config.HF_HUB_OFFLINE
    message = refused(load_problems, "math_train", "train")
    assert "no hub within reach" in message and "--train_data=path/to/train.jsonl" in message
    assert "--eval_data=path/to/test.jsonl" in refused(load_problems, "owner/name", "test")
    assert capfd.readouterr() == ("", "")
    assert datasets.config.HF_HUB_OFFLINE == before


def test_without_a_hub_the_cached_copy_serves(no_hub, tmp_path, monkeypatch):
    import datasets

    # what `datasets` leaves behind after it has read a hub data set with a train split only
    rows = [{"problem": "p", "solution": r"so \boxed{3}", "level": "Level 5", "type": "Algebra"}]
    cache = tmp_path / "owner___toy" / "default" / "0.0.0" / "abc"
    made = datasets.load_dataset(
        "json", data_files={"train": write(tmp_path / "f.jsonl", *rows)}, cache_dir=tmp_path / "t"
    )
    arrow = Path(made["train"].cache_files[0]["filename"])
    cache.mkdir(parents=True)
    arrow.rename(cache / "toy-train.arrow")
    info = json.loads((arrow.parent / "dataset_info.json").read_text())
    info |= {"config_name": "default", "dataset_name": "toy"}
    (cache / "dataset_info.json").write_text(json.dumps(info))

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    for split in ("train", "test"):  # the only split serves for both
        assert load_problems("owner/toy", split) == [Problem("p", "3", "toy/0", "Algebra", "5")]


def test_hub_rows_without_an_answer_are_left_out_and_counted(monkeypatch, capsys):
    rows = [("x: row 0", {"problem": "p"}), ("x: row 1", {"problem": "q", "answer": "1"})]
    monkeypatch.setattr(datasets, "_hub_rows", lambda source, split: rows)
    assert [p.problem for p in load_problems("x/y", "train")] == ["q"]
    assert "1 rows left out" in capsys.readouterr().err
    monkeypatch.setattr(datasets, "_hub_rows", lambda source, split: rows[:1])
    assert "no answer" in refused(load_problems, "x/y", "train")


@pytest.mark.slow
def test_importing_data_does_not_import_datasets_or_transformers():
    code = "import sys, data; print([m for m in ('datasets', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


@needs_shared
def test_the_real_data_sets():
    folder = SHARED / "data"
    math500 = load_problems(str(folder / "math500"), "test")
    rows = [json.loads(x) for x in (folder / "math500/test.jsonl").read_text().splitlines()]
    assert [p.answer for p in math500] == [row["answer"] for row in rows]
    assert [solution_box(row["solution"]) for row in rows] == [row["answer"] for row in rows]
    assert {p.level for p in math500} == set("12345")
    train = load_problems(str(folder / "math_train"), "train")
    assert drop_overlap(train, math500)[1] == 0
    assert drop_overlap(train + math500, math500) == (train, 500)
    gsm8k = load_problems(str(folder / "gsm8k"), "test")
    assert len(gsm8k) == 1319 and all(float(p.answer) == int(p.answer) for p in gsm8k)
    amc = load_problems(str(folder / "amc23"), "test")
    assert amc[0].answer == "27" and all(p.answer.lstrip("-").isdigit() for p in amc)


# ---- choosing


def problems(n: int) -> list[Problem]:
    return [Problem(f"p{i}", "1", str(i), "AB"[i % 2], str(i % 5 + 1)) for i in range(n)]


def test_subset_filters_then_draws_in_file_order():
    all_of_them = problems(40)
    kept = subset(all_of_them, level="Level 5", subject="a")
    assert [p.id for p in kept] == ["4", "14", "24", "34"]  # i % 5 == 4 and i even
    drawn = subset(all_of_them, n=10, seed=1)
    ids = [int(p.id) for p in drawn]
    assert ids == sorted(set(ids)) and len(ids) == 10
    assert drawn == subset(all_of_them, n=10, seed=1) != subset(all_of_them, n=10, seed=2)
    assert subset(all_of_them) == subset(all_of_them, n=40) == subset(all_of_them, n=99)
    assert subset(all_of_them) == all_of_them
    message = refused(lambda: subset(all_of_them, level="7"))
    assert "level" in message and "1, 2, 3, 4, 5" in message
    assert "A, B" in refused(lambda: subset(all_of_them, subject="C"))


def test_subset_draws_each_problem_equally_often():
    counts = Counter(p.id for seed in range(400) for p in subset(problems(10), n=3, seed=seed))
    assert len(counts) == 10  # each expected 120 times, standard deviation 9
    assert all(abs(count - 120) < 45 for count in counts.values())


def test_drop_overlap_ignores_case_and_white_space():
    train = [Problem(text, "1", text) for text in ("Find  $x$.\n", "find $y$.", "other")]
    kept, dropped = drop_overlap(train, [Problem("find $x$.", "2", "a"), Problem("?", "", "b")])
    assert [p.id for p in kept] == ["find $y$.", "other"] and dropped == 1


# ---- prompts


@pytest.fixture(scope="module")
def qwen():
    if not SHARED.exists():
        pytest.skip("no ../shared reference material")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(SHARED / "tokenizers/qwen2.5")


def test_qwen_prompts_are_exact(qwen):
    boxed = "Please reason step by step, and put your final answer within \\boxed{}."
    own = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    for prompt, system, user in [
        ("qwen_math", boxed, "What is {problem} $1+1$?"),
        ("simplerl", own, "What is {problem} $1+1$?\n" + boxed),
        ("math_problem", "You are a helpful Assistant.", "Math Problem: What is {problem} $1+1$?"),
    ]:
        ids = render_prompt("What is {problem} $1+1$?", prompt, qwen)
        assert all(type(i) is int for i in ids)
        assert qwen.decode(ids) == (
            f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n"
            "<|im_start|>assistant\n"
        )
        # one id for each of the markers: 151644 and 151645 are Qwen's <|im_start|> and <|im_end|>
        assert (ids.count(151644), ids.count(151645)) == (3, 2)
    assert qwen.decode(render_prompt("Hi there", "none", qwen)) == "Hi there"
    assert "qwen_math" in refused(render_prompt, "Hi", "qwen-math", qwen)


def test_bos_is_there_once(qwen):
    from transformers import AutoTokenizer

    llama = AutoTokenizer.from_pretrained(SHARED / "models/stories260K")
    ids = render_prompt("Once upon a time", "none", llama)
    assert ids[0] == llama.bos_token_id and ids.count(llama.bos_token_id) == 1
    assert "prompt=none" in refused(render_prompt, "Once", "qwen_math", llama)
    llama.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    ids = render_prompt("Once upon a time", "simplerl", llama)
    assert ids[0] == llama.bos_token_id and ids.count(llama.bos_token_id) == 1


ROLES = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
NO_SYSTEM_TURN = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
RAISES = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not\nsupported') }}"
    "{% endif %}{{ messages[0].content }}<|assistant|>"
)


WITHOUT_SYSTEM = {name for name, form in PROMPTS.items() if not form.system}


@pytest.mark.parametrize(
    ("template", "working"),
    [
        (ROLES, set(PROMPTS)),
        (NO_SYSTEM_TURN, WITHOUT_SYSTEM),
        (RAISES, WITHOUT_SYSTEM),
        ("{{ messages[-1].content | upper }}", {"none"}),
        ("{{ messages[0].content }}", WITHOUT_SYSTEM),  # with a system turn, nothing else
        ("{{ messages.nonsense.more }}", {"none"}),
        ("{% for %}", {"none"}),
        ("{{ 1 + 'a' }}", {"none"}),
        (None, {"none"}),
    ],
)
def test_a_prompt_holds_problem_and_system_text_or_is_refused(template, working):
    tokenizer = made_up(template)
    # A problem that quotes the instruction does not stand in for it.
    for problem in ("What is $1+1$?\n", f"  Say: {data.BOXED}"):
        for name, form in PROMPTS.items():
            if name in working:
                text = tokenizer.decode(render_prompt(problem, name, tokenizer))
                assert form.user.replace("{problem}", problem).strip() in text
                told = problem + form.system + form.user
                assert text.count(data.BOXED) == told.count(data.BOXED)
                assert form.system in text and text.endswith(form.prefix)
                continue
            message = refused(render_prompt, problem, name, tokenizer)
            assert f"prompt={name}" in message
            named = message.rpartition("prompt=")[2].split(" or ")
            assert set(named) == working


def test_a_response_prefix_is_prompt_to_the_loss_and_response_to_the_grader(qwen):
    """The prompt's tokens end with it, and the decoded text begins with it."""
    for name, form in PROMPTS.items():
        assert qwen.decode(render_prompt("Hi", name, qwen)).endswith(form.prefix)
    ids = render_prompt("Hi", "few_shot", qwen)
    response = qwen(r"3 + 4 = \boxed{7}")["input_ids"]
    tokens = torch.tensor([ids + response])
    where = torch.tensor([len(ids)]), torch.tensor([len(response)])
    prefix = PROMPTS["few_shot"].prefix
    assert engine.decode(qwen, tokens, *where) == [r"3 + 4 = \boxed{7}"]
    assert engine.decode(qwen, tokens, *where, prefix) == [r"Answer: 3 + 4 = \boxed{7}"]
    raw = engine.decode_raw(qwen, tokens, *where, torch.tensor([False]), prefix)
    assert raw == [r"Answer: 3 + 4 = \boxed{7}"]


def test_the_space_after_a_prefix_is_kept():
    """A sentencepiece tokenizer drops the space in front of the first token of a text."""
    if not SHARED.exists():
        pytest.skip("no ../shared reference material")
    from transformers import AutoTokenizer

    llama = AutoTokenizer.from_pretrained(SHARED / "models/stories260K")
    whole = llama("Let's go", add_special_tokens=False)["input_ids"]
    start = len(llama("Let's", add_special_tokens=False)["input_ids"])
    assert engine.decode_rows(llama, [whole[start:]], "Let's") == ["Let's go"]


def test_a_template_cannot_run_code(tmp_path):
    """transformers renders templates in jinja's sandbox: what leaves it is refused in one line."""
    trace = tmp_path / "trace"
    attack = f"open('{trace}', 'w').close()"
    for template in (
        f"{{{{ cycler.__init__.__globals__.os.system('touch {trace}') }}}}",
        f"{{{{ cycler.__init__.__globals__['__builtins__']['exec'](\"{attack}\") }}}}",
        "{% for c in ().__class__.__base__.__subclasses__() %}{{ c }}{% endfor %}",
        f'{{{{ raise_exception.__globals__.__builtins__.exec("{attack}") }}}}',
        f"{{{{ ''|attr('__class__')|attr('__mro__') }}}}{{{{ exec(\"{attack}\") }}}}",
    ):
        tokenizer = made_up(template)
        assert "none" in refused(render_prompt, "p", "qwen_math", tokenizer)
        assert turn_end_ids(tokenizer) == []
    assert not trace.exists()


def test_a_raw_prompt_has_leading_special_tokens_only():
    for template, before in [
        ("<s> $A </s>", ["<s>"]),
        ("$A </s>", []),
        ("<s> <t> $A", ["<s>", "<t>"]),
    ]:
        tokenizer = made_up(None)
        tokens = [(t, tokenizer.convert_tokens_to_ids(t)) for t in ("<s>", "</s>", "<t>")]
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=tokens
        )
        for problem in ("1+1?", "a </s>", "<s>b"):  # what the problem itself holds stays
            own = tokenizer(problem, add_special_tokens=False)["input_ids"]
            ids = render_prompt(problem, "none", tokenizer)
            assert ids == tokenizer.convert_tokens_to_ids(before) + own


class Letters:
    """One token a character, no template."""

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [ord(c) for c in text]}


def test_prepare_drops_long_prompts_and_counts_them():
    chosen = [Problem("a" * n, "1", str(n)) for n in (3, 9, 4, 5)]
    kept, dropped = prepare(chosen, "none", Letters(), max_prompt_tokens=4)
    assert [(p.id, ids) for p, ids in kept] == [("3", [97] * 3), ("4", [97] * 4)] and dropped == 2
    message = refused(prepare, chosen, "none", Letters(), 2)
    assert "max_prompt_tokens=2" in message and "3" in message


# ---- rollouts


def rollouts(**changes) -> Rollouts:
    fields = {
        "tokens": torch.zeros(4, 9, dtype=torch.int64),  # every token the same: pad equals EOS
        "prompt_len": torch.tensor([2, 2, 5, 5]),
        "length": torch.tensor([3, 1, 4, 2]),
        "text": list("abcd"),
        "problem": problems(2)[:1] * 2 + problems(2)[1:] * 2,
        "finished": torch.tensor([True, True, False, True]),
        "group_size": 2,
        "seed": 0,
        "step": 0,
    }
    return Rollouts(**(fields | changes))


def test_mask_comes_from_lengths_and_keeps_the_first_eos():
    assert rollouts().mask.int().tolist() == [
        [1, 1, 1, 0],
        [1, 0, 0, 0],
        [1, 1, 1, 1],
        [1, 1, 0, 0],
    ]
    assert rollouts().mask.dtype == torch.bool


def test_groups_are_by_position_not_by_text():
    same = rollouts(problem=problems(1) * 4)  # two groups of the same problem
    assert same.prompt_index.tolist() == [0, 0, 1, 1]
    assert same.sample_index.tolist() == [0, 1, 0, 1]
    assert same.prompt_index.dtype == same.sample_index.dtype == torch.int64


def test_rollouts_of_the_wrong_shape_are_refused():
    rollouts(old_logp=torch.zeros(4, 4))
    for changes in (
        {"old_logp": torch.zeros(4, 5)},
        {"entropy": torch.zeros(3, 4)},
        {"length": torch.tensor([3, 1, 5, 2])},  # 5 + 5 tokens in 9 columns
        {"length": torch.ones(3, dtype=torch.int64)},
        {"finished": torch.ones(4, 1, dtype=torch.bool)},
        {"text": list("abc")},
        {"raw_text": list("abc")},
        {"group_size": 3},
    ):
        with pytest.raises(ValueError):
            rollouts(**changes)


# ---- order


@pytest.mark.parametrize(("n", "per_step"), [(7, 3), (6, 3), (5, 5), (3, 8), (1, 2), (10, 1)])
def test_steps_walk_through_whole_epochs(n, per_step):
    walk = [i for step in range(4 * n) for i in batch_indices(n, per_step, 5, step)]
    assert len(walk) == 4 * n * per_step
    epochs = [walk[start : start + n] for start in range(0, len(walk), n)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    if n > 4:  # epochs of three problems may be alike by chance
        assert len({tuple(epoch) for epoch in epochs}) > len(epochs) / 2


def test_a_step_is_a_function_of_seed_and_step_alone():
    later = batch_indices(100, 8, 3, 40)  # asked for first: nothing before it is needed
    walk = [batch_indices(100, 8, 3, step) for step in range(41)]
    assert walk[40] == later  # a resumed run neither repeats nor skips a batch
    assert later != batch_indices(100, 8, 4, 40)
    assert all(type(i) is int for i in later)
    assert "seed" in refused(batch_indices, 10, 2, -1, 0)


@pytest.mark.parametrize(("rows", "updates", "budget"), [(16, 4, 100), (17, 4, 60), (5, 5, 1)])
def test_partition_loses_no_row_and_keeps_the_budget(rows, updates, budget):
    lengths = np.random.default_rng(0).integers(1, 50, rows)
    parts = partition(lengths, updates, budget, seed=1, step=2)
    assert parts == partition(lengths.tolist(), updates, budget, seed=1, step=2)
    assert sorted(row for part in parts for micro in part for row in micro) == list(range(rows))
    sizes = [sum(map(len, part)) for part in parts]
    assert len(sizes) == updates and max(sizes) - min(sizes) <= 1
    for part in parts:
        assert all(len(m) == 1 or len(m) * max(lengths[m]) <= budget for m in part)
        order = [lengths[row] for micro in part for row in micro]
        assert order == sorted(order, reverse=True)
        for micro, following in zip(part, part[1:], strict=False):  # none was closed too early
            assert (len(micro) + 1) * max(lengths[micro + following[:1]]) > budget


def test_idle_rows_get_micro_batches_of_their_own():
    lengths = np.random.default_rng(0).integers(1, 50, 40)
    idle = np.random.default_rng(1).random(40) < 0.6
    plain = partition(lengths, 4, 120, seed=1, step=2)
    apart = partition(lengths, 4, 120, seed=1, step=2, idle=idle)
    assert partition(lengths, 4, 120, seed=1, step=2, idle=[False] * 40) == plain
    for mini, other in zip(plain, apart, strict=True):
        assert sorted(sum(mini, [])) == sorted(sum(other, []))  # the mini-batches are the same
        assert all(len(m) == 1 or len(m) * max(lengths[m]) <= 120 for m in other)
        assert all(len(set(idle[m])) == 1 for m in other)


def test_partition_is_shuffled_by_seed_and_step():
    lengths = [10] * 64
    first = partition(lengths, 2, 10_000, seed=0, step=0)
    assert [len(part) for part in first] == [1, 1]  # all of a mini-batch in one micro-batch
    assert first != partition(lengths, 2, 10_000, seed=0, step=1)
    assert first != partition(lengths, 2, 10_000, seed=1, step=0)
    assert sorted(first[0][0]) != list(range(32))
    # the rows of a mini-batch do not depend on the micro-batch size
    small = partition(lengths, 2, 20, seed=0, step=0)
    assert [sorted(sum(part, [])) for part in small] == [sorted(part[0]) for part in first]
    assert "updates=3" in refused(partition, [1, 1], 3, 100, 0, 0)


def test_no_two_uses_share_a_stream():
    tags = (datasets.SUBSET, data.ORDER, data.PARTITION)
    assert len(set(tags)) == 3
    order = batch_indices(50, 50, 7, 0)
    assert order != [row for row in partition([1] * 50, 1, 10**6, 7, 0)[0][0]]


# ---- generated arithmetic, SVAMP, numbers


@pytest.mark.slow
@pytest.mark.parametrize("name,operations", [("arithmetic", 2), ("arithmetic_5", 5)])
def test_arithmetic_is_right_the_same_everywhere_and_disjoint(name, operations):
    train, test = load_problems(name, "train"), load_problems(name, "test")
    assert (len(train), len(test)) == (4000, 500)
    texts = {p.problem for p in train}
    assert len(texts) == 4000 and not texts & {p.problem for p in test}
    assert load_problems(name, "test") == test
    for problem in (*train[:200], *test[:50]):
        text = problem.problem.removeprefix("What is ").removesuffix("?")
        assert sum(text.count(f" {sign} ") for sign in "+-*/") == operations
        exact = re.sub(r"\d+", lambda number: f"Fraction({number[0]})", text)
        assert str(eval(exact, {"Fraction": Fraction})) == problem.answer


def test_arithmetic_has_bounds():
    for name in ("arithmetic_0", "arithmetic_21"):
        with pytest.raises(UserError, match=name):
            load_problems(name, "test")


def test_svamp_and_small_numbers(tmp_path):
    rows = [
        {"Body": "Tom has 3 pens.", "Question": "How many?", "Answer": 3.0, "ID": "x"},
        {"problem": "p", "answer": 0.00001},
        {"problem": "q", "answer": -1.5e-7},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    problems = load_problems(str(path), "train")
    assert problems[0].problem == "Tom has 3 pens. How many?"
    assert [p.answer for p in problems] == ["3", "0.00001", "-0.00000015"]
