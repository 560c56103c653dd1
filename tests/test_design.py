"""The shape of the package: what may import what, how long it may get, and that grpo.py and ppo.py stay two versions of
one file. These tests read the source as text and as a syntax tree; they run nothing of it.
"""
import ast
import difflib
import re
import types
from pathlib import Path

import pytest

from grpo_min import grpo, ppo

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "grpo_min"
FLOORS = [      # lowest first; a module imports from lower floors only
    {"ranks"}, {"tokenizer", "config", "gold", "variants"}, {"model"}, {"plots"}, {"runs", "rollout"}, {"task"},
    {"rewards"}, {"metrics"},
    {"pretrain", "sft", "reward_model", "evaluate", "sample", "label"}, {"grpo", "ppo"},
    {"compare", "report", "page", "benchmark", "__main__"},
    {"study_core", "study_countdown", "study_gradient", "study_reward"}, {"study"},
]
SAME_FLOOR = {("__main__", "compare"), ("compare", "report"), ("__main__", "report"), ("benchmark", "report"),
              ("report", "page")}
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")


def source(name):
    return (PACKAGE / f"{name}.py").read_text(encoding="utf-8")


def imports(text):
    """The modules of the package that a source imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            origin = ".".join(filter(None, ["grpo_min" if node.level else "", node.module]))
            names = [f"{origin}.{alias.name}" for alias in node.names] if origin == "grpo_min" else [origin]
        found |= {name.split(".")[1] for name in names if name.startswith("grpo_min.")}
    return found


def floor(name):
    return next((i for i, names in enumerate(FLOORS) if name in names), None)


def wrong_imports(name, imported):
    """Those of the imported modules that do not stand below `name`."""
    return {other for other in imported if floor(other) is None or floor(other) >= floor(name)
            and (name, other) not in SAME_FLOOR}


# --- imports ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", MODULES)
def test_imports_go_down_the_floors(name):
    assert floor(name) is not None, f"{name} stands on no floor yet: add it to FLOORS"
    assert not wrong_imports(name, imports(source(name)))


def test_every_kind_of_import_is_seen():
    assert imports("import grpo_min.ppo as p, os\nfrom torch import nn") == {"ppo"}
    assert imports("from grpo_min import ppo, gold\nfrom grpo_min.runs import Run") == {"ppo", "gold", "runs"}
    assert imports("def f():\n    from .gold import x\n    from . import grpo") == {"gold", "grpo"}
    assert wrong_imports("grpo", {"ppo", "compare", "rewards", "nowhere"}) == {"ppo", "compare", "nowhere"}


def reachable(name):
    """Every module that importing `name` imports, directly or not."""
    seen, todo = set(), [name]
    while todo:
        for other in imports(source(todo.pop())) - seen:
            seen.add(other)
            todo.append(other)
    return seen


@pytest.mark.parametrize("name, other", [("grpo", "ppo"), ("ppo", "grpo")])
def test_no_path_leads_from_a_loop_to_the_other_or_to_the_hidden_score(name, other):
    found = reachable(name)
    assert "gold" not in found and "evaluate" not in found and other not in found
    assert {"rewards", "rollout", "model", "tokenizer"} <= found, "or the search has not followed the imports"


# --- length -------------------------------------------------------------------------------------------------------

def lines(path):
    return path.read_text(encoding="utf-8").splitlines()


# What is around the pipeline: nobody needs it to understand a stage.
UNCOUNTED = ("study", "study_core", "study_countdown", "study_gradient", "study_reward", "report", "page",
             "benchmark", "compare", "label", "variants", "task", "__main__")


def test_loops_and_package_stay_short():
    length = {name: len(lines(PACKAGE / f"{name}.py")) for name in MODULES}
    assert length["grpo"] <= 300 and length["ppo"] <= 380
    assert sum(n for name, n in length.items() if name not in UNCOUNTED) <= 2500


def test_lines_are_at_most_120_characters_long():
    long = [f"{path.relative_to(ROOT)}:{number}" for folder in ("grpo_min", "data", "tests")
            for path in sorted((ROOT / folder).glob("**/*.py")) for number, line in enumerate(lines(path), start=1)
            if len(line) > 120]
    assert not long, long


# --- two versions of one file -------------------------------------------------------------------------------------

CRITIC = ["critic", "values", "value network", "value_", "gae", "returns", "whiten", "explained_variance",
          "at_last_token", "gamma", "lambda", "lam:", "ppo", "scalargpt"]
BASELINE = ["group", "baseline", "grpo"]
VARIANTS = ["variants", "aggregation", "advantage: str", "ratio: str", "clip_eps_high", "clip-eps-high",
            "advantage=None", "config.advantage", "make_loss", "divisor", "refill", "dynamic", "dropped"]


def without(names, text):
    """The lines of a source, without the module's docstring and without the definitions of these functions."""
    body = ast.parse(text).body
    skipped = {number for i, node in enumerate(body) if i == 0 or getattr(node, "name", None) in names
               for number in range(node.lineno, node.end_lineno + 1)}
    return [line for number, line in enumerate(text.splitlines(), start=1) if number not in skipped]


