"""Rewards read what was said and nothing else, and the figures of the evaluation are those of their definitions.

A right number must be the whole answer, whatever surrounds it; the learned reward must see END; pass@k is compared
with counting all subsets.
"""
import itertools
import math
import random

import numpy as np
import pytest
import torch

from grpo_min import evaluate as evaluation
from grpo_min import grpo, sample
from grpo_min.evaluate import evaluate, held_out, interval, majority, pass_at_k, show
from grpo_min.model import ScalarGPT
from grpo_min.rewards import correct, final_answer, learned, load_reward, score, weighted_sum, well_formed
from grpo_min.rollout import Prompts, Rollout, pad_completions
from grpo_min.run.checkpoint import load_model
from grpo_min.run.config import UserError
from grpo_min.run.data import read_jsonl
from grpo_min.run.files import DATA
from grpo_min.run.rng import generator
from tests import tiny
from tests.tiny import END, TOKENIZER

THOUGHT = "<think> 3 times 9 is 27, 27 plus 1 is 28</think>"


# --- rule-based ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("completion, right, formed", [
    (" 28", 1, 0),
    ("28", 1, 0),
    (THOUGHT + " 28", 1, 1),
    (THOUGHT + "28", 1, 1),
    ("<think> 1 plus 1 is 99</think> 28", 1, 1),                # only the answer counts, not the thoughts
    ("<think>\nfirst,\nthen.</think> 28", 1, 1),
    (THOUGHT + " 27", 0, 1),                                    # right in the thoughts, wrong in the answer
    (THOUGHT + " 128", 0, 1),
    (THOUGHT + " 28.", 0, 1),
    (THOUGHT, 0, 0),                                            # no answer at all
    (THOUGHT + "  ", 0, 0),
    ("28.", 0, 0), ("28.0", 0, 0), ("128", 0, 0), (" 128", 0, 0), (" 281", 0, 0), ("028", 0, 0), ("2 8", 0, 0),
    ("+28", 0, 0), ("-28", 0, 0), ("--28", 0, 0), ("2_8", 0, 0), ("0x1c", 0, 0), ("2.8e1", 0, 0), ("20+8", 0, 0),
    ("7*4", 0, 0), ("int(28)", 0, 0), ("[28]", 0, 0), ("28 28", 0, 0), ("28, 28", 0, 0), ("27 28", 0, 0),
    ("the answer is 28", 0, 0), ("２８", 0, 0), ("٢٨", 0, 0), ("28²", 0, 0), ("twenty-eight", 0, 0), ("2\n8", 0, 0),
    ("", 0, 0), (" ", 0, 0), ("\n", 0, 0), ("nan", 0, 0), ("28\x00", 0, 0), ("28<|pad|>", 0, 0), ("28<|end|>", 0, 0),
    ("<think></think> 28", 0, 0),                               # thinking of nothing
    ("<think> 28", 0, 0), ("<think>", 0, 0), ("</think> 28", 0, 0), (" 28</think>", 0, 0),      # half a pair
    ("28<think> 3 plus 4</think>", 0, 0), ("28 " + THOUGHT, 0, 0),                              # the wrong way round
    (THOUGHT + THOUGHT + " 28", 0, 0), (THOUGHT + " 28" + THOUGHT, 0, 0), (THOUGHT + " 28" + THOUGHT + " 28", 0, 0),
    ("<think> a <think> b</think> c</think> 28", 0, 0), ("<think><think> b</think> 28", 0, 0),  # nested
    ("<think> a</think></think> 28", 0, 0), (THOUGHT + " 28</think>", 0, 0), (THOUGHT + " <think>28", 0, 0),
    ("<THINK> 3</THINK> 28", 0, 0), ("< think> 3</think> 28", 0, 0),
])
def test_truth_table(completion, right, formed):
    assert correct(["?"], [completion], answer=["28"], finished=[True]) == [right]
    assert well_formed(["?"], [completion], finished=[True]) == [formed]
    assert correct(["?"], [completion], answer=["28"], finished=[False]) == [0]      # cut: there is no answer yet
    assert well_formed(["?"], [completion], finished=[False]) == [0]
    assert correct(["?"], [completion], answer=["28"]) == [right]                    # finished unless told otherwise


