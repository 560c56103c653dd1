"""A run as one HTML page: everything that was recorded is in it, nothing is loaded from elsewhere, and no text of the
run becomes markup. How it looks is for the eye; what stands in it is read here with Python's own HTML parser.
"""
import html.parser
import json
import re

import pytest

from grpo_min import grpo, ppo, pretrain
from grpo_min.lab import page
from grpo_min.run.config import run_command
from grpo_min.run.data import read_jsonl
from grpo_min.run.table import read_csv
from tests import tiny
from tests.tiny import LOOPS, letter_e, settings

HOSTILE = '</script><script>alert("&amp;")</script><!-- \u2028 \U0001f600'


class Elements(html.parser.HTMLParser):
    """What a browser makes of a page: its tags with their attributes, and the text of each script element."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] == "script":
            self.scripts[-1] += data


def data_of(text):
    return json.loads(Elements(text).scripts[0])


def completions(data):
    """The samples of a page in the shape of samples.jsonl."""
    return [dict(row, step=step["step"], prompt=group["prompt"]) for step in data["shown"] for group in step["groups"]
            for row in group["completions"]]


def write_run(folder, steps=2, group_size=2, algorithm="grpo", tokens=("a", " b"), prompt="p", **more):
    """A run folder made by hand: two whole groups a step."""
    folder.mkdir(exist_ok=True)
    config = dict(group_size=group_size, beta=0.0, **(dict(critic="sft") if algorithm == "ppo" else {}))
    (folder / "config.json").write_text(json.dumps(config))
    rows = [f"{step},{step / 10}," for step in range(steps)]
    (folder / "metrics.csv").write_text("\n".join(["step,reward,accuracy", *rows]) + "\n")
    sample = dict(prompt=prompt, completion="".join(tokens), reward=0.5, advantage=0.25, tokens=list(tokens), **more)
    tiny.jsonl(folder / "samples.jsonl", [dict(step=step, **sample) for step in range(steps)
                                          for _ in range(2 * group_size)])
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """{loop: the folder of a tiny run of it}."""
    folders = {}
    for loop in grpo, ppo:
        folder = tmp_path_factory.mktemp(loop.__name__)
        folders[loop] = folder / "run"
        loop.train(settings(loop, folder, run=str(folders[loop])), reward=letter_e)
    return folders


@LOOPS
def test_page_holds_every_recorded_sample_and_curve(loop, trained):
    data = data_of(page.run_page(trained[loop]))
    samples = read_jsonl(trained[loop] / "samples.jsonl", ["prompt", "completion"])
    assert completions(data) == samples and len(samples) == 3 * 9 and data["shown_every"] == 1
    assert [[len(group["completions"]) for group in step["groups"]] for step in data["shown"]] == [[3, 3, 3]] * 3
    rows = read_csv(trained[loop] / "metrics.csv")
    shown = {name: values for panel in data["panels"] for name, values in panel["lines"].items()}
    for name in "reward accuracy kl length entropy grad_norm loss gap".split() + ["explained_variance"] * (loop is ppo):
        assert shown[name] == pytest.approx([row[name] for row in rows], rel=1e-3), name
    assert data["curve_steps"] == [0, 1, 2] and data["algorithm"] == {grpo: "GRPO", ppo: "PPO"}[loop]


@LOOPS
def test_recorded_tokens_are_those_that_were_sampled(loop, tmp_path, monkeypatch):
    rollouts = tiny.recorded_rollouts(loop, monkeypatch)
    seen = []

    def loss(logprobs, old_logprobs, advantages, *rest):
        seen.append(advantages)
        return loop.policy_loss(logprobs, old_logprobs, advantages, *rest)
    loop.train(settings(loop, tmp_path, run=str(tmp_path / "run")), reward=letter_e, loss=loss)
    samples = read_jsonl(tmp_path / "run/samples.jsonl", [])
    assert any(row["tokens"][-1] == "<|end|>" for row in samples)
    for i, row in enumerate(samples):
        (step, b), (_, rollout) = divmod(i, 9), rollouts[i // 9]
        length = int(rollout.mask[b].sum())
        used = [round(x, 4) for x in seen[step][b, :length].tolist()]
        assert len(row["tokens"]) == length and row["step"] == step
        assert row["advantage"] == used[0] and row.get("advantages", used) == used
        assert ("advantages" in row) == ("values" in row) == (loop is ppo)
        if not any("\ufffd" in token for token in row["tokens"]):
            assert "".join(row["tokens"]) == row["completion"] + "<|end|>" * bool(rollout.finished[b])


def test_values_are_those_of_the_critic_before_its_update(tmp_path):
    seen = []

    def advantage(rewards, values, *rest):
        seen.append(values)
        return ppo.gae(rewards, values, *rest)
    ppo.train(settings(ppo, tmp_path, run=str(tmp_path / "run")), reward=letter_e, advantage=advantage)
    samples = read_jsonl(tmp_path / "run/samples.jsonl", [])
    for i, row in enumerate(samples):
        assert row["values"] == [round(x, 4) for x in seen[i // 9][i % 9, :len(row["tokens"])].tolist()]
    assert any(value != 0 for row in samples[9:] for value in row["values"])


# --- one file, and safe -------------------------------------------------------------------------------------------

@LOOPS
def test_page_loads_nothing_from_elsewhere(loop, trained):
    text = page.run_page(trained[loop])
    tags, without_data = Elements(text).tags, text.replace(Elements(text).scripts[0], "")
    assert not {"link", "iframe", "img", "object", "embed", "base"} & {tag for tag, _ in tags}
    assert not any({"src", "href", "action", "srcset"} & attributes.keys() for _, attributes in tags)
    assert not re.search(r"https?:|//\w|url\(|@import|fetch\(|XMLHttp|import\(", without_data)
    policy, = [a["content"] for tag, a in tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none';") and "http" not in policy


def test_text_of_the_run_cannot_become_markup(tmp_path):
    plain = Elements(page.run_page(write_run(tmp_path / "plain")))
    folder = write_run(tmp_path / "a<b>&c", prompt=HOSTILE, tokens=[HOSTILE, "<b>"])
    (folder / "metrics.csv").write_text("step,reward,</script><b>\n0,1,2\n")
    (folder / "config.json").write_text(json.dumps(dict(group_size=2, sft="</script><b>")))
    text = page.run_page(folder)
    hostile = Elements(text)
    assert hostile.tags == plain.tags and hostile.scripts[1:] == plain.scripts[1:]
    assert "<title>a&lt;b&gt;&amp;c</title>" in text
    row = completions(data_of(text))[0]
    assert row["prompt"] == HOSTILE and row["tokens"] == [HOSTILE, "<b>"]
    # The script that draws puts text into the page as text; where it writes markup, only numbers go into it.
    markup = re.findall(r"innerHTML = `(.*?)`;", hostile.scripts[1], re.DOTALL)
    assert hostile.scripts[1].count("innerHTML") == len(markup) == 1
    assert not re.search(r"insertAdjacentHTML|outerHTML|document\.write|\beval\b|Function\(", hostile.scripts[1])
    assert not re.search(r"panel\.label|caption|run\.settings", markup[0])


def test_slider_and_choices_are_native_and_named(trained):
    tags = Elements(page.run_page(trained[ppo])).tags
    inputs = [attributes for tag, attributes in tags if tag == "input"]
    assert [a["type"] for a in inputs] == ["range", "radio", "radio"]
    names = [tag for tag, _ in tags if tag in ("label", "input")]
    assert names == ["label", "input"] * 3, "each input stands in a label of its own"
    assert ("html", dict(lang="en")) in tags


# --- size ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("steps, thinned", [(20, False), (150, True)])
def test_page_of_long_groups_stays_below_two_megabytes(steps, thinned, tmp_path):
    tokens = ["<|pad|>"] * 100
    folder = write_run(tmp_path / "run", steps, 8, "ppo", tokens, advantages=[-0.1234] * 100, values=[0.1234] * 100)
    text = page.run_page(folder)
    assert len(text.encode()) < 2_000_000
    data = data_of(text)
    shown = [step["step"] for step in data["shown"]]
    assert (data["shown_every"] > 1) == thinned and shown[0] == 0 and shown[-1] == steps - 1
    assert all(b - a == data["shown_every"] for a, b in zip(shown[:-1], shown[1:-1]))
    assert len(text.encode()) > 1_000_000 or not thinned, "no more is left out than has to be"
    assert data["curve_steps"] == list(range(steps))


def test_curves_of_a_long_run_are_thinned(tmp_path):
    data = data_of(page.run_page(write_run(tmp_path / "run", 5001)))
    assert len(data["curve_steps"]) <= page.MOST_POINTS + 1 and data["curve_steps"][-1] == 5000
    reward, = [panel["lines"]["reward"] for panel in data["panels"] if "reward" in panel["lines"]]
    assert len(reward) == len(data["curve_steps"]) and reward[-1] == 500


def test_panels_hold_what_was_measured_in_any_step():
    rows = [dict(step=i, reward="", thinking=i / 2, seconds_update=1.0, gap="" if i else 0.123456) for i in range(3)]
    assert page.panels(rows, is_rl=True) == [
        dict(label="thinking", main=True, lines=dict(thinking=[0, 0.5, 1])),
        dict(label="gap", main=False, lines=dict(gap=[0.1235, None, None]))]


def test_strongest_colour_is_that_of_the_largest_advantages_but_for_outliers():
    rows = [dict(advantage=0.0, advantages=[x / 100 for x in range(-99, 100)], values=[x / 10 for x in range(199)])]
    assert page.scales(rows) == dict(advantage=pytest.approx(0.97, abs=0.011), low=pytest.approx(0.2, abs=0.011),
                                     high=pytest.approx(19.6, abs=0.011))
    assert page.scales([dict(advantage=-3)])["advantage"] == 3 and page.scales([])["high"] == 0


# --- the command --------------------------------------------------------------------------------------------------

def test_command_writes_beside_the_run_or_where_it_is_told(trained, tmp_path, capsys):
    page.main([str(trained[grpo])])
    written = (trained[grpo] / "report.html").read_bytes()
    assert str(trained[grpo] / "report.html") in capsys.readouterr().out
    page.main([str(trained[grpo]), "--out", str(tmp_path / "page.html")])
    assert (tmp_path / "page.html").read_bytes() == written == page.run_page(trained[grpo]).encode()


def test_supervised_stage_gives_the_curves_alone(tmp_path):
    pretrain.train(pretrain.PretrainConfig(
        text=tiny.text_file(tmp_path / "text.txt"), run=str(tmp_path / "run"), steps=3, layers=1, heads=2, width=16,
        context=16, warmup=2, device="cpu"))
    data = data_of(page.run_page(tmp_path / "run"))
    assert data["shown"] == [] and data["algorithm"] == ""
    assert {"loss", "grad_norm"} <= {name for panel in data["panels"] for name in panel["lines"] if panel["main"]}


def test_samples_of_an_older_version_are_shown_as_whole_completions(tmp_path):
    folder = write_run(tmp_path / "run")
    rows = read_jsonl(folder / "samples.jsonl", [])
    tiny.jsonl(folder / "samples.jsonl", [{k: v for k, v in row.items() if k != "tokens"} for row in rows])
    assert [row["tokens"] for row in completions(data_of(page.run_page(folder)))] == [["a b"]] * 8


def test_a_completion_that_was_not_judged_is_shown(tmp_path):
    """It has no reward; the others' mean is the baseline, and nothing breaks."""
    def half(prompts, completions, **columns):
        return [None if i % 2 else 1.0 for i in range(len(completions))]
    grpo.train(tiny.settings(grpo, tmp_path, run=str(tmp_path / "run"), steps=2), reward=half)
    rows = page.read_samples(tmp_path / "run/samples.jsonl")
    assert {"reward" in row for row in rows} == {True, False} and page.run_page(tmp_path / "run")
    assert all(row["tokens"] == [row["completion"]] for row in rows if "reward" not in row)


