"""The shape of the house: how large each room may get, what may import what, and that grpo.py and ppo.py stay two
versions of one file. These tests read the source as text and as a syntax tree. `python -m pytest -s
tests/test_design.py` prints the sizes.
"""
import ast
import re
import subprocess
import sys
import types
from difflib import SequenceMatcher
from pathlib import Path

import pytest

from grpo_min import grpo, ppo

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "grpo_min"
MODULES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
           for path in sorted(PACKAGE.glob("**/*.py")) if path.stem != "__init__"}
CORE = {name: path for name, path in MODULES.items() if "." not in name}


def lines(path):
    return path.read_text(encoding="utf-8").splitlines()


def room(name):
    """core, run or lab."""
    return name.split(".")[0] if "." in name else "core"


# --- sizes --------------------------------------------------------------------------------------------------------

LIMITS = {"core": 2881, "run": 1404, "lab": 4881, "real": 800}      # lines; all files are counted
WIDTHS = {"core": 92, "run": 92, "lab": 120, "real": 92}


@pytest.mark.parametrize("name", LIMITS)
def test_rooms_stay_small(name):
    total = sum(len(lines(path)) for path in PACKAGE.glob("*.py" if name == "core" else f"{name}/**/*.py"))
    print(f"\n{name}: {total} lines of {LIMITS[name]}")
    assert total <= LIMITS[name]


def test_every_file_is_in_a_room():
    assert {room(name) for name in MODULES} == LIMITS.keys()
    print(f"\ncore: {len(CORE)} files of 17")
    assert len(CORE) <= 17


def test_readme_and_loops_stay_short():
    size = (ROOT / "README.md").stat().st_size
    grpo_lines, ppo_lines = (len(lines(CORE[name])) for name in ("grpo", "ppo"))
    print(f"\nREADME.md: {size} bytes of 9216; grpo.py {grpo_lines}, ppo.py {ppo_lines} lines")
    assert size <= 9 * 1024 and grpo_lines <= 222 and ppo_lines <= 282


@pytest.mark.parametrize("name", MODULES)
def test_lines_are_short(name):
    long = [number for number, line in enumerate(lines(MODULES[name]), start=1) if len(line) > WIDTHS[room(name)]]
    assert not long


@pytest.mark.parametrize("folder", ["data", "tests", "tutorials"])
def test_lines_elsewhere_are_at_most_120_characters_long(folder):
    long = [f"{path.relative_to(ROOT)}:{number}" for path in sorted((ROOT / folder).glob("**/*.py"))
            for number, line in enumerate(lines(path), start=1) if len(line) > 120]
    assert not long


@pytest.mark.parametrize("name", CORE)
def test_shapes_stand_directly_behind_the_statement(name):
    for line in lines(CORE[name]):
        assert not re.search(r"\S {3,}# \(", line), line


def test_importing_grpo_pulls_in_little():
    script = "import sys, grpo_min.grpo; print(*[name for name in sys.modules if name.startswith('grpo_min.')])"
    names = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT).stdout.split()
    names = {name.removeprefix("grpo_min.") for name in names} - {"run"}
    total = sum(len(lines(MODULES[name])) for name in names)
    print(f"\nimport grpo_min.grpo: {len(names)} files, {total} lines of 1720")
    assert len(names) > 10 and total <= 1720
    assert not names & {"gold", "evaluate", "ppo", "run.fast"} and not any(name.startswith("lab") for name in names)


def test_attention_is_a_textbook_one():
    attention = next(node for node in ast.parse(CORE["model"].read_text(encoding="utf-8")).body
                     if getattr(node, "name", "") == "Attention")
    length = attention.end_lineno - attention.lineno + 1
    docstrings = sum(node.body[0].end_lineno - node.body[0].lineno + 1 for node in ast.walk(attention)
                     if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node))
    print(f"\nAttention: {length} lines, {length - docstrings} without its docstrings")
    assert length - docstrings <= 25


# --- imports ------------------------------------------------------------------------------------------------------

def imports(text, top_only=False):
    """The modules of the package that a source imports, at its top or inside a function: {"grpo", "run.log", ..}."""
    imported, tree = set(), ast.parse(text)
    for node in tree.body if top_only else ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            origin = ".".join(filter(None, ["grpo_min" if node.level else "", node.module]))
            names = [f"{origin}.{alias.name}" for alias in node.names] + [origin]
        for name in names:
            name = name.removeprefix("grpo_min.")
            imported |= {name} & MODULES.keys()
    return imported


def imported_by(name, top_only=False):
    return imports(MODULES[name].read_text(encoding="utf-8"), top_only)


def reachable(name, top_only=False):
    """Every module that importing `name` imports, and, unless top_only, that calling its functions may import."""
    seen, todo = set(), [name]
    while todo:
        for other in imported_by(todo.pop(), top_only) - seen:
            seen.add(other)
            todo.append(other)
    return seen


def test_every_kind_of_import_is_seen():
    assert imports("import grpo_min.ppo as p, os\nfrom torch import nn") == {"ppo"}
    assert imports("from grpo_min import ppo, gold\nfrom grpo_min.run.log import Run") == {"ppo", "gold", "run.log"}
    assert imports("def f():\n    from grpo_min.run import fast\n    from grpo_min.lab.studies import common") == {
        "run.fast", "lab.studies.common"}
    assert {"rewards", "run.log", "run.fast", "run.plots"} <= reachable("grpo")


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_down(name):
    """The core imports itself and run/, the lab both; only the command of the whole pipeline starts the lab."""
    upwards = {other for other in imported_by(name) if room(other) == "lab" and room(name) != "lab"}
    assert not upwards or name == "__main__"
    text = MODULES[name].read_text(encoding="utf-8")
    assert not re.search(r"^\s*(from|import) (data|tests|tutorials)\b", text, re.MULTILINE)
    assert name not in reachable(name, top_only=True), "a circle"