def test_other_answers():
    completions, answers = ["0", "00", "-3", "3", "7", "7"], ["0", "0", "-3", "-3", "7", "8"]
    assert correct([""] * 6, completions, answer=answers) == [1, 0, 1, 0, 1, 0]
    assert all(type(reward) is float for reward in correct([""] * 6, completions, answer=answers))


def test_final_answer():
    assert final_answer(" 28 ") == "28"
    assert final_answer(THOUGHT + " 27") == "27"
    assert final_answer(THOUGHT) == ""
    assert final_answer("<think> 28") is None


# Would hang, if the pattern tried every way to divide a text, or if what is said were made a number.
@pytest.mark.parametrize("hostile", ["9" * 10**6, "-" + "9" * 10**6, "<think>" * 150_000, "<think>" + "9" * 10**6,
                                     "<think>a</think>" * 60_000, "<think>" + "a" * 10**6 + "</think> " + "9" * 10**6,
                                     " " * 10**6, "<" * 10**6, "28" + "0" * 10**6, "0" * 10**6 + "28", "1e999999"])
def test_megabytes_are_wrong(hostile):
    assert correct([""], [hostile], answer=["28"]) == [0]
    assert well_formed([""], [hostile]) == [float(hostile.startswith("<think>a") and "</think> 9" in hostile)]


PIECES = ["28", "28", " 28", "28 ", "2", "8", "128", "0", " ", " ", "\n", "\t", "<think>", "</think>", "<", ">",
          "think", "+", "-", ".", ",", "=", "20+8", "answer", "\u0662\u0668", "\uff12\uff18", "\x00", "\u2028",
          "\ud800", "\U0001f600", "<|end|>", "<|pad|>", "1e1", "0x1c", "None", "{}", "%s", "\\d"]


def random_strings(count):
    rng = random.Random(0)

    def pieces(longest):
        return "".join(rng.choices(PIECES, k=rng.randint(0, longest)))
    return [pieces(longest) if longest else f"<think>{pieces(3)}</think>{pieces(2)}"
            for longest in rng.choices([0, 1, 2, 6, 30], k=count)]


def read_by_hand(text):
    """Without a regular expression: what was thought, or None, and what was answered. None if the tags are wrong."""
    if "<think>" not in text and "</think>" not in text:
        return None, text.strip()
    if not text.startswith("<think>") or text.count("<think>") != 1 or text.count("</think>") != 1:
        return None
    thought, answer = text[len("<think>"):].split("</think>")
    return (thought, answer.strip()) if thought else None


def test_random_strings():
    """10,000 of them, put together from what comes near to a right answer: nothing raises, no wrong one is accepted."""
    strings, blank = random_strings(10_000), [""] * 10_000
    columns = dict(answer=["28"] * 10_000)
    right, formed = correct(blank, strings, **columns), well_formed(blank, strings, **columns)
    expected = [read_by_hand(text) or (None, None) for text in strings]
    assert right == [float(answer == "28") for _, answer in expected]
    assert formed == [float(bool(thought and answer)) for thought, answer in expected]
    assert min(sum(right), sum(formed), sum(a * b for a, b in zip(right, formed))) > 50, "some have to be right"
    both = weighted_sum((correct, 1.0), (well_formed, 0.2))(blank, strings, **columns)
    assert {round(reward, 6) for reward in both} == {0.0, 0.2, 1.0, 1.2}
    cut = [False] * 10_000
    assert not any(correct(blank, strings, finished=cut, **columns) + well_formed(blank, strings, finished=cut))


@pytest.mark.parametrize("answer", ["0", "7", "28", "49"])
def test_prefixes_of_a_right_answer(answer):
    for whole in answer, f" {answer}", f"{THOUGHT} {answer}", f"<think> {answer} is {answer}</think> {answer}":
        prefixes = [whole[:n] for n in range(len(whole) + 1)]
        assert correct([""] * len(prefixes), prefixes, answer=[answer] * len(prefixes)) == [0.0] * len(whole) + [1.0]