SAMPLE = dict(step=1, prompt="p", completion="c", reward=1, advantage=0, tokens=["c"], advantages=[0.5], values=[1])
BROKEN = {     # (file, how its second line reads, what the message names)
    "not JSON": ("samples.jsonl", '{"step": 1, "prom', "samples.jsonl, line 2"),
    "a list for a prompt": ("samples.jsonl", dict(SAMPLE, prompt=["p"]), "samples.jsonl, line 2"),
    "a word for a reward": ("samples.jsonl", dict(SAMPLE, reward="much"), "samples.jsonl, line 2"),
    "far too much": ("samples.jsonl", dict(SAMPLE, reward=10**400), "samples.jsonl, line 2"),
    "not finite": ("samples.jsonl", dict(SAMPLE, advantage=float("nan")), "samples.jsonl, line 2"),
    "no step": ("samples.jsonl", dict(SAMPLE, step=None), "samples.jsonl, line 2"),
    "tokens that are no list": ("samples.jsonl", dict(SAMPLE, tokens="c"), "samples.jsonl, line 2"),
    "a token that is no string": ("samples.jsonl", dict(SAMPLE, tokens=[1]), "samples.jsonl, line 2"),
    "too few values": ("samples.jsonl", dict(SAMPLE, values=[]), "samples.jsonl, line 2"),
    "values that are no list": ("samples.jsonl", dict(SAMPLE, values=3), "samples.jsonl, line 2"),
    "a word for a number": ("metrics.csv", "1,high,", "metrics.csv, line 3"),
    "too few cells": ("metrics.csv", "1", "metrics.csv, line 3"),
    "too many cells": ("metrics.csv", "1,2,3,4", "metrics.csv, line 3"),
    "a step that is no number": ("metrics.csv", ",1,1", "metrics.csv, line 3"),
}