@pytest.mark.parametrize("name, other", [("grpo", "ppo"), ("ppo", "grpo"), ("variants", "ppo")])
def test_no_path_leads_from_a_loop_to_the_other_or_to_the_hidden_score(name, other):
    modules = reachable(name)
    assert not modules & {"gold", "evaluate", "reward_model", other}


# --- two versions of one file -------------------------------------------------------------------------------------

CRITIC = ["critic", "values", "value_", "gae", "returns", "whiten", "explain", "at_last_token", "gamma", "lam:", "PPO",
          "runs/ppo"]
BASELINE = ["group_advantages", "a group needs", "baseline", "GRPO", "runs/grpo", "scale_advantages"]
OWN = ["group_advantages", "gae", "whiten", "value_loss", "start_critic"]


def without_own(text):
    """The lines of a source, without the module's docstring and without the functions that one version alone has."""
    body = ast.parse(text).body
    skipped = {number for i, node in enumerate(body) if i == 0 or getattr(node, "name", None) in OWN
               for number in range(node.lineno, node.end_lineno + 1)}
    return [line for number, line in enumerate(text.splitlines(), start=1) if number not in skipped]


def hunks(first, second):
    """(lines of the first alone, lines of the second alone) of every place where two sources differ."""
    matcher = SequenceMatcher(None, first, second, autojunk=False)
    return [(first[a:b], second[c:d]) for kind, a, b, c, d in matcher.get_opcodes() if kind != "equal"]


def unexplained(first, second):
    """Hunks of which neither side speaks of the critic or of the baseline."""
    words = re.compile("|".join(CRITIC + BASELINE))
    return [hunk for hunk in hunks(first, second)
            if "".join(sum(hunk, [])).strip() and not words.search("\n".join(sum(hunk, [])))]


def loops():
    return [CORE[name].read_text(encoding="utf-8") for name in ("grpo", "ppo")]


def test_grpo_and_ppo_differ_in_the_critic_and_the_baseline_alone():
    assert not unexplained(*map(without_own, loops()))


def test_a_difference_in_anything_else_is_seen():
    first, second = loops()
    for right, wrong in [("1 + clip_eps)", "2 + clip_eps)"), ("range(config.epochs)", "range(1)"),
                         ("config.group_size, config.max_new_tokens", "config.group_size, 7")]:
        changed = second.replace(right, wrong)
        assert changed != second and len(unexplained(without_own(first), without_own(changed))) == 1


def test_the_diff_is_short():
    done = subprocess.run(["diff", CORE["grpo"], CORE["ppo"]], capture_output=True, text=True)
    rows = done.stdout.splitlines()
    count, changed = sum(row[0].isdigit() for row in rows), sum(row[0] in "<>" for row in rows)
    print(f"\ndiff grpo.py ppo.py: {count} hunks of 14, {changed} lines of 120")
    assert 5 < count <= 14 and 50 < changed <= 120


def test_both_loops_define_the_same_functions_but_for_their_own():
    common = [[name for name, thing in vars(module).items() if isinstance(thing, types.FunctionType)
               and thing.__module__ == module.__name__ and name not in OWN] for module in (grpo, ppo)]
    assert common[0] == common[1] == ["policy_loss", "kl_estimate", "check", "collect", "train", "main"]


@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_banners_number_the_seven_steps_in_order(name):
    banners = re.findall(r"^ *# --- (\d)\. \S", CORE[name].read_text(encoding="utf-8"), re.MULTILINE)
    assert banners == list("1234567")


def test_the_clipped_surrogate_stands_twice():
    texts = [path.read_text(encoding="utf-8") for path in MODULES.values()]
    assert sum(len(re.findall(r"torch\.min\(\s*ratio", text)) for text in texts) == 2


# --- safety and style ---------------------------------------------------------------------------------------------

def calls(text):
    """(name of what is called, the names of its keyword arguments with their source) for every call in a source."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}


@pytest.mark.parametrize("name", MODULES)
def test_nothing_that_is_read_is_run(name):
    text = MODULES[name].read_text(encoding="utf-8")
    assert "mock" not in text, "an argument, not a patch"
    for function, keywords in calls(text):
        assert function not in ("eval", "exec", "compile", "__import__", "os.system", "pickle.load", "pickle.loads")
        assert function != "torch.load" or keywords.get("weights_only") == "True"
        assert not function.startswith("subprocess.") or "shell" not in keywords
        assert not function.startswith(("runpy.", "importlib.")) or name == "task", "the reader's own file alone is run"


def test_checkpoints_are_loaded_somewhere():
    functions = {function for path in MODULES.values() for function, _ in calls(path.read_text(encoding="utf-8"))}
    assert "torch.load" in functions


@pytest.mark.parametrize("name", MODULES)
def test_no_comprehension_stands_inside_a_comprehension(name):
    kinds = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, kinds):
            inner = [other for other in ast.walk(node) if other is not node and isinstance(other, kinds)]
            assert not inner, f"line {node.lineno}"