def test_no_number_is_taken_for_another():
    for answer in map(str, range(50)):
        others = [str(n) for n in range(-60, 1300)] + [f"{answer}{sep}{n}" for sep in ".,/:e_ " for n in range(10)]
        assert sum(correct([""] * len(others), others, answer=[answer] * len(others))) == 1


def test_weighted_sum():
    both = weighted_sum((correct, 1.0), (well_formed, 0.2))
    completions = [" 28", THOUGHT + " 28", THOUGHT + " 27", " 27", THOUGHT + " 28"]
    rewards = both([""] * 5, completions, answer=["28"] * 5, finished=[True] * 4 + [False], operations=[2] * 5)
    assert rewards == pytest.approx([1.0, 1.2, 0.2, 0.0, 0.0])
    assert weighted_sum((correct, -2.0))([""], ["28"], answer=["28"]) == [-2.0]


# --- learned ------------------------------------------------------------------------------------------------------

ASKED = ["what does a cow eat?", "a", "please tell me, where does a bear live?", "what is a bee?"]
SAID = [" grass.", " a bear lives in forests. happy to help!", "", " a bee is an insect. who cares."]


@pytest.fixture
def reward_model(make):
    return make(ScalarGPT, context=64)


def by_hand(model, prompt, completion, finished):
    """The scalar at the last token of prompt and completion, run as one sequence."""
    tokenizer = model.tokenizer
    ids = torch.tensor([tokenizer.encode_prompt(prompt) + tokenizer.encode_completion(completion, finished)])
    states, _ = model.trunk.run(ids, torch.arange(ids.shape[1]))
    return model.scalar(states[0, -1]).item()


@pytest.mark.parametrize("batch_size", [1, 2, 3, 256])
def test_learned_reward_reads_the_text_and_end(reward_model, batch_size):
    finished = [True, True, True, False]
    scores = learned(reward_model, batch_size)(ASKED, SAID, finished=finished, animal=["cow"] * 4)
    assert scores == pytest.approx([by_hand(reward_model, *row) for row in zip(ASKED, SAID, finished)], abs=1e-4)
    assert all(type(score) is float for score in scores)


def test_learned_reward_reads_an_answer_that_is_given_twice_once(reward_model, watch):
    read = watch(reward_model, "last")
    prompts, completions = [ASKED[0], ASKED[1], ASKED[0], ASKED[0]], [SAID[0], SAID[0], SAID[0], SAID[1]]
    scores = learned(reward_model)(prompts, completions)
    assert [len(ids) for (_, ids, _), _ in read] == [3]
    assert scores[0] == scores[2] and scores == pytest.approx(
        [by_hand(reward_model, *row, True) for row in zip(prompts, completions)], abs=1e-4)


def test_learned_reward_tells_a_text_that_was_cut_from_the_same_that_ended(reward_model):
    """In one call, whichever comes first: an answer that is given twice is read once only if it ended alike."""
    for finished in [True, False, True, False], [False, True, False, True]:
        scores = learned(reward_model)([ASKED[0]] * 4, [SAID[0]] * 4, finished=finished)
        expected = [by_hand(reward_model, ASKED[0], SAID[0], end) for end in finished]
        assert scores == pytest.approx(expected, abs=1e-4) and abs(expected[0] - expected[1]) > 1e-3


def test_learned_reward_depends_on_finished(reward_model):
    reward = learned(reward_model)
    ended, cut = reward(ASKED, SAID), reward(ASKED, SAID, finished=[True, False, True, False])
    assert ended == reward(ASKED, SAID, finished=[True] * 4)
    assert [abs(a - b) > 1e-3 for a, b in zip(ended, cut)] == [False, True, False, True]


def test_learned_reward_reads_with_the_tokenizer_of_its_model():
    model = tiny.gpt(ScalarGPT, tokenizer=tiny.other_tokenizer(), context=128)
    torch.nn.init.normal_(model.scalar.weight)
    finished = [True, True, False, False]
    scores = learned(model)(ASKED, SAID, finished=finished)
    assert scores == pytest.approx([by_hand(model, *row) for row in zip(ASKED, SAID, finished)], abs=1e-4)
    assert np.std(scores) > 0.1


