"""Every known bug is caught: the tests of this folder are themselves tested here.

Each mutant of tests/mutants.py is one wrong line. With it in place the named test must fail, and by its assertion: a
crash would only show that the line is needed, not that anybody checks what it does. With the right line it must pass.
"""
import functools

import pytest

from tests.mutants import MUTANTS, PACKAGE, TRAPS, Mutant, applied, mutated, source


class Watch:
    """A pytest plugin that keeps how the tests of a session ended."""

    def __init__(self):
        self.ends = []

    def pytest_runtest_makereport(self, item, call):
        if call.excinfo is not None and not call.excinfo.errisinstance(pytest.skip.Exception):
            by_assertion = call.when == "call" and call.excinfo.errisinstance((AssertionError, pytest.fail.Exception))
            self.ends.append("fails" if by_assertion else f"crashes: {call.excinfo.exconly()}")
        elif call.when == "call":
            self.ends.append("passes")


def outcome(node):
    """Run a test in this process -> "passes", "fails" (by its assertion, before anything crashed) or "crashes: .."."""
    watch = Watch()
    # unraisableexception collects garbage ten times in every session, which takes longer than most of these tests.
    without = [word for name in ("cacheprovider", "terminal", "unraisableexception") for word in ("-p", f"no:{name}")]
    pytest.main([str(PACKAGE.parent / node), "-xs", *without], plugins=[watch])
    assert watch.ends, f"there is no such test: {node}"
    return watch.ends[-1]


right = functools.cache(outcome)        # many mutants have the same test


@pytest.mark.parametrize("mutant", MUTANTS, ids=[f"{m.trap}-{m.file}-{m.wrong[:40]}" for m in MUTANTS])
def test_mutant_is_caught(mutant):
    assert right(mutant.node) == "passes"
    with applied(mutant):
        assert outcome(mutant.node) == "fails"


def test_every_trap_has_a_mutant():
    assert {mutant.trap for mutant in MUTANTS} == set(TRAPS) == set(range(1, 27)) and len(MUTANTS) >= 65
    assert len({(mutant.file, mutant.wrong) for mutant in MUTANTS}) == len(MUTANTS)


@pytest.mark.parametrize("wrong, end", [
    ("baseline = groups.mean(dim=1, keepdim=True) + 0", "passes"),                 # no bug at all
    ("baseline = groups.mean(dim=1, keepdim=True) + 1", "fails"),
    ("baseline = nothing", "crashes: NameError: name 'nothing' is not defined"),
])
def test_how_a_test_ends_is_seen(wrong, end):
    mutant = Mutant(7, "grpo", "baseline = groups.mean(dim=1, keepdim=True)", wrong, "algorithms::groups_are_not_mixed")
    with applied(mutant):
        assert outcome(mutant.node) == end
    assert outcome(mutant.node) == "passes", "the right line is back"


def test_a_mutant_that_no_longer_fits_is_refused():
    with pytest.raises(ValueError, match="0 times"):
        mutated(Mutant(7, "grpo", "baseline = 0", "baseline = 1", "algorithms::groups_are_not_mixed"))
    with pytest.raises(ValueError, match="changes no function"):
        with applied(Mutant(7, "grpo", 'if __name__ == "__main__":', 'if __name__ == "main":', "")):
            pass


def test_only_one_line_differs():
    for mutant in MUTANTS:
        lines = zip(source(mutant).splitlines(), mutated(mutant).splitlines(), strict=True)
        assert sum(a != b for a, b in lines) == 1