@pytest.fixture
def refused(capsys):
    """refused(words) runs the command, expects one line on standard error and that code, and returns the line."""
    def refused(*words, code=2):
        with pytest.raises(SystemExit) as stopped:
            run_command(lambda: page.main([str(word) for word in words]))
        error = capsys.readouterr().err
        assert stopped.value.code == code and error.startswith("error: ") and error.count("\n") == 1, error
        return error
    return refused


@pytest.mark.parametrize("name", BROKEN)
def test_broken_line_is_named(name, refused, tmp_path):
    file, line, named = BROKEN[name]
    folder = write_run(tmp_path / "run", algorithm="ppo", tokens=["c"], advantages=[0.5], values=[1.0])
    page.run_page(folder)                                                                  # whole, it can be shown
    lines = (folder / file).read_text().splitlines()
    lines[1 if file == "samples.jsonl" else 2] = line if isinstance(line, str) else json.dumps(line)
    (folder / file).write_text("\n".join(lines) + "\n")
    assert named in refused(folder)
    assert not (folder / "report.html").exists()


def test_missing_and_malformed_files_are_named(refused, tmp_path):
    assert "name the folder" in refused()
    assert "nowhere" in refused(tmp_path / "nowhere")
    for name in "config.json", "metrics.csv", "samples.jsonl":
        folder = write_run(tmp_path / "run")
        path = folder / name
        path.unlink()
        assert str(path) in refused(folder)
        path.mkdir()
        assert str(path) in refused(folder)
        path.rmdir()
        path.write_bytes(b"\xff\xfe\x00")
        assert str(path) in refused(folder)
        path.unlink()
    for text in "[]", '{"group_size": 0}', '{"group_size": "8"}':
        folder = write_run(tmp_path / "run")
        (folder / "config.json").write_text(text)
        assert "config.json" in refused(folder)
    folder = write_run(tmp_path / "run")
    (folder / "metrics.csv").write_text("")
    assert "no steps yet" in refused(folder)
    assert "no/such" in refused(write_run(tmp_path / "run"), "--out", tmp_path / "no/such/page.html", code=1)