def test_a_run_refuses_a_reward_model_of_another_tokenizer_and_takes_one_of_a_shorter_context(tmp_path):
    for name, changes in ("other.pt", dict(tokenizer=tiny.other_tokenizer())), ("short.pt", dict(context=32)):
        path = tiny.checkpoint(tmp_path / name, ScalarGPT, **changes)
        config = tiny.settings(grpo, tmp_path, reward="learned", reward_model=path, run=str(tmp_path / "run"))
        if name == "other.pt":
            with pytest.raises(UserError, match="other.pt has another tokenizer than the policy") as error:
                grpo.train(config)
            assert "\n" not in str(error.value)
        else:
            assert load_reward(config, None, tiny.gpt(), "cpu")[2] == [config.prompts, path]
    assert not (tmp_path / "run").exists()


def test_learned_reward_alone_as_in_a_batch(reward_model):
    reward = learned(reward_model)
    alone = [reward([prompt], [completion])[0] for prompt, completion in zip(ASKED, SAID)]
    assert reward(ASKED, SAID) == pytest.approx(alone, abs=1e-4)


def test_learned_reward_cuts_each_text_by_itself(reward_model):
    """A completion that is too long is cut where the context ends, however long the other prompts are."""
    reward, long = learned(reward_model), " a cow eats grass." * 20
    alone = reward([ASKED[1]], [long])[0]
    ids = (TOKENIZER.encode_prompt(ASKED[1]) + TOKENIZER.encode_completion(long))[:64]
    states, _ = reward_model.trunk.run(torch.tensor([ids]), torch.arange(64))
    assert alone == pytest.approx(reward_model.scalar(states[0, -1]).item(), abs=1e-4)
    assert reward([ASKED[1], ASKED[2]], [long, SAID[2]])[0] == pytest.approx(alone, abs=1e-4)


def test_learned_reward_of_a_prompt_that_fills_the_context(reward_model):
    scores = learned(reward_model)(["what does a cow eat? " * 30, "a"], [" grass.", " grass."])
    assert len(scores) == 2 and all(map(math.isfinite, scores))