def unexplained(first, second):
    """Lines that stand in one version only and speak neither of the critic nor of the baseline nor of variants."""
    words = re.compile("|".join(CRITIC + BASELINE + VARIANTS), re.IGNORECASE)
    differing = [line[2:].strip() for line in difflib.ndiff(first, second) if line[0] in "-+"]
    return {re.sub("-{4,}", "---", re.sub("  +", " ", line)) for line in differing if line and not words.search(line)}


EXPLAINED = {       # what remains: the shape of rewards and advantages, the critic's warm-up, what a checkpoint holds
    "# --- 6. move the policy ---", "with torch.no_grad():", "norm = 0.0",
    "norm = update(run, policy, optimizer, objective, config.max_grad_norm)",
    "charged = rewards # (B,)",
    "charged = rewards - config.beta * (charge * rollout.mask).sum(dim=1) # (B,)",
    "charged = charged - config.beta * charge * rollout.mask # (B, N)",
    "with Run(config, inputs, dict(policy=policy, optimizer=optimizer)) as run:",
    "with Run(config, inputs, parts) as run:",
    "# --- 5. the advantage is what a completion has above it ---", "if config.scale_advantages:",
    "advantages = advantages[:, None].expand_as(rollout.mask) # (B, N)",
    # GRPO's advantages can be exactly 0, PPO's are not
    "trained = rollout if config.beta > 0 else replace(rollout, mask=rollout.mask & (advantages != 0))",
    "for part, b in split(prompts, trained, config.minibatches): # b: the rows of the part",
    "for part, b in split(prompts, rollout, config.minibatches): # b: the rows of the part",
    # what dynamic sampling needs; the bounds of clip_low and clip_high
    "config, policy, reward, rows, step, batch, rollout, rewards, clock)", "part[2], config.clip_eps))",
    "from dataclasses import dataclass, replace", "from dataclasses import dataclass",
}
OWN = ["group_advantages", "gae", "at_last_token", "whiten", "value_loss", "explained_variance", "start_critic",
       "refill"]


def test_grpo_and_ppo_differ_in_the_critic_and_the_baseline_alone():
    assert unexplained(without(OWN, source("grpo")), without(OWN, source("ppo"))) <= EXPLAINED


def test_a_difference_in_anything_else_is_seen():
    text = source("ppo").replace("1 + clip_eps)", "2 + clip_eps)").replace("config.epochs", "config.passes")
    assert len(unexplained(without(OWN, source("grpo")), without(OWN, text)) - EXPLAINED) >= 3


def test_both_loops_define_the_same_functions_but_for_their_own():
    names = [[name for name, thing in vars(module).items() if isinstance(thing, types.FunctionType)
              and thing.__module__ == module.__name__] for module in (grpo, ppo)]
    common = [[name for name in own if name not in OWN] for own in names]
    assert common[0] == common[1] == ["policy_loss", "kl_estimate", "check", "train", "main"]


@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_banners_number_the_seven_steps_in_order(name):
    banners = re.findall(r"^ *# --- (\d)\. \S", source(name), re.MULTILINE)
    assert banners == list("1234567")


# --- safety -------------------------------------------------------------------------------------------------------

def calls(text):
    """(name of what is called, the names of its keyword arguments with their source) for every call in a source."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}


@pytest.mark.parametrize("name", MODULES)
def test_nothing_that_is_read_is_run(name):
    for function, keywords in calls(source(name)):
        assert function not in ("eval", "exec", "compile", "__import__", "os.system", "pickle.load", "pickle.loads")
        assert function != "torch.load" or keywords.get("weights_only") == "True"
        assert not function.startswith("subprocess.") or "shell" not in keywords
        assert not function.startswith(("runpy.", "importlib.")) or name == "task", "the reader's own file alone is run"


def test_checkpoints_are_loaded_somewhere():
    assert any(function == "torch.load" for name in MODULES for function, _ in calls(source(name)))