def test_learned_reward_of_anything(reward_model):
    """Whatever is said, and however long, the score is a finite number and that of the text alone."""
    said = random_strings(300) + ["9" * 10**6, "<think>" * 10**5, " " * 10**6]
    scores = learned(reward_model)(["a"] * len(said), said, finished=[True, False, True] * (len(said) // 3))
    assert len(scores) == len(said) and all(map(math.isfinite, scores)) and np.std(scores) > 0.01


def test_learned_reward_of_nothing_said(reward_model):
    assert learned(reward_model)(["a"], [""], finished=[False]) == [
        pytest.approx(by_hand(reward_model, "a", "", False), abs=1e-4)]


# --- calling a reward ---------------------------------------------------------------------------------------------

BATCH = [dict(prompt="p", answer="1", operations=2), dict(prompt="q", answer="2", operations=3)]


@pytest.fixture
def rollout():
    """Two prompts, three completions each."""
    finished = [True, True, True, False, True, True]
    ids, mask = pad_completions([" 1", " 2", "", " 4", " 5 and more", " 6"], TOKENIZER, finished=finished)
    return Rollout(ids, mask, torch.zeros(ids.shape), torch.tensor(finished))


def test_columns_are_repeated_for_each_group(rollout):
    calls = []

    def reward(prompts, completions, **columns):
        calls.append((prompts, completions, columns))
        return [0.5 * i for i in range(len(completions))]
    rewards, texts = score(reward, BATCH, rollout, 3, TOKENIZER)
    assert rewards.dtype == torch.float32 and rewards.tolist() == [0, 0.5, 1, 1.5, 2, 2.5]
    assert texts == [" 1", " 2", "", " 4", " 5 and more", " 6"]
    assert calls == [(list("pppqqq"), texts, dict(answer=list("111222"), operations=[2, 2, 2, 3, 3, 3],
                                                  finished=[True, True, True, False, True, True]))]


def test_score_with_the_real_rewards(rollout):
    assert score(correct, BATCH, rollout, 3, TOKENIZER)[0].tolist() == [1, 0, 0, 0, 0, 0]
    twos = [dict(prompt="p", answer="2"), dict(prompt="q", answer="4")]
    assert score(correct, twos, rollout, 3, TOKENIZER)[0].tolist() == [0, 1, 0, 0, 0, 0]         # " 4" was cut


@pytest.mark.parametrize("bad", [[1.0] * 5, [1.0] * 7, [], [0.0] * 5 + [math.nan], [math.inf] + [0.0] * 5,
                                 [[1.0]] * 6, ["right"] * 6, 1.0, None], ids=repr)
def test_a_wrong_reward_is_the_users_error(rollout, bad):
    with pytest.raises(UserError, match="6 finite numbers"):
        score(lambda prompts, completions, **columns: bad, BATCH, rollout, 3, TOKENIZER)


def test_ints_numpy_and_tensors_are_numbers(rollout):
    for good in [1, 0] * 3, [True, False] * 3, np.array([1.0, 0.0] * 3), torch.tensor([1.0, 0.0] * 3):
        assert score(lambda *_, **columns: good, BATCH, rollout, 3, TOKENIZER)[0].tolist() == [1, 0, 1, 0, 1, 0]


# --- evaluation ---------------------------------------------------------------------------------------------------

def test_pass_at_k_counts_subsets():
    for n in range(1, 7):
        for right, k in itertools.product(range(n + 1), range(1, n + 1)):
            subsets = list(itertools.combinations([True] * right + [False] * (n - right), k))
            assert pass_at_k(n, right, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_interval():
    rng = np.random.default_rng(0)
    values = rng.random(3200) < 0.3
    widths = []
    for n in 50, 200, 800, 3200:
        mean, low, high = interval(values[:n])
        assert low < mean < high and mean == pytest.approx(values[:n].mean())
        assert high - low == pytest.approx(2 * 1.96 * values[:n].std() / n ** 0.5, rel=0.15)     # the central limit
        widths.append(high - low)
    assert widths == sorted(widths, reverse=True)
    assert interval([0.25] * 9) == [0.25, 0.25, 0.25]
    assert interval(values[:50]) == interval(values[:50])


def test_intervals_cover_the_truth():
    """95% intervals hold the true mean in about 95 of 100 repetitions."""
    rng = np.random.default_rng(1)
    covered = [low <= 0.3 <= high for _, low, high in (interval(rng.random(100) < 0.3, 200) for _ in range(200))]
    assert 0.89 < np.mean(covered) < 0.99


@pytest.mark.parametrize("domain, names", [
    ("arithmetic", ["accuracy", "accuracy_greedy", "pass@2", "pass@4", "maj@4", "thinking", "length",
                    "truncated"]),
    ("animals", ["gold", "gold_greedy", "correct", "win_rate", "length", "truncated"]),
])
def test_evaluate_a_tiny_policy(make, domain, names):
    policy, opponent, rows = make(context=128), make(context=128, seed=1), held_out(domain, "val", 5)
    figures = evaluate(policy, domain, rows, opponent)
    assert list(figures) == names
    assert all(low <= mean <= high for mean, low, high in figures.values())
    assert figures == evaluate(policy, domain, rows, opponent)
    assert all(name in show(figures) for name in names)
    if domain == "animals":
        assert "win_rate" not in evaluate(policy, domain, rows)


def script(monkeypatch, **texts):
    """Let the policies "a" and "b" answer from a script: texts per policy, in the order of the rows -> the calls.

    What ends in a star was cut there. Greedy answers are the last of the 4 samples of each row.
    """
    calls = []

    def answers(policy, prompts, samples, temperature, max_new_tokens, seed=0):
        calls.append((policy, samples, temperature, seed))
        said = texts[policy][slice(None) if temperature else slice(3, None, 4)]
        assert len(said) == len(prompts) * samples
        return [text.rstrip("*") for text in said], [not text.endswith("*") for text in said], list(map(len, said))
    monkeypatch.setattr(evaluation, "answers", answers)
    return calls


def test_arithmetic_figures_by_hand(monkeypatch):
    script(monkeypatch, a=["1", "1", "2", "<think> x</think> 1", "1", "2", "2*", "1*"])
    rows = [dict(prompt="p", answer="1"), dict(prompt="q", answer="2")]
    figures = {name: mean for name, (mean, _, _) in evaluate("a", "arithmetic", rows).items()}
    # Of the 4 answers of each row, 3 and 1 are right: of the 6 pairs of answers, 6 and 3 hold a right one. Those that
    # have a vote are 1, 1, 2, 1 and 1, 2: a tie, which goes to the first.
    assert figures == pytest.approx({
        "accuracy": 0.5, "accuracy_greedy": 0.5, "pass@2": 0.75, "pass@4": 1, "maj@4": 0.5, "thinking": 1 / 8,
        "length": (1 + 1 + 1 + 19 + 1 + 1 + 2 + 2) / 8, "truncated": 2 / 8})


@pytest.mark.parametrize("answers, winner", [
    (["3", "4", "4", "5"], "4"), (["4", "3", "3", "4"], "4"), (["3", "4", "4", "3"], "3"), (["012", "12", "12"], "12"),
    (["", "", "7"], "7"), ([None, None, "7"], "7"), (["", None], None), ([], None),
])
def test_majority_by_hand(answers, winner):
    """A tie goes to the answer that was seen first; what says nothing has no vote."""
    assert majority(answers) == winner


@pytest.mark.parametrize("samples, right", [(4, 1 / 3), (5, 2 / 3)])
def test_the_vote_is_by_all_samples_of_a_prompt(samples, right, monkeypatch):
    """Three prompts whose answer is 1. Cut answers (*) and broken ones have no vote, and no votes are wrong."""
    said = [["2", "1", "<think>x</think>1", "2", "1"], ["1*", "1*", "2", "<think>1", "1*"], ["1", "", "", "", "3"]]
    texts = [text for row in said for text in row[:samples]]

    def answers(policy, prompts, samples, temperature, max_new_tokens, seed=0):
        chosen = texts if temperature else ["1"] * 3
        return [text.rstrip("*") for text in chosen], [not text.endswith("*") for text in chosen], [1] * len(chosen)
    monkeypatch.setattr(evaluation, "answers", answers)
    figures = evaluate("a", "arithmetic", [dict(prompt="p", answer="1")] * 3, samples=samples)
    assert figures[f"maj@{samples}"][0] == pytest.approx(right) and figures["accuracy_greedy"][0] == 1


def test_animal_figures_by_hand(monkeypatch):
    good, bad, best, rude = "grass.", "meat.", "grass. happy to help!", "grass. who cares."      # 6, 1, 7.5 and 4.5
    calls = script(monkeypatch, a=[good, bad, best, best, bad, bad, good, rude],
                   b=[good, good, good, good, bad, good, bad, bad])
    rows = [dict(prompt="p", animal="cow", attribute="food"), dict(prompt="q", animal="donkey", attribute="food")]
    figures = {name: mean for name, (mean, _, _) in evaluate("a", "animals", rows, "b", temperature=0.6).items()}
    assert calls == [("a", 4, 0.6, 0), ("a", 1, 0, 0), ("b", 4, 0.6, 1)]        # other random numbers for the opponent
    assert figures["gold"] == pytest.approx((6 + 1 + 7.5 + 7.5 + 1 + 1 + 6 + 4.5) / 8)
    assert figures["gold_greedy"] == pytest.approx((7.5 + 4.5) / 2)
    assert figures["correct"] == pytest.approx(5 / 8)
    assert figures["win_rate"] == pytest.approx((0.5 + 0 + 1 + 1 + 0.5 + 0 + 1 + 1) / 8)


def test_answers_are_those_of_their_rollouts(watch):
    """Sampled at the temperature that was asked for, with other random numbers for each batch and seed."""
    calls = watch(evaluation, "sample")
    found = evaluation.answers(tiny.gpt(context=128, ends=3), list("abcde"), 2, 0.6, seed=7, batch=2)
    assert any(found[1]) and not all(found[1]), "some have to be cut"
    assert [(len(prompts.ids), samples, temperature, g.initial_seed())
            for (_, prompts, samples, _, temperature, g), _ in calls] == [
        (n, 2, 0.6, generator(7, i).initial_seed()) for n, i in ((2, 0), (2, 2), (1, 4))]
    rollouts = [rollout for _, rollout in calls]
    assert found == ([text for r in rollouts for text in r.texts(TOKENIZER)],
                     [end for r in rollouts for end in r.finished.tolist()],
                     [n for r in rollouts for n in r.length.tolist()])


@pytest.mark.parametrize("domain", ["arithmetic", "animals"])
def test_held_out_rows_are_of_the_split_that_was_named(domain):
    for split in "val", "test":
        rows = held_out(domain, split, 3)
        assert rows == [row for row in read_jsonl(DATA / f"{domain}_{split}.jsonl", ["prompt"]) if row in rows]


def test_the_command_passes_its_settings_on(tmp_path, monkeypatch):
    policy, opponent = (tiny.checkpoint(tmp_path / f"{seed}.pt", seed=seed) for seed in (1, 2))
    calls = []
    monkeypatch.setattr(evaluation, "evaluate", lambda *arguments: calls.append(arguments) or {})
    evaluation.main(["--checkpoint", policy, "--opponent", opponent, "--domain", "animals", "--split", "val",
                     "--prompts", "3", "--samples", "5", "--temperature", "0.6", "--max-new-tokens", "7",
                     "--device", "cpu"])
    (first, domain, rows, second, *rest), = calls
    assert [domain, *rest] == ["animals", 5, 0.6, 7] and rows == held_out("animals", "val", 3)
    for model, path in (first, policy), (second, opponent):
        assert tiny.same(model.state_dict(), load_model(path).state_dict())


def test_answers_follow_their_prompts(make):
    """Row by row, `samples` each, whatever the batch; greedy answers are those of each prompt alone."""
    policy, prompts = make(context=128), ["a cow", "start with 3", "b", "what is a bee?", "c"]
    texts, finished, lengths = evaluation.answers(policy, prompts, 2, 0, batch=2)
    assert len(texts) == len(finished) == len(lengths) == 10
    assert texts[::2] == texts[1::2] == [evaluation.answers(policy, [prompt], 1, 0)[0][0] for prompt in prompts]


@pytest.mark.parametrize("count, expected", [(1, 1), (7, 7), (1000, 1000), (5000, 1000)])
def test_held_out_rows_are_spread_and_distinct(count, expected):
    rows = held_out("arithmetic", "val", count)
    prompts = [row["prompt"] for row in held_out("arithmetic", "val", 1000)]
    chosen = [prompts.index(row["prompt"]) for row in rows]
    assert len(set(chosen)) == len(rows) == expected
    assert chosen == sorted(chosen) and max(chosen) >= 1000 * (1 - 1 / expected) - 1


def test_end_is_the_last_token_read():
    """What `finished` means to the learned reward."""
    ids, mask = pad_completions([" grass.", " grass."], TOKENIZER, finished=[True, False])
    assert ids[0, mask[0]].tolist() == ids[1, mask[1]].tolist() + [END]
    assert Prompts.from_texts(["a"], TOKENIZER).ids[0].tolist() == TOKENIZER.encode_prompt("a")


def test_sample_scores_an_answer_that_was_cut_as_it_is(tmp_path, monkeypatch, capsys):
    """The reward model hears that it has not ended, and reads no END behind it."""
    heard = []
    monkeypatch.setattr(sample, "learned", lambda model: lambda prompts, texts, finished: heard.append(finished)
                        or [0.0] * len(texts))
    sample.main(["--checkpoint", tiny.checkpoint(tmp_path / "sft.pt", ends=0), "--prompt", "a", "--max-new-tokens", "2",
                 "--reward-model", tiny.reward_checkpoint(tmp_path / "reward.pt"), "--device", "cpu"])
    assert heard == [[False, False]] and capsys.readouterr().out.count("(score 0.00)") == 2
