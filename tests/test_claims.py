"""What is claimed in words is what was measured.

Two kinds of claims are checked. The rows of "what people say" have a check each, in CLAIMS. The sentences under the
tables of tutorials/results stand here once more, with brackets for their numbers. Right below a sentence is its check:
it asserts what the sentence says, and works its numbers out from the committed files. Filled in, the sentences must be
what stands under the table, and nothing else may stand there. A study that is run again may change an answer. Then the
words have to change, and so has the check.

The README is held to the same files, to the code that it shows and to the commands that it names.
"""
import csv
import importlib.util
import json
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from grpo_min.grpo import GRPOConfig
from grpo_min.lab.benchmark_real import KEPT
from grpo_min.lab.compare import ALGORITHMS
from grpo_min.lab.report import GOALS
from grpo_min.lab.studies.__main__ import STUDIES
from grpo_min.lab.studies import credit as credit_study, critic as critic_study, forgetting
from grpo_min.lab.studies.common import RESULTS, column_by, sides, spread
from grpo_min.variants import as_options
from grpo_min.variants import RECIPES

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / name for name in ("README.md", "tests/README.md", "tutorials/README.md", "tutorials/HOWTO.md",
                                  "tutorials/results/README.md", "tutorials/results/SPEED.md")]
WORDS = "zero one two three four five six seven eight nine ten".split()


def read(path):
    return path.read_text(encoding="utf-8")


# --- the files ----------------------------------------------------------------------------------------------------

def cell(text):
    """A cell of a CSV file: a number, if it looks like one."""
    try:
        return float(text)
    except ValueError:
        return text


def result(name):
    """The rows of NAME.csv."""
    with open(RESULTS / f"{name}.csv", newline="", encoding="utf-8") as file:
        return [{column: cell(text) for column, text in row.items()} for row in csv.DictReader(file)]


def study(name, figure, label="setting", **where):
    """{label: the figure of each seed} of the rows of NAME.csv in which the columns have these values."""
    return column_by([row for row in result(name) if where.items() <= row.items()], label, figure)


def table(name):
    """The rows of the tables of NAME.md, each a list of cells."""
    lines = read(RESULTS / f"{name}.md").splitlines()
    return [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]


def compared(reward, *keys):
    """{algorithm: a held-out figure, or a number of its own, of each seed}."""
    figures = {}
    for record in json.loads(read(RESULTS / f"comparison-{reward}.json")):
        if len(keys) == 2 and keys[0] in record["figures"] and keys[1] in record["figures"][keys[0]]:
            figures.setdefault(record["algorithm"], []).append(record["figures"][keys[0]][keys[1]][0])
        elif len(keys) == 1 and keys[0] in record:
            figures.setdefault(record["algorithm"], []).append(sum(record[keys[0]].values()))
    return figures


def means(values):
    """{label: the mean of its seeds}."""
    return {label: np.mean(numbers) for label, numbers in values.items()}


def percent(share):
    return f"{share:.1%}"


def range_of(values):
    """Shares of the seeds as the tables have them: 96.9% (96.8% to 97.0%)."""
    return spread(values, "{:.1%}")


def rounded(number):
    """As in the table of the gradient's noise: two decimals below ten, none above."""
    return f"{number:.2f}" if number < 10 else f"{number:.0f}"


# --- the sentences under the tables -------------------------------------------------------------------------------

SENTENCES = {}          # {table: [(sentence, check)]}


def under(name, sentence):
    """The sentence stands under the table NAME.md; the function that follows is its check and returns its numbers."""
    def register(check):
        SENTENCES.setdefault(name, []).append((sentence, check))
        return check
    return register


@under("comparison-correct", "GRPO and PPO end alike: {} and {} of the sampled answers are right, where the SFT model "
       "has {}.")
def both_end_alike():
    accuracy = means(compared("correct", "arithmetic_test", "accuracy"))
    assert abs(accuracy["GRPO"] - accuracy["PPO"]) < 0.01
    return [percent(accuracy[name]) for name in ("GRPO", "PPO", "SFT")]


@under("comparison-correct", "Nearly all of them think, {} and {}, and only the final answer is rewarded.")
def nearly_all_think():
    thinking = means(compared("correct", "arithmetic_test", "thinking"))
    assert thinking["SFT"] < 0.6 and min(thinking["GRPO"], thinking["PPO"]) > 0.98
    return [percent(thinking[name]) for name in ("GRPO", "PPO")]


@under("comparison-correct", "Chains with one more operation stay out of reach: {} are right before, {} and {} after.")
def longer_chains():
    accuracy = means(compared("correct", "arithmetic_longer", "accuracy"))
    assert max(accuracy.values()) < 0.1
    return [percent(accuracy[name]) for name in ("SFT", "GRPO", "PPO")]


@under("comparison-correct", "A step of PPO takes {} times as long as a step of GRPO, and its model state is {} times "
       "as large.")
def cost_of_the_critic():
    seconds, state = means(compared("correct", "seconds")), means(compared("correct", "state_bytes"))
    return [f"{values['PPO'] / values['GRPO']:.1f}" for values in (seconds, state)]


def completions_to_goal(reward):
    """{algorithm: completions of RL until the goal, of each seed}."""
    rows = [row for row in json.loads(read(RESULTS / f"comparison-{reward}.json")) if row.get("completions")]
    return column_by(rows, "algorithm", "goal_completions")


def to_the_goal(reward):
    """[goal, completions of GRPO, of PPO (means of the seeds), and those of the critic's training before]."""
    rows = [row for row in json.loads(read(RESULTS / f"comparison-{reward}.json")) if "run" in row]
    needed = means(completions_to_goal(reward))
    warm = next(row["warm_start"] for row in rows if row["algorithm"] == "PPO")
    return [GOALS[reward], f"{needed['GRPO']:.0f}", f"{needed['PPO']:.0f}", warm["completions"]]


@under("comparison-correct", "To a reward of {} GRPO takes {} completions and PPO {}, not counting the {} from which "
       "its critic has learned before.")
def goal_on_arithmetic():
    return to_the_goal("correct")


@under("comparison-correct", "Not even the oracle helps: in the last ten steps its values explain {} of the variance, "
       "where the critic explains {}, and yet {} are right in the end, and the reward takes {} completions.")
def not_even_the_oracle_helps():
    late = [row for row in result("comparison-correct") if row["step"] >= 70 and row["explained_variance"] != ""]
    explained = column_by(late, "algorithm", "explained_variance")
    oracle, critic = (np.mean(explained[name]) for name in ("PPO oracle", "PPO"))
    accuracy, needed = compared("correct", "arithmetic_test", "accuracy"), completions_to_goal("correct")
    for figures in accuracy, needed:
        assert sides({name: figures[name] for name in ("GRPO", "PPO oracle")})[:2] == ([], [])
    assert oracle > 0.2 and critic < 0.05
    return (f"{oracle:.2f}", f"{critic:.2f}", percent(np.mean(accuracy["PPO oracle"])),
            f"{np.mean(needed['PPO oracle']):.0f}")


@under("comparison-learned", "GRPO and PPO end within a point of each other: {} and {} of the way to the maximum.")
def both_end_alike_on_animals():
    way = means(compared("learned", "animals_test", "progress"))
    assert abs(way["GRPO"] - way["PPO"]) < 0.01
    return [percent(way[name]) for name in ("GRPO", "PPO")]


@under("comparison-learned", "To a reward of {} GRPO takes {} completions and PPO {}, not counting the {} from which "
       "its critic has learned before.")
def goal_on_animals():
    return to_the_goal("learned")


@under("comparison-learned", "`PPO 256x1` gets there in fewer completions than GRPO with every seed, {}, and ends no "
       "higher: {} of the way.")
def natural_ppo_gets_there_first():
    needed, gold = completions_to_goal("learned"), compared("learned", "animals_test", "gold")
    assert max(needed["PPO 256x1"]) < min(needed["GRPO"]) and np.mean(gold["PPO 256x1"]) <= np.mean(gold["GRPO"])
    way = means(compared("learned", "animals_test", "progress"))
    return f"{np.mean(needed['PPO 256x1']):.0f}", percent(way["PPO 256x1"])


@under("comparison-learned", "It has {} prompts in a step in place of {}, so this is not about the critic alone.")
def natural_ppo_has_other_prompts():
    return ALGORITHMS["PPO 256x1"][2]["prompts_per_step"], GRPOConfig().prompts_per_step


@under("comparison-learned", "The oracle explains {} of the variance in the last ten steps and the critic {}; it ends "
       "at {} of the way, and no difference to GRPO is shown.")
def the_oracle_on_animals():
    late = [row for row in result("comparison-learned") if row["step"] >= 140]
    explained = column_by(late, "algorithm", "explained_variance")
    way = compared("learned", "animals_test", "progress")
    assert sides({name: way[name] for name in ("GRPO", "PPO oracle")})[2] == ["PPO oracle"]
    oracle, critic = (np.mean(explained[name]) for name in ("PPO oracle", "PPO"))
    assert oracle > 2 * critic
    return f"{oracle:.2f}", f"{critic:.2f}", percent(np.mean(way["PPO oracle"]))


@under("comparison-learned", "DPO learns from the same choices as the reward model, and samples nothing. It covers {} "
       "of the way, less than GRPO with every seed.")
def dpo_on_animals():
    way = compared("learned", "animals_test", "progress")
    assert max(way["DPO"]) < min(way["GRPO"])
    return [percent(np.mean(way["DPO"]))]


def seconds_of_stages():
    return {stage.strip("*"): int(re.search(r"\d+", seconds)[0]) for stage, seconds in table("pipeline")[2:]}


@under("pipeline", "The first two stages take {} of the {} seconds.")
def first_stages():
    seconds = seconds_of_stages()
    return seconds["pretraining"] + seconds["supervised fine-tuning"], seconds["all"]


@under("pipeline", "[`before_after.md`](before_after.md) shows what each model answers.")
def answers_are_there():
    assert "**hello! what does a cow eat?**" in read(RESULTS / "before_after.md")
    return ()


def first_time():
    """{task: {algorithm: share}} of the first main job and the comparison's seeds: accuracy, and way to the maximum."""
    return dict(arithmetic=means(compared("correct", "arithmetic_test", "accuracy")),
                animals=means(compared("learned", "animals_test", "progress")))


EVERY, REWARD, RL, MEAN = "every stage", "the reward model", "RL", "mean of three"
RIGHT, WAY = "right, {}", "way to the maximum, {}"


def lucky(figure, varied=EVERY):
    """The figure of each pipeline."""
    return [row[figure] for row in result("luck") if row["varied"] == varied]


def median_of(values):
    """The median, and in brackets the lowest and the highest."""
    return f"{percent(np.median(values))} ({percent(min(values))} to {percent(max(values))})"


def width(values):
    return 100 * (max(values) - min(values))


@under("luck", "On arithmetic the five pipelines are within {} points of each other. On the animals they are not: GRPO "
       "covers {} to {} of the way, and within a pipeline it is at most {} points from PPO.")
def pipelines_differ():
    accuracies = lucky(RIGHT.format("GRPO")) + lucky(RIGHT.format("PPO"))
    one, other = lucky(WAY.format("GRPO")), lucky(WAY.format("PPO"))
    apart = max(abs(a - b) for a, b in zip(one, other))
    assert len(one) == 5 and width(accuracies) < 1.5 and 100 * apart < width(one)
    return f"{width(accuracies):.1f}", percent(min(one)), percent(max(one)), f"{100 * apart:.1f}"


@under("luck", "With another seed for the reward model alone the way varies by {} points, with another one for RL "
       "alone by {}, with all of them by {}.")
def whose_luck():
    return [f"{width(lucky(WAY.format('GRPO'), varied)):.1f}" for varied in (REWARD, RL, EVERY)]


@under("luck", "How often a reward model agrees with held-out choices does not foretell it: the one with which GRPO "
       "covers least, {}, agrees with {}, and the best of the others, {}, with {}.")
def agreement_does_not_foretell():
    agrees, way = lucky("reward model agrees", REWARD), lucky(WAY.format("GRPO"), REWARD)
    worst, best = int(np.argmin(way)), int(np.argmax(way))
    assert agrees[worst] > np.median(agrees)
    return percent(way[worst]), percent(agrees[worst]), percent(way[best]), percent(agrees[best])


@under("luck", "There is a simple remedy: rewarded by the mean score of three reward models GRPO covers {} to {}, "
       "where single ones lead it to {} to {}. It costs three trainings in place of one.")
def the_remedy():
    one, three = (lucky(WAY.format("GRPO"), varied) for varied in (REWARD, MEAN))
    assert width(three) < width(one) / 2 and np.median(three) > np.median(one) and min(three) > min(one)
    return [percent(value) for value in (min(three), max(three), min(one), max(one))]


@under("luck", "The committed weights are a good draw: with them GRPO covers {}, more than any of the five.")
def a_good_draw():
    way = np.mean(compared("learned", "animals_test", "progress")["GRPO"])
    assert way > max(lucky(WAY.format("GRPO")))
    return [percent(way)]


def tuned(column):
    """{(task, algorithm, settings): number}; settings without a critic are left out of the critic's columns."""
    return {(row["task"], row["algorithm"], row["settings"]): row[column] for row in result("tuning")
            if row[column] != ""}


@under("tuning", "No setting has more than {} points of accuracy above the defaults on arithmetic, or {} of gold score "
       "on the animals.")
def nothing_gains():
    quality, gains = tuned("quality"), {"arithmetic": [], "animals": []}
    for (task, algorithm, _), reached in quality.items():
        gains[task].append(reached - quality[task, algorithm, "defaults"])
    return f"{100 * max(gains['arithmetic']):.1f}", f"{max(gains['animals']):.2f}"


@under("tuning", "A learning rate three times as large reaches the goal in about half of the completions with either "
       "algorithm and on either task; on the animals it ends with less gold, {} and {} in place of {} and {}.")
def larger_rates():
    quality, goal = tuned("quality"), tuned("goal_completions")
    for task in "arithmetic", "animals":
        for algorithm in "GRPO", "PPO":
            assert 0.4 < goal[task, algorithm, "lr x 3"] / goal[task, algorithm, "defaults"] < 0.6
    rows = [[quality["animals", name, label] for name in ("GRPO", "PPO")] for label in ("lr x 3", "defaults")]
    assert max(rows[0]) < min(rows[1])
    return [f"{value:.2f}" for value in sum(rows, [])]


@under("tuning", "A third of the learning rate is slower, and ends lower.")
def smaller_rates():
    quality, goal = tuned("quality"), tuned("goal_completions")
    for task in "arithmetic", "animals":
        for algorithm in "GRPO", "PPO":
            first, second = [task, algorithm, "defaults"], [task, algorithm, "lr / 3"]
            assert quality[tuple(second)] < quality[tuple(first)] and goal[tuple(second)] > 2 * goal[tuple(first)]
    return ()


@under("tuning", "A lambda of `0.5` costs accuracy, {} in place of {}, and on the animals it leads the policy far from "
       "the reference, by {} nats in place of {}, to a gold score of {} in place of {}.")
def small_lambda():
    quality, kl = tuned("quality"), tuned("kl")
    pairs = [[figure[task, "PPO", label] for label in ("lam 0.5", "defaults")]
             for figure, task in ((quality, "arithmetic"), (kl, "animals"), (quality, "animals"))]
    assert pairs[0][0] < pairs[0][1] - 0.01 and pairs[1][0] > pairs[1][1] and pairs[2][0] < pairs[2][1] - 0.3
    return [form.format(value) for pair, form in zip(pairs, ("{:.1%}", "{:.1f}", "{:.2f}")) for value in pair]


@under("tuning", "More updates of the critic, or a higher rate for it, change little.")
def more_of_the_critic():
    quality = tuned("quality")
    for label in "critic_epochs 0", "critic_epochs 4", "critic_lr 0.0003", "critic_lr 0.001":
        assert abs(quality["arithmetic", "PPO", label] - quality["arithmetic", "PPO", "defaults"]) < 0.005
    return ()


@under("reward_model", "It agrees with {} of the choices, {} points below the ceiling, and the interval of this "
       "shortfall does not contain zero.")
def shortfall():
    _, agrees, _, missing = table("reward_model")[2]
    share, low, high = re.match(r"(\S+)% \(95% interval (\S+)% to (\S+)%\)", missing).groups()
    assert 0 < float(low) < float(high)
    return agrees.split()[0], share


@under("reward_model", "Where it is surest it is a little too sure: it predicts {} and {} happen, in {} of the {} "
       "pairs.")
def calibration():
    predicted, happened, pairs = table("reward_model")[-1]
    assert float(happened.rstrip("%")) < float(predicted.rstrip("%"))
    return predicted, happened, pairs, table("reward_model")[2][0]


@under("baselines", "Without a baseline the accuracy ends higher with every seed: {}, against {} with the group's "
       "mean.")
def better_without():
    accuracy = study("baselines", "accuracy")
    assert sides(accuracy)[:2] == (["none"], [])
    return range_of(accuracy["none"]), range_of(accuracy["mean"])


@under("baselines", "For the batch's mean and for the standard deviation no difference is shown.")
def no_difference_of_the_std():
    assert sides(study("baselines", "accuracy"))[2] == ["batch", "mean_std"]
    return ()


GROUP_MEAN = "group mean, leave-one-out"


def gradients():
    """{advantage: its row at each of the three moments}."""
    rows = {}
    for row in result("baselines-gradients"):
        rows.setdefault(row["advantage"], []).append(row)
    return rows


@under("baselines-gradients", "Without a baseline the gradient has less noise for its signal than with the group's "
       "mean: {} against {} at the start, {} against {} after {} steps, {} against {} after {}.")
def less_noise_without():
    numbers = []
    for without, with_mean in zip(gradients()["none"], gradients()[GROUP_MEAN]):
        assert without["noise_high"] < with_mean["noise_low"]
        numbers += [rounded(without["noise"]), rounded(with_mean["noise"]), f"{without['steps']:.0f}"]
    return numbers[:2] + numbers[3:]


@under("baselines-gradients", "A wrong completion has {} times the squared score of a right one at the start and {} "
       "times at the end, and a reward of zero silences just these completions.")
def loud_mistakes():
    first, _, last = gradients()["none"]
    return [f"{row['score_wrong'] / row['score_right']:.0f}" for row in (first, last)]


@under("baselines-gradients", "So the best constant baseline lies near zero, at {}, {} and {}, far below the mean "
       "reward.")
def best_constant():
    rows = gradients()["best constant"]
    assert all(row["best_high"] < row["mean_reward"] / 2 for row in rows)
    return [f"{row['best']:.2f}" for row in rows]


@under("baselines-gradients", "With the critic's values the gradient is less noisy than with the group's mean at the "
       "start, {} against {}, and after `15` steps, {} against {}, although the critic explains nothing any more by "
       "then; at the end no difference is shown.")
def noise_of_the_critic():
    critic, mean = gradients()["critic"], gradients()[GROUP_MEAN]
    assert all(row["more_signal_low"] > 0 for row in critic[:2]) and critic[1]["steps"] == 15
    assert critic[2]["more_signal_low"] < 0 < critic[2]["more_signal_high"]
    assert critic[0]["explained_variance"] > 0.4 and critic[1]["explained_variance"] < 0
    return [rounded(row["noise"]) for pair in zip(critic[:2], mean) for row in pair]


def without_start():
    """{setting: accuracy of each seed} of the study is_rl_needed, GRPO first, and the accuracy of the SFT model."""
    accuracy = study("is_rl_needed", "accuracy")
    return accuracy, accuracy.pop("SFT")[0]


def share_of_gain(setting):
    """How much of GRPO's gain over the SFT model a setting has: the mean over seeds."""
    accuracy, start = without_start()
    return np.mean((np.array(accuracy[setting]) - start) / (np.array(accuracy["GRPO"]) - start))


@under("is_rl_needed", "Online, fine-tuning on right answers ends higher than GRPO with every seed: {} against {}.")
def online_is_enough():
    accuracy, _ = without_start()
    assert sides(accuracy)[0] == ["filtered SFT, online"]
    return range_of(accuracy["filtered SFT, online"]), range_of(accuracy["GRPO"])


@under("is_rl_needed", "Offline it makes {} of GRPO's gain over the SFT model, and stays nearer to that model, {} "
       "nats against {}.")
def offline_is_nearer():
    kl = study("is_rl_needed", "kl")
    assert max(kl["filtered SFT, offline"]) < min(kl["GRPO"])
    return [f"{share_of_gain('filtered SFT, offline'):.0%}",
            *(f"{np.mean(kl[name]):.2f}" for name in ("filtered SFT, offline", "GRPO"))]


@under("is_rl_needed", "The same number of updates on the demonstrations makes {} of the gain.")
def demonstrations_alone():
    updates = study("is_rl_needed", "updates")
    assert updates["SFT for longer"] == updates["filtered SFT, offline"]
    return [f"{share_of_gain('SFT for longer'):.0%}"]


def passed(asked, k):
    """{setting: pass@k of each seed} on this kind of prompts."""
    return study("coverage", f"pass@{k}", asked=asked)


@under("coverage", "On arithmetic RL moves to the first sample what the SFT model has within {}: {} of the first "
       "samples are right after GRPO, {} before.")
def moved_to_the_first_sample():
    first = means(passed("arithmetic", 1))
    enough = min(k for k in (16, 32, 64, 128) if np.mean(passed("arithmetic", k)["SFT"]) > 0.999)
    return enough, percent(first["GRPO"]), percent(first["SFT"])


@under("coverage", "On longer chains the saying holds: with one sample GRPO and the base model are near each other, {} "
       "and {}, and with {} the base model has {}, the SFT model {}, and GRPO {}.")
def overtaken_on_longer_chains():
    one, many = (passed("longer chains", k) for k in (1, 128))
    assert abs(np.mean(one["GRPO"]) - one["base model"][0]) < 0.02
    assert max(many["GRPO"]) < many["base model"][0] < many["SFT"][0]
    return (*(percent(np.mean(one[name])) for name in ("GRPO", "base model")), 128,
            *(percent(np.mean(many[name])) for name in ("base model", "SFT", "GRPO")))


@under("coverage", "Of {} such chains GRPO solves {} that the SFT model never does, and loses {}; PPO and fine-tuning "
       "on right answers online do the same, offline less of it.")
def gained_and_lost():
    changed = {}
    for asked, before, after, gained, lost in (row for row in table("coverage") if len(row) == 5):
        if (asked, before) == ("longer chains", "SFT"):
            changed[after] = [int(re.match(r"\d+", text)[0]) for text in (gained, lost)]
            prompts = re.search(r"of (\d+),", gained)[1]
    online = [changed[name] for name in ("GRPO", "PPO", "filtered SFT, online")]
    assert all(gained <= 1 and lost > 90 for gained, lost in online)
    assert changed["filtered SFT, offline"][0] <= 1 and 50 < changed["filtered SFT, offline"][1] < 80
    return prompts, *changed["GRPO"]


@under("coverage", "But an answer is one of {} numbers: who only guesses passes with {} samples in {} of the prompts. "
       "Much of what is lost at large k may be guessing.")
def guessing():
    rows = [json.loads(line) for line in read(ROOT / "data/arithmetic_longer.jsonl").splitlines()]
    numbers = len({row["answer"] for row in rows})
    guess = 1 - (1 - 1 / numbers) ** 128
    assert guess > passed("longer chains", 128)["SFT"][0]
    return numbers, 128, percent(guess)


@under("coverage", "On Countdown, where guessing is hard, GRPO is ahead up to {} samples and from {} on behind, {} "
       "against {}.")
def overtaken_on_countdown():
    better, worse = [], []
    for k in (2 ** i for i in range(8)):
        share = passed("Countdown", k)
        before, after = share["SFT"] + share["SFT, sampled again"], share["GRPO"]
        better += [k] * (min(after) > max(before))
        worse += [k] * (max(after) < min(before))
    assert better == [2 ** i for i in range(len(better))] and worse[0] > better[-1]
    share = passed("Countdown", worse[0])
    return better[-1], worse[0], percent(np.mean(share["GRPO"])), percent(np.mean(share["SFT, sampled again"]))


@under("forgetting", "Where {} of the answers are right, nobody has forgotten anything yet: the gold score is {} to {} "
       "above that of the SFT model, and all are {} to {} nats away from it, but for the shorthand, which never gets "
       "there.")
def nothing_forgotten_at_equal_accuracy():
    rows = result("forgetting")
    there = {name: values for name, values in column_by(rows, "setting", "lost").items() if name != "SFT, shorthand"}
    assert {row["lost"] for row in rows if row["setting"] == "SFT, shorthand"} == {""}
    gained = [-np.mean(values) for values in there.values()]
    kl = [np.mean(study("forgetting", "kl_forward")[name]) for name in there]
    assert min(gained) > 0
    return [f"{forgetting.LEVEL:.0%}", *(f"{edge(values):.2f}" for values in (gained, kl) for edge in (min, max))]


@under("forgetting", "Going on costs fine-tuning on the demonstrations or on the model's own right answers {} and {} "
       "of gold, and GRPO, PPO and filtered SFT {}, {} and {}.")
def fine_tuning_goes_on_to_forget():
    lost = study("forgetting", "end_lost")
    own, demonstrations = lost["SFT, own right answers"], lost["SFT, demonstrations"]
    assert min(own + demonstrations) > 0 and min(demonstrations) > max(lost["GRPO"] + lost["filtered SFT, online"])
    names = "SFT, demonstrations", "SFT, own right answers", "GRPO", "PPO", "filtered SFT, online"
    return [f"{np.mean(lost[name]):.2f}" for name in names]


@under("forgetting", "The shorthand costs {}. It goes farthest from the SFT model, and over all runs a parabola of the "
       "KL explains {} of what is lost.")
def shorthand_forgets_most():
    lost = study("forgetting", "end_lost")
    shorthand = lost.pop("SFT, shorthand")
    assert min(shorthand) > max(max(values) for values in lost.values())
    share = re.search(r"the variance of the gold lost (\d+%) over KL\(SFT", read(RESULTS / "forgetting.md"))
    return f"{np.mean(shorthand):.2f}", share[1]


@under("forgetting", "Where little is lost, the KL does not tell it: fine-tuning on the model's own right answers ends "
       "nearer to the SFT model than GRPO, {} nats against {}, and has forgotten more with every seed.")
def nearer_and_forgets_more():
    ends = {(row["setting"], row["seed"]): row["kl_forward"] for row in result("forgetting-curves")}   # the last stays
    kl = {}
    for (setting, _), nats in ends.items():
        kl.setdefault(setting, []).append(nats)
    lost, own = study("forgetting", "end_lost"), "SFT, own right answers"
    assert max(kl[own]) < min(kl["GRPO"]) and min(lost[own]) >= max(lost["GRPO"])
    return [f"{np.mean(kl[name]):.2f}" for name in (own, "GRPO")]


@under("placebo", "A reward for the form alone or for length alone takes the share of right answers from {} to {} and "
       "{}, most of the way of the true one, {}: thinking is what makes answers right, and each of the three pays it.")
def form_and_length_nearly_do():
    accuracy, thinking = study("placebo", "accuracy"), study("placebo", "thinking")
    names = "form", "length", "right answers"
    assert all(min(thinking[name]) > 0.99 for name in names)
    assert max(accuracy["form"] + accuracy["length"]) < min(accuracy["right answers"])
    gain = np.mean(accuracy["length"]) - accuracy["SFT"][0]
    assert gain > 0.8 * (np.mean(accuracy["right answers"]) - accuracy["SFT"][0])
    return [percent(np.mean(accuracy[name])) for name in ("SFT", *names)]


@under("placebo", "Wrong answers are learned as readily: {} are right in the end, and hardly any thinks.")
def wrong_answers_are_learned():
    assert max(study("placebo", "thinking")["wrong answers"]) < 0.01
    return [percent(np.mean(study("placebo", "accuracy")["wrong answers"]))]


@under("placebo", "A coin teaches nothing: accuracy falls with every seed, to {}, with four minibatches to {}, and "
       "without the clip to {}.")
def a_coin_teaches_nothing():
    accuracy = study("placebo", "accuracy")
    coins = [accuracy[name] for name in ("coin", "coin, 4 minibatches", "coin, 4 minibatches, no clip")]
    assert max(max(each) for each in coins) < accuracy["SFT"][0]
    assert np.mean(coins[0]) > np.mean(coins[1]) > np.mean(coins[2])
    return [range_of(each) for each in coins]


@under("group_size", "No group size beats the default, `16 x 8`, with every seed.")
def no_group_size_is_better():
    accuracy = study("group_size", "accuracy")
    assert next(iter(accuracy)) == "16 x 8" and sides(accuracy)[0] == []
    return ()


@under("group_size", "The largest groups with the fewest prompts, `2 x 64`, are worse with every seed: {} against {}.")
def largest_groups():
    accuracy = study("group_size", "accuracy")
    assert sides(accuracy)[1] == ["2 x 64"]
    return range_of(accuracy["2 x 64"]), range_of(accuracy["16 x 8"])


@under("group_size", "For the other sizes no difference is shown.")
def other_group_sizes():
    assert len(sides(study("group_size", "accuracy"))[2]) == 4
    return ()


def learned_share(tasks, heads, updates=400):
    """What these heads have learned to explain on these tasks, as a share of what can be explained."""
    return [row["share"] for row in result("critic-training")
            if row["task"] in tasks and row["head"] in heads and row["updates"] == updates]


PER_STATE, SUMS = list(critic_study.HEADS)[:2], list(critic_study.HEADS)[2:]
DIGITS = [task for task in critic_study.TASKS if "digits" in task]


@under("critic", "On the digits a number per state learns next to nothing in `400` updates, with or without the "
       "language model's loss: at most {} of what can be explained, where the sum over tokens has {} or more.")
def heads_on_digits():
    per_state, sums = learned_share(DIGITS, PER_STATE), learned_share(DIGITS, SUMS)
    assert len(per_state) == len(sums) == 6 and max(per_state) < 0.1 and min(sums) > 0.9
    return percent(max(per_state)), percent(min(sums))


@under("critic", "On the animals the sum has {} and a number per state at most {}; on arithmetic it is {} and {}.")
def heads_on_words():
    shares = []
    for task in "animals", "arithmetic":
        shares += [max(learned_share([task], SUMS)), max(learned_share([task], PER_STATE))]
    assert shares[0] > shares[1] + 0.05 and abs(shares[2] - shares[3]) < 0.05
    return [percent(share) for share in shares]


@under("critic", "In PPO on arithmetic the critic that was trained before explains {} of the variance in the first ten "
       "steps, and {} in the last ten.")
def explained_in_the_first_steps():
    first, last = (np.mean(study("critic", name)[critic_study.TRAINED]) for name in ("ev_first", "ev_last"))
    assert first > 0.2 and last < 0.05
    return f"{first:.2f}", f"{last:.2f}"


@under("critic", "No difference in accuracy is shown between it, critics that start with values of zero, and GRPO "
       "without one.")
def critics_end_alike():
    accuracy = study("critic", "accuracy")
    assert next(iter(accuracy)) == critic_study.TRAINED
    own = {label: values for label, values in accuracy.items() if "shared" not in label}
    assert len(own) == 5 and sides(own)[:2] == ([], [])
    return ()


@under("critic", "A head on the policy's own trunk saves {} of {} MB; with a learning rate of up to `0.0001` for the "
       "values no difference is shown either, and with the policy's own, `0.0003`, it costs accuracy: {}.")
def shared_trunk():
    megabytes, accuracy = study("critic", "megabytes"), study("critic", "accuracy")
    shared = [label for label in accuracy if "shared trunk, critic_lr" in label]
    separate = megabytes[critic_study.TRAINED][0]
    _, below, alike = sides(accuracy)
    assert len(shared) == 4 and set(shared[:3]) <= set(alike) and shared[3] in below
    return f"{separate - megabytes[shared[0]][0]:.1f}", f"{separate:.1f}", range_of(accuracy[shared[3]])


# --- when a critic pays -------------------------------------------------------------------------------------------

TRAINED_CRITIC, TRUSTED = "PPO", "PPO, lambda 0"


def credit(figure, n=8, noise=0, **where):
    """{arm: a figure of each seed} of a cell of the study, with groups of 8 and a share for a reward, if not said."""
    return study("credit", figure, "arm", **{**dict(n=n, noise=noise, kind="share", G=8), **where})


def cells_of_credit():
    """[(digits, noise)] of the map."""
    return [(n, noise) for n in credit_study.LENGTHS for noise in credit_study.NOISES]


def needed(n, noise, *arms):
    """Completions to the goal, means of the seeds."""
    found = means(credit("completions", n, noise))
    return [f"{found[arm]:.0f}" for arm in arms]


def fewer_with_every_seed(first, second):
    """Does the first need fewer in every seed than the second in any?"""
    return max(first) < min(second)


@under("credit", "With a critic that was trained before and lambda `0.95` PPO needs fewer completions of RL than GRPO "
       "in {} of {} cells of the map; at `16` digits it does with every seed: {} against {} without noise, {} against "
       "{} with the most.")
def a_trained_critic_saves_completions():
    ahead = [means(credit("completions", *cell)) for cell in cells_of_credit()]
    fewer = sum(found[TRAINED_CRITIC] < found["GRPO"] for found in ahead)
    for noise in 0, 3:
        found = credit("completions", 16, noise)
        assert fewer_with_every_seed(found[TRAINED_CRITIC], found["GRPO"])
    return fewer, len(ahead), *needed(16, 0, TRAINED_CRITIC, "GRPO"), *needed(16, 3, TRAINED_CRITIC, "GRPO")


@under("credit", "At `32` digits and the most noise it explains nothing, and GRPO needs fewer: {} against {}.")
def a_critic_that_has_learned_nothing_harms():
    found = credit("completions", 32, 3)
    assert np.mean(credit("explained", 32, 3)["PPO"]) < 0
    assert fewer_with_every_seed(found["GRPO"], found[TRAINED_CRITIC])
    return needed(32, 3, "GRPO", TRAINED_CRITIC)


@under("credit", "A critic that starts with values of zero does not help: at `8` digits PPO then needs {} without "
       "noise, GRPO {}, PPO with the trained critic {}, and no baseline at all {}.")
def an_untrained_critic_does_not_help():
    arms = ["PPO, untrained critic", "GRPO", TRAINED_CRITIC, "no baseline"]
    found = [credit("completions")[arm] for arm in arms]
    assert min(found[0]) > max(found[1]) >= min(found[1]) >= max(found[2]) and min(found[3]) > max(found[0])
    assert np.mean(credit("explained")[arms[0]]) < 0.02
    return needed(8, 0, *arms)


@under("credit", "Lambda zero trusts the critic alone, and then noise costs hardly anything: at `8` digits {} without "
       "and {} with the most, where GRPO needs {} and {}.")
def trusting_the_critic_takes_the_noise_away():
    for noise in 0, 3:
        found = credit("completions", 8, noise)
        assert fewer_with_every_seed(found[TRUSTED], found["GRPO"])
    return [needed(8, noise, arm)[0] for arm in (TRUSTED, "GRPO") for noise in (0, 3)]


@under("credit", "The oracle, which samples the values anew, needs {} and {} there with lambda zero, about as many as "
       "the trained critic.")
def the_oracle_is_no_better():
    for noise in 0, 3:
        oracle, trained = (credit("completions", 8, noise)[arm] for arm in ("PPO, oracle, lambda 0", TRUSTED))
        assert abs(np.mean(oracle) - np.mean(trained)) <= 128, "a step"
    return [needed(8, noise, "PPO, oracle, lambda 0")[0] for noise in (0, 3)]


@under("credit", "Larger groups leave the critic less to add: in groups of `2` GRPO needs {} and PPO {}, in groups of "
       "`64` {} and {}.")
def groups_and_the_critic():
    found = {G: credit("completions", G=G) for G in credit_study.GROUPS}
    gain = [np.mean(found[G]["GRPO"]) - np.mean(found[G]["PPO"]) for G in (2, 4, 8, 16, 32, 64)]
    assert min(gain[:2]) > max(gain[2:]) and fewer_with_every_seed(found[2]["PPO"], found[2]["GRPO"])
    return [f"{np.mean(found[G][arm]):.0f}" for G in (2, 64) for arm in ("GRPO", "PPO")]


@under("credit", "If all answers have to be right, no difference to GRPO is shown, neither of no baseline nor of PPO "
       "nor of the oracle.")
def all_or_nothing():
    for n in 2, 4:
        found = credit("completions", n, kind="all")
        assert len(found) == 4 and sides(found)[:2] == ([], [])
    return ()


@under("credit", "At the start the gradient of a batch of `8` digits has a noise-to-signal of {} with the group's "
       "mean, {} with the critic and lambda zero, and {} with no baseline; with the most noise it is {}, {} and {}.")
def noise_of_the_gradient_on_digits():
    found = []
    for noise in 0, 3:
        rows = {row["advantage"]: row for row in result("credit-noise") if (row["n"], row["noise"]) == (8, noise)}
        mean, critic, none = (rows[name] for name in ("group mean", "PPO, lambda 0", "none"))
        assert critic["high"] < mean["low"] and mean["value"] < none["value"]
        found += [f"{row['value']:.1f}" for row in (mean, critic, none)]
    return found


@under("credit", "But the {} completions of the critic's training are more than GRPO needs in any cell, and in "
       "seconds GRPO is first in all of them, even without that training.")
def the_training_costs_more_than_it_saves():
    before = {int(cells[7]) for cells in table("credit") if len(cells) == 10 and " of " in cells[4]}
    for cell in cells_of_credit():
        completions, seconds = means(credit("completions", *cell)), means(credit("seconds", *cell))
        assert completions["GRPO"] < min(before)
        assert seconds["GRPO"] < min(seconds[TRAINED_CRITIC], seconds[TRUSTED])
    return before


@under("recipes", "Only DAPO ends higher than `no recipe` with every seed: {} against {}.")
def dapo_is_better():
    accuracy = study("recipes", "accuracy")
    assert next(iter(accuracy)) == "no recipe" and sides(accuracy)[:2] == (["dapo"], [])
    return range_of(accuracy["dapo"]), range_of(accuracy["no recipe"])


@under("recipes", "Its dynamic sampling took {} times as many completions.")
def dapo_takes_more():
    completions = means(study("recipes", "completions"))
    return [f"{completions['dapo'] / completions['no recipe']:.1f}"]


@under("recipes", "For the other {} recipes no difference is shown.")
def other_recipes():
    return [WORDS[len(sides(study("recipes", "accuracy"))[2])]]


def cosines():
    """{moment: {(recipe, recipe): cosine}}, and the directions of each moment: sets of recipes with a cosine of 1."""
    pairs, directions = {}, {}
    for row in result("recipes-one-update"):
        pairs.setdefault(row["when"], {})[row["recipe"], row["other"]] = row["cosine"]
    for moment, cosine in pairs.items():
        directions[moment] = set()
        for recipe in {recipe for recipe, _ in cosine}:
            alike = [other for name, other in cosine if name == recipe and cosine[name, other] > 0.9999]
            directions[moment].add(tuple(alike))
    return pairs, directions


@under("recipes-one-update", "With a ratio of one, the {} recipes, `no recipe` among them, have {} directions, and no "
       "cosine is below {}.")
def directions_at_first():
    pairs, directions = cosines()
    cosine = pairs["with a ratio of 1"]
    count = len({recipe for recipe, _ in cosine})
    return WORDS[count], WORDS[len(directions["with a ratio of 1"])], f"{min(cosine.values()):.3f}"


@under("recipes-one-update", "After {} updates they have {}, and the cosines go down to {}, between `gspo` and "
       "`cispo`.")
def directions_later():
    pairs, directions = cosines()
    moment = list(pairs)[1]
    lowest = min(pairs[moment], key=pairs[moment].get)
    assert set(lowest) == {"gspo", "cispo"}
    return WORDS[int(re.search(r"\d+", moment)[0])], WORDS[len(directions[moment])], f"{pairs[moment][lowest]:.3f}"


@under("recipes-one-update", "The narrow clip of `gspo` then leaves out {} of the tokens.")
def gspo_leaves_out():
    rows = [row for row in result("recipes-one-update") if row["when"] == "after 3 updates"]
    left_out = {row["recipe"]: row["left_out"] for row in rows}
    assert max(left_out, key=left_out.get) == "gspo"
    return [f"{left_out['gspo']:.0%}"]


@under("length", "With `sequence` wrong answers end longer than with `token` or `constant` with every seed: {} tokens "
       "against {} and {}.")
def sequence_mean_is_longer():
    length = study("length", "length_wrong")
    assert min(length["sequence"]) > max(length["token"] + length["constant"])
    return [f"{np.mean(length[name]):.1f}" for name in ("sequence", "token", "constant")]


@under("length", "Against `sum`, {}, no difference is shown.")
def sum_is_as_long():
    length = study("length", "length_wrong")
    assert next(iter(length)) == "sum" and "sequence" in sides(length)[2]
    return [f"{np.mean(length['sum']):.1f}"]


@under("length", "In accuracy no difference is shown.")
def lengths_are_as_accurate():
    assert sides(study("length", "accuracy"))[:2] == ([], [])
    return ()


def penalties(figure):
    """{(beta, charged in): the figure of each seed}, no penalty first."""
    values = {}
    for row in result("kl"):
        values.setdefault((row["beta"], row["charged_in"]), []).append(row[figure])
    return values


@under("kl", "The penalty keeps the policy near the SFT model: {} nats without it, and with the largest beta {} if it "
       "is charged in the loss and {} if in the reward.")
def penalty_keeps_near():
    kl = penalties("kl")
    largest = max(beta for beta, _ in kl)
    assert all(max(kl[largest, place]) < min(kl[0, "nowhere"]) for place in ("loss", "reward"))
    return [f"{np.mean(kl[key]):.2f}" for key in ((0, "nowhere"), (largest, "loss"), (largest, "reward"))]


@under("kl", "To the gold score it makes no difference that the seeds show, with one exception: the largest beta in "
       "the loss costs some, {} against {}.")
def penalty_and_gold():
    gold = penalties("gold")
    assert sides(gold)[:2] == ([], [(0.3, "loss")]) and max(beta for beta, _ in gold) == 0.3
    return spread(gold[0.3, "loss"], "{:.2f}"), spread(gold[0, "nowhere"], "{:.2f}")


PLAIN, PENALISED, BEST = "RL, beta 0", "RL, beta 0.3", "best of n"


def searched(figure, arm):
    """{choices: the figure of each seed} of one way to search."""
    return study("overoptimisation", figure, "pairs", arm=arm)


@under("overoptimisation", "Without a KL penalty gold falls from its best while the reward model's score goes on "
       "rising, with every seed and every number of choices.")
def over_optimised():
    lost, rise = searched("lost", PLAIN), searched("proxy_since_best", PLAIN)
    assert all(min(lost[choices] + rise[choices]) > 0 for choices in lost)
    return ()


@under("overoptimisation", "With {} choices every policy ends below the SFT model, by {} on average.")
def worse_than_before():
    gold = searched("gold", PLAIN)
    choices, = [choices for choices in gold if max(gold[choices]) < 0]
    return f"{choices:.0f}", f"{-np.mean(gold[choices]):.2f}"


@under("overoptimisation", "With `beta 0.3` less than half of the loss is left, and at {} and {} choices gold ends "
       "higher with every seed.")
def penalty_saves():
    plain, penalised = means(searched("lost", PLAIN)), means(searched("lost", PENALISED))
    assert all(penalised[choices] < plain[choices] / 2 for choices in plain)
    before, after = searched("gold", PLAIN), searched("gold", PENALISED)
    higher = [choices for choices in before if min(after[choices]) > max(before[choices])]
    return [f"{choices:.0f}" for choices in sorted(higher, reverse=True)]


@under("overoptimisation", "The forms describe best-of-n well, with a mean `R^2` of {}, and RL less well, with {} and "
       "{}.")
def forms_of_gao():
    fit = means(study("overoptimisation", "r2", "arm"))
    assert fit[BEST] > 0.9 > max(fit[PLAIN], fit[PENALISED])
    return [f"{fit[arm]:.2f}" for arm in (BEST, PLAIN, PENALISED)]


DPO, NEAR = "DPO, beta 0.5", "gold_at_1.5"        # an arm, and gold at an equal KL


@under("overoptimisation", "DPO with `beta 0.5` has learned from the same choices. At `1.5` nats it has more gold than "
       "RL or PPO with every seed at {} and {} choices, {} and {}; at {} it has {}, and best of n has {}.")
def dpo_at_equal_kl():
    ahead, own = [], searched(NEAR, DPO)
    most = max(own)
    for choices in own:
        others = study("overoptimisation", NEAR, "arm", pairs=choices)
        if min(own[choices]) > max(max(others[arm]) for arm in (PLAIN, PENALISED, "PPO, beta 0") if arm in others):
            ahead.append(choices)
    best = np.mean(searched(NEAR, BEST)[most])
    assert len(ahead) == 2 and most not in ahead and best > np.mean(own[most])
    return [f"{choices:.0f}" for choices in ahead] + [f"{np.mean(own[choices]):.2f}" for choices in ahead] + [
        f"{most:.0f}", f"{np.mean(own[most]):.2f}", f"{best:.2f}"]


@under("overoptimisation", "It over-optimises as well: with its authors' `beta 0.1`, {} choices and {} nats at the "
       "end, gold falls by {}, with RL without a penalty by {}.")
def dpo_over_optimises():
    lost, kl = (study("overoptimisation", name, "arm", pairs=1000) for name in ("lost", "kl"))
    far = "DPO, beta 0.1"
    assert min(lost[far]) > 0 and min(lost[PLAIN]) > 0
    return 1000, f"{np.mean(kl[far]):.0f}", *(f"{np.mean(lost[arm]):.2f}" for arm in (far, PLAIN))


@under("overoptimisation", "PPO goes where GRPO goes: it ends with {} of gold gained, GRPO with {}.")
def ppo_goes_there_too():
    gold = study("overoptimisation", "gold", "arm", pairs=1000)
    assert sides({PLAIN: gold[PLAIN], "PPO": gold["PPO, beta 0"]})[2] == ["PPO"]
    return [f"{np.mean(gold[arm]):.2f}" for arm in ("PPO, beta 0", PLAIN)]


@under("noise", "One wrong choice in ten costs more than a third of the gain: the policy covers {} of the way to the "
       "maximum in place of {}.")
def one_in_ten():
    way = study("noise", "way", "rate")
    assert max(way[0.9]) < min(way[1.0]) and np.mean(way[0.9]) < np.mean(way[1.0]) * 2 / 3
    return range_of(way[0.9]), range_of(way[1.0])


@under("noise", "The reward model agrees with gold more often than its annotators with every seed only where these "
       "are right in {} of the pairs: {}.")
def averages_out():
    agreement = study("noise", "agreement", "rate")
    rate, = [rate for rate, shares in agreement.items() if min(shares) > rate]
    return f"{rate:.0%}", range_of(agreement[rate])


@under("noise", "Where they are right in {} or more, it agrees less often than they do.")
def agrees_less():
    agreement = study("noise", "agreement", "rate")
    less = [rate for rate, shares in agreement.items() if max(shares) < rate]
    assert less == [rate for rate in agreement if rate >= min(less)]
    return [f"{min(less):.0%}"]


def countdown(column):
    """The cells of a column of the table countdown.md: of the fine-tuned model, and of GRPO."""
    headings, _, *rows = table("countdown")
    position = headings.index(column) - len(headings)                 # the first heading is empty
    return [row[position] for row in rows[:2]]


@under("countdown", "GRPO solves more with every seed: {}, before it {}.")
def solves_more():
    before, after = countdown("solved")
    lowest = re.search(r"\((\S+)% to", after)[1]
    assert float(lowest) > float(before.rstrip("%"))
    return after, before


@under("countdown", "It also thinks more, {} in place of {}.")
def thinks_more():
    before, after = countdown("thinking")
    assert float(re.search(r"\((\S+)% to", after)[1]) > float(before.rstrip("%"))
    return after, before


@under("countdown", "Most problems stay unsolved.")
def most_stay_unsolved():
    assert float(re.search(r"to (\S+)%", countdown("solved")[1])[1]) < 50
    return ()


def real(column, algorithm, setting="main"):
    """The figures of each seed of a setting of the study of a real model."""
    return [row[column] for row in result("real") if (row["algorithm"], row["setting"]) == (algorithm, setting)]


@under("real", "GRPO goes from {} right to {} in {} minutes, on words that it has never been asked for.")
def learned_within_minutes():
    before, after, minutes = real("test_right", "before"), real("test_right", "GRPO"), real("minutes", "GRPO")
    assert before[0] < 0.1 and min(after) > 0.85 and max(minutes) < 15 and len(after) == 3
    return percent(before[0]), range_of(after), f"{np.mean(minutes):.1f}"


@under("real", "That costs {} nats per answer, and variety: of four answers to a prompt {} differ, where all four did, "
       "and {} of all answers follow one pattern.")
def what_it_costs():
    different, commonest = real("test_different", "GRPO"), real("test_commonest", "GRPO")
    assert real("test_different", "before") == [4] and max(different) < 3 and min(commonest) > 0.25
    return (f"{np.mean(real('test_kl', 'GRPO')):.0f}", f"{np.mean(different):.1f}", f"{np.mean(commonest):.0%}")


@under("real", "The rule has a hole, and it is found: with the first seed that pattern is `A _ and a _.`, which has no "
       "verb.")
def without_a_verb():
    patterns = [row["pattern"] for row in result("real-answers") if row["algorithm"] == "GRPO"]
    assert max(patterns, key=patterns.count) == "A _ and a _." and patterns.count("A _ and a _.") >= 5
    return ()


@under("real", "With one seed each: a third of the learning rate gets {} right and keeps {} patterns, "
       "where the main run keeps {}; `beta 0.05` gets {} right and keeps {}.")
def other_settings_of_a_real_model():
    right = {name: real("right", "GRPO", name)[0] for name in ("lr 1e-5", "beta 0.05")}
    patterns = {name: real("patterns", "GRPO", name)[0] for name in ("main", "lr 1e-5", "beta 0.05")}
    assert max(right.values()) < min(real("right", "GRPO")) and min(patterns["lr 1e-5"], patterns["beta 0.05"]) > 4 * (
        patterns["main"])
    return (percent(right["lr 1e-5"]), f"{patterns['lr 1e-5']:.0f}", f"{patterns['main']:.0f}",
            percent(right["beta 0.05"]), f"{patterns['beta 0.05']:.0f}")


@under("real", "Adapters (`lora 8, lr 3e-4`) end where all weights end, {} right.")
def adapters_are_enough():
    right, = real("right", "GRPO", "lora 8, lr 3e-4")
    assert min(real("right", "GRPO")) - 0.02 < right < max(real("right", "GRPO")) + 0.02
    return [percent(right)]


@under("real", "PPO ends as high, {}, further from the model before with every seed, {} nats; in variety no difference "
       "is shown.")
def ppo_goes_further():
    right, kl, different = (real(f"test_{name}", "PPO") for name in ("right", "kl", "different"))
    for name, values in ("right", right), ("different", different):
        assert sides({"GRPO": real(f"test_{name}", "GRPO"), "PPO": values})[:2] == ([], [])
    assert min(kl) > max(real("test_kl", "GRPO"))
    return range_of(right), f"{np.mean(kl):.0f}"


@under("real", "Its critic explains nothing, and has to learn slowly so as not to harm: at the policy's own rate "
       "(`critic_lr 3e-5`) it takes {} completions until half of the answers in a step are right, where the main runs "
       "take {} and GRPO {}.")
def critic_has_to_learn_slowly():
    curves, needed = result("real-curves"), {}
    for name in "PPO main", "PPO critic_lr 3e-5", "GRPO main":
        runs = [row for row in curves if row["setting"] == name]
        needed[name] = [min(row["completions"] for row in runs if row["seed"] == seed and row["reward"] >= 0.5)
                        for seed in sorted({row["seed"] for row in runs})]
    explained = [row["explained_variance"] for row in curves
                 if row["setting"] == "PPO main" and row["explained_variance"] != ""]        # or all rewards are equal
    assert np.mean(explained) < 0.05 and needed["PPO critic_lr 3e-5"][0] > max(needed["PPO main"] + needed["GRPO main"])
    return [f"{np.mean(needed[name]):.0f}" for name in ("PPO critic_lr 3e-5", "PPO main", "GRPO main")]


@under("real", "That run keeps {} patterns with {} right; whether this is more than luck, one seed does not say.")
def a_run_that_stays_varied():
    patterns, right = (real(name, "PPO", "critic_lr 3e-5")[0] for name in ("patterns", "right"))
    rows = [row for row in result("real") if row["right"] > 0.9]
    assert right > 0.9 and patterns > 2 * sorted(row["patterns"] for row in rows)[-2]
    return f"{patterns:.0f}", percent(right)


@under("minutes", "All together take {} minutes, and `overoptimisation` and `noise` take {} of them.")
def minutes_of_studies():
    minutes = {name.strip("*"): float(cell) for name, cell in table("minutes")[2:]}
    longest = sorted(minutes, key=minutes.get)[-3:]
    assert longest == ["noise", "overoptimisation", "all"]
    return f"{minutes['all']:.0f}", f"{minutes['noise'] + minutes['overoptimisation']:.0f}"


def benchmark():
    """{(name, layers x width, group size, new tokens): record}."""
    records = {}
    for record in json.loads(read(RESULTS / "benchmark.json"))["records"]:
        work = record["work"]
        records[record["name"], f"{work['layers']} x {work['width']}", work["group_size"], work["new"]] = record
    return records


SMALL, LARGE = ("3 x 96", 8, 24), ("4 x 128", 16, 8)


@under("benchmark", "A step of PPO takes {} times as long as the same step of GRPO.")
def step_of_ppo():
    records = benchmark()
    return [f"{records[('PPO', *SMALL)]['step'][0] / records[('GRPO', *SMALL)]['step'][0]:.1f}"]


@under("benchmark", "A step of TRL's GRPO takes {} times as long as ours on the model of `4 x 128` and {} times on "
       "that of `3 x 96`; `generate()` takes {} and {} "
       "times as long as our sampling.")
def others():
    records = benchmark()
    steps = [records[("TRL GRPO", *work)]["step"][0] / records[("GRPO", *work)]["step"][0] for work in (LARGE, SMALL)]
    samplings = [records[("generate()", *work)]["seconds"]["sample"] / records[("GRPO", *work)]["seconds"]["sample"]
                 for work in (LARGE, SMALL)]
    return [f"{ratio:.1f}" for ratio in steps + samplings]


@under("benchmark", "The matrix products alone would take {} of the update's time and {} of the sampling's, and their "
       "share grows with the width of the model.")
def products():
    records = benchmark()
    share = records[("GRPO", *SMALL)]["share_of_products"]
    for phase in "update", "sample":
        shares = [records["GRPO", f"3 x {width}", 8, 24]["share_of_products"][phase] for width in (64, 96, 128, 192)]
        assert shares == sorted(shares)
    return f"{share['update']:.0%}", f"{share['sample']:.0%}"


def real_benchmark():
    """{(name, tokens of a prompt): record}, and the records of memory {(name, changed settings): record}."""
    found = json.loads(read(RESULTS / "benchmark_real.json"))
    usual = dict(beta=0.0, microbatches=2, lora=0)
    memory = {}
    for record in found["memory"]:
        changes = [f"{name} {value}" for name, value in record["settings"].items() if value != usual[name]]
        memory[record["name"], *changes] = record
    return {(record["name"], record["length"]): record for record in found["records"]}, memory


@under("benchmark_real", "The matrix products alone would take {} of the sampling's time.")
def products_of_a_real_model():
    records, _ = real_benchmark()
    shortest = min(length for name, length in records if name == "GRPO")
    assert records["GRPO", shortest]["share"] >= 0.6
    return [f"{records['GRPO', shortest]['share']:.0%}"]


@under("benchmark_real", "A step of PPO takes {} times as long as one of GRPO.")
def step_of_ppo_on_a_real_model():
    records, _ = real_benchmark()
    shortest = min(length for name, length in records if name == "PPO")
    return [f"{records['PPO', shortest]['step'][0] / records['GRPO', shortest]['step'][0]:.1f}"]


def trl_to_ours(kept):
    """{tokens of a prompt: TRL's seconds / ours, at its quicker batch}, TRL keeping memory as is done here, or not."""
    records, _ = real_benchmark()
    ratios = {}
    for (name, length), record in records.items():
        if name.startswith("TRL") and (KEPT in name) == kept:
            ratio = record["step"][0] / records["GRPO", length]["step"][0]
            ratios[length] = min(ratio, ratios.get(length, ratio))
    return dict(sorted(ratios.items()))


@under("benchmark_real", "A step of TRL's GRPO takes {} times as long as ours where prompts have {} tokens, and {} "
       "times where they have {}.")
def trl_on_a_real_model():
    ratios = trl_to_ours(kept=False)
    first, *_, last = ratios
    assert ratios[first] >= 2.5 and list(ratios.values()) == sorted(ratios.values()) and len(ratios) == 3
    return f"{ratios[first]:.1f}", first, f"{ratios[last]:.1f}", last


@under("benchmark_real", "Part of that is memory, which is kept here from one tensor to the next (`keep_memory` in "
       "[`cores.py`](../../grpo_min/run/cores.py)): if TRL keeps it in the same way, its step takes {} times as long "
       "as ours where prompts have {} tokens.")
def trl_with_memory_kept():
    (length, ratio), = trl_to_ours(kept=True).items()
    assert 2 < ratio < trl_to_ours(kept=False)[length]
    return f"{ratio:.1f}", length


@under("benchmark_real", "In the first step the update in two parts has the largest need, {} MB where sampling has {}; "
       "with PPO it is the critic's, {}, when the policy's gradients and moments are there already.")
def memory_by_phase():
    _, memory = real_benchmark()
    ours, theirs = memory["GRPO",]["phases"], memory["PPO",]["phases"]
    assert max(ours, key=ours.get) == "update" and max(theirs, key=theirs.get) == "critic"
    return f"{ours['update']:.0f}", f"{ours['sample']:.0f}", f"{theirs['critic']:.0f}"


@under("benchmark_real", "An update in eight parts in place of one needs {} MB at the peak in place of {}.")
def memory_of_microbatches():
    _, memory = real_benchmark()
    parts = ["microbatches 1"], [], ["microbatches 4"], ["microbatches 8"]
    peaks = [memory["GRPO", *changes]["peak"] for changes in parts]
    assert peaks == sorted(peaks, reverse=True)
    return f"{peaks[-1]:.0f}", f"{peaks[0]:.0f}"


@under("benchmark_real", "Beside activations PPO holds {} MB and GRPO {}; with adapters of rank eight these are {} and "
       "{}, and a reference takes {} MB more, where it takes {} with all weights.")
def memory_of_adapters():
    _, memory = real_benchmark()
    held = {key: sum(record["state"].values()) for key, record in memory.items()}
    more = [held["GRPO", "beta 0.01", *lora] - held["GRPO", *lora] for lora in (["lora 8"], [])]
    return [f"{number:.0f}" for number in (held["PPO",], held["GRPO",], held["PPO", "lora 8"], held["GRPO", "lora 8"],
                                           *more)]


@under("threads", "A process that uses one core for some seconds of pretraining makes the main job take {} times as "
       "long, one that always does {} times, and one core alone {} times.")
def sharing():
    rows = [(int(seconds), float(times)) for _, seconds, times in table("threads")[2:]]
    assert [times for _, times in rows] == [pytest.approx(seconds / rows[0][0], abs=0.01) for seconds, _ in rows]
    assert rows[1][1] <= 1.25
    return [f"{times:.2f}" for _, times in rows[1:]]


def prose():
    """{table: what stands under it, up to the next heading, without pictures}."""
    texts = {}
    for page in PAGES:
        for name, text in re.findall(r"<!-- end of (\S+)\.md -->(.*?)(?=^#|\Z)", read(page), re.DOTALL | re.MULTILINE):
            texts[name] = " ".join(re.sub(r"^!\[.*\)$", "", text, flags=re.MULTILINE).split())
    return texts


def test_every_table_has_its_sentences():
    assert set(prose()) == set(SENTENCES)


@pytest.mark.parametrize("name", SENTENCES)
def test_the_sentences_under_a_table_say_what_its_file_says(name):
    assert prose()[name] == " ".join(sentence.format(*check()) for sentence, check in SENTENCES[name])


def test_no_number_of_a_sentence_is_typed():
    for sentences in SENTENCES.values():
        for sentence, _ in sentences:
            assert not re.search(r"\d", re.sub("`[^`]*`", "", sentence)), f"{sentence}: the names of settings alone"


# --- what people say ----------------------------------------------------------------------------------------------

def less_memory():
    state = compared("correct", "state_bytes")
    grpo = next(record for record in json.loads(read(RESULTS / "comparison-correct.json")) if "run" in record)
    weights = grpo["state_bytes"]["policy"] / 4
    return [round(state[name][0] / weights) for name in ("GRPO", "PPO")] == [20, 36]


def as_good():
    apart = [lucky(WAY.format(name)) for name in ("GRPO", "PPO")]
    by = [a - b for a, b in zip(*apart)]
    return (all(abs(share["GRPO"] - share["PPO"]) < 0.01 for share in first_time().values())
            and max(abs(a - b) for a, b in zip(*(lucky(RIGHT.format(name)) for name in ("GRPO", "PPO")))) < 0.01
            and min(by) < 0 < max(by) and max(map(abs, by)) < 0.035)


def no_good_critic_needed():
    not_even_the_oracle_helps()
    accuracy, explained = study("critic", "accuracy"), means(
        {label: values for label, values in study("critic", "ev_first").items() if "" not in values})
    _, below, alike = sides(accuracy)
    own = [label for label in accuracy if label != critic_study.TRAINED and "shared" not in label]
    shared = [label for label in accuracy if "shared trunk, critic_lr" in label]
    return (explained[critic_study.TRAINED] > 0.2 > max(value for label, value in explained.items()
                                                        if label != critic_study.TRAINED)
            and set(own + shared[:3]) <= set(alike) and shared[3] in below)


def a_quarter_fewer_at_a_price():
    fewer = [means(credit("completions", n, noise)) for n, noise in cells_of_credit() if n in (4, 8, 16)]
    noisy = [means(credit("completions", n, 3)) for n in (4, 8, 16)]
    return (all(found["PPO"] < found["GRPO"] for found in fewer)
            and all(found[TRUSTED] < 0.75 * found["GRPO"] for found in noisy))     # the rest: sentences under the table


def less_noise_and_much_less_later():
    without, with_mean = gradients()["none"], gradients()[GROUP_MEAN]
    return ([b["noise"] / a["noise"] > 3 for a, b in zip(without, with_mean)] == [False, True, True]
            and all(a["noise_high"] < b["noise_low"] for a, b in zip(without, with_mean))
            and all(row["score_wrong"] > 5 * row["score_right"] for row in without))


def better_with_no_baseline():
    return "none" in sides(study("baselines", "accuracy"))[0]


def online_it_has_to_be():
    accuracy, _ = without_start()
    _, below, _ = sides(accuracy)
    return ("filtered SFT, online" not in below
            and np.mean(accuracy["filtered SFT, online"]) >= np.mean(accuracy["GRPO"])
            and "filtered SFT, offline" in below and 0.75 < share_of_gain("filtered SFT, offline") < 0.95)


def std_makes_no_difference():
    return "mean_std" in sides(study("baselines", "accuracy"))[2]


def not_larger_is_better():
    accuracy = study("group_size", "accuracy")
    return max(accuracy["2 x 64"]) < max(accuracy["64 x 2"]) and max(accuracy["2 x 64"]) < min(accuracy["32 x 4"])


def recipes_alike():
    pairs, directions = cosines()
    completions, accuracy = study("recipes", "completions"), study("recipes", "accuracy")
    return (len(directions["with a ratio of 1"]) == 4 and min(pairs["with a ratio of 1"].values()) > 0.9
            and len(accuracy) == 8 and sides(accuracy)[:2] == (["dapo"], [])
            and min(completions["dapo"]) > 3 * max(completions["grpo"]))


def longer_than_two_of_three():
    length = study("length", "length_wrong")
    return (all(min(length["sequence"]) > max(length[name]) for name in ("token", "constant"))
            and "sequence" in sides(length)[2])


def peaks():
    """{choices: [distance at which the gold score of each seed is highest]}, without a KL penalty."""
    curves, distance = {}, {}
    for point in result("overoptimisation-curves"):
        if point["arm"] == PLAIN:
            curves.setdefault((point["pairs"], point["seed"]), []).append(point)
    for (choices, _), points in curves.items():
        distance.setdefault(choices, []).append(max(points, key=lambda point: point["gold"])["kl"] ** 0.5)
    return distance


def hacked():
    lost, rise = searched("lost", PLAIN), searched("proxy_since_best", PLAIN)
    deep, far = means(lost), means(peaks())
    return (list(lost) == [4000, 1000, 200, 50]
            and all(min(lost[choices] + rise[choices]) > 0 for choices in (1000, 200, 50))
            and 0 < max(deep[4000], deep[1000]) < min(deep[200], deep[50])
            and min(far[4000], far[1000]) > max(far[200], far[50]))


def penalty_helps():
    lost, lost_with_it = means(searched("lost", PLAIN)), means(searched("lost", PENALISED))
    proxy, proxy_with_it = means(searched("proxy", PLAIN)), means(searched("proxy", PENALISED))
    gold, gold_with_it = searched("gold", PLAIN), searched("gold", PENALISED)
    committed = penalties("gold")
    return (all(lost_with_it[choices] < lost[choices] / 2 for choices in lost)
            and all(proxy_with_it[choices] < proxy[choices] for choices in proxy)
            and all(min(gold_with_it[choices]) > max(gold[choices]) for choices in (1000, 200))
            and sides(committed)[:2] == ([], [(0.3, "loss")]) and max(beta for beta, _ in committed) == 0.3
            and {row["steps"] for row in result("kl")} == {60})


def noise_costs():
    agreement, way = study("noise", "agreement", "rate"), study("noise", "way", "rate")
    return (0.6 < np.mean(agreement[0.6]) < 0.65 and all(max(agreement[rate]) < rate for rate in (0.8, 0.9))
            and max(way[0.9]) < min(way[1.0]) and np.mean(way[0.9]) < 0.75 * np.mean(way[1.0]))


def overtaken():
    overtaken_on_countdown()
    overtaken_on_longer_chains()
    return passed("arithmetic", 128)["GRPO"] == passed("arithmetic", 128)["SFT, sampled again"] == [1.0] * 5


def forgets_less():
    nothing_forgotten_at_equal_accuracy()
    fine_tuning_goes_on_to_forget()
    nearer_and_forgets_more()
    lost = means(study("forgetting", "end_lost"))
    return max(lost[name] for name in ("GRPO", "PPO", "filtered SFT, online")) < 0.03


def coins_do_not():
    form_and_length_nearly_do()
    a_coin_teaches_nothing()
    accuracy = study("placebo", "accuracy")
    return sides({name: accuracy[name] for name in ("coin, 4 minibatches", "coin, 4 minibatches, no clip")})[:2] == (
        [], [])


def dpo_with_few_choices():
    dpo_on_animals()
    dpo_over_optimises()
    return dpo_at_equal_kl()[:2] == ["1000", "200"]


CLAIMS = {
    "GRPO needs less memory than PPO": less_memory,
    "GRPO is as good as PPO, without a critic": as_good,
    "PPO needs a good critic": no_good_critic_needed,
    "a value for every token teaches faster than a group's mean": a_quarter_fewer_at_a_price,
    "a baseline leaves the gradient's expectation as it is": None,                   # test_exact.py
    "and lowers its variance": less_noise_and_much_less_later,
    "so a baseline makes learning better": better_with_no_baseline,
    "RL is needed, fine-tuning on right answers is not enough": online_it_has_to_be,
    "the standard deviation in the advantage helps, or harms": std_makes_no_difference,
    "larger groups are better": not_larger_is_better,
    "the newer recipes beat GRPO": recipes_alike,
    "the sequence's mean makes wrong answers longer (Dr. GRPO)": longer_than_two_of_three,
    "learned rewards get hacked": hacked,
    "the KL penalty prevents it": penalty_helps,
    "DPO does what RL does, without a reward model": dpo_with_few_choices,
    "a reward model averages out the annotators' noise": noise_costs,
    "RL only sharpens: with many samples the base model overtakes it": overtaken,
    "RL forgets less than fine-tuning": forgets_less,
    "even random rewards make a model reason": coins_do_not,
}


def claims(page):
    """{what people say: the whole row} of the table on a page, without where its links lead."""
    text = read(page)
    lines = text[text.index("| people say | measured here"):].split("\n\n")[0].splitlines()[2:]
    return {line.split(" | ")[0].strip("| "): re.sub(r"\]\([^)]*\)", "]", line) for line in lines}


def test_every_row_of_the_table_has_its_numbers():
    assert list(claims(RESULTS / "README.md")) == list(CLAIMS)


@pytest.mark.parametrize("claim", [claim for claim, holds in CLAIMS.items() if holds])
def test_the_answer_is_what_was_measured(claim):
    assert CLAIMS[claim]()


def test_the_readme_has_five_of_these_rows_word_for_word():
    short, full = claims(ROOT / "README.md"), claims(RESULTS / "README.md")
    assert len(short) == 5 and all(full[claim] == row for claim, row in short.items())


# --- the README, and what else is said of numbers and commands ----------------------------------------------------

def blocks(page, language):
    """The blocks of code of a page in a language ("" for commands), each a list of lines."""
    fences = re.findall(r"^```(\w*)\n(.*?)^```", read(page), re.DOTALL | re.MULTILINE)
    return [text.splitlines() for name, text in fences if name == language]


def test_the_code_in_the_readme_stands_in_grpo_py():
    lines = {line.strip() for line in read(ROOT / "grpo_min" / "grpo.py").splitlines()}
    shown, = blocks(ROOT / "README.md", "python")
    assert len(shown) <= 15
    assert [line for line in shown if line.strip() not in lines] == []


def test_the_two_commands_of_the_readme():
    lines = [line.split("#")[0].strip() for block in blocks(ROOT / "README.md", "") for line in block]
    assert "pip install -r requirements.txt && python -m grpo_min" in lines
    assert "pip install -r requirements.txt && python -m pytest" in lines


def test_the_rows_of_the_readme_are_medians_over_pipelines():
    seconds, state = compared("correct", "seconds"), compared("correct", "state_bytes")
    for name in "GRPO", "PPO":
        cells = [name, median_of(lucky(RIGHT.format(name))), median_of(lucky(WAY.format(name))),
                 f"{np.mean(seconds[name]):.2f}", f"{state[name][0] / 1e6:.1f} MB"]
        assert f"| {' | '.join(cells)} |" in read(ROOT / "README.md")


def test_what_the_readme_says_of_time():
    text = read(ROOT / "README.md")
    alone, _, busy, _ = (seconds for _, seconds, _ in table("threads")[2:])
    assert f"| [{alone} s; {busy} s beside a busy process](" in text
    before, after = (percent(np.median(lucky(RIGHT.format(name)))) for name in ("SFT", "GRPO"))
    assert f"from {before} right to [{after}](" in text
    assert f"| [{tuned('seconds')['arithmetic', 'GRPO', 'defaults']:.0f} s](" in text


def test_what_the_readme_says_of_a_real_model():
    text, (before,) = " ".join(read(ROOT / "README.md").split()), real("test_right", "before")
    minutes, after = np.mean(real("minutes", "GRPO")), np.mean(real("test_right", "GRPO"))
    assert f"SmolLM2 gets {before:.1%} right, and after [{minutes:.1f} minutes of GRPO]" in text
    said = [row["answer"] for row in result("real-answers") if row["algorithm"] == "GRPO"]
    assert f"on two cores {after:.1%}: `{said[0]}`" in text


def test_what_help_says_of_memory():
    _, memory = real_benchmark()
    one, eight = (memory["GRPO", f"microbatches {parts}"]["peak"] / 1024 for parts in (1, 8))
    assert f"(SmolLM2, 1 to 8 parts: {one:.1f} to {eight:.1f} GB)" in GRPOConfig.__dataclass_fields__[
        "microbatches"].metadata["help"]


def test_within_twenty_steps_nearly_every_answer_thinks():
    thinking = column_by(result("comparison-correct"), "step", "thinking")
    assert max(thinking[0]) < 0.6 and min(thinking[20]) > 0.95


def test_the_readme_counts_the_sayings():
    assert len(CLAIMS) == 19 and "nineteen sayings" in read(ROOT / "README.md")


def test_the_seven_steps_lead_to_their_banners():
    lines = read(ROOT / "grpo_min" / "grpo.py").splitlines()
    links = re.findall(r"\[banner (\d)\]\(\.\./grpo_min/grpo\.py#L(\d+)\)", read(ROOT / "tutorials" / "README.md"))
    assert [step for step, _ in links] == list("1234567")
    for step, number in links:
        assert f"# --- {step}." in lines[int(number) - 1]


def commands():
    """(module, words after it) of every command `python -m` that a page names."""
    for page in PAGES:
        for line in re.findall(r"python -m ([^`\n]+)", read(page)):
            module, *words = line.split("#")[0].split()
            yield module, words


@pytest.fixture
def help_of(monkeypatch, capsys):
    """help_of(module) -> what `python -m MODULE --help` prints."""
    def help_of(module):
        monkeypatch.setattr(sys, "argv", [module, "--help"])
        with pytest.raises(SystemExit):
            runpy.run_module(module, run_name="__main__")
        return capsys.readouterr().out
    return help_of


def test_every_command_exists():
    named = {module for module, _ in commands()} - {"grpo_min.STAGE"}
    assert len(named) > 15
    assert [module for module in named if importlib.util.find_spec(module) is None] == []


def test_the_guide_to_the_tests_names_every_file():
    named = re.findall(r"\]\((test_\w+\.py)\)", read(ROOT / "tests" / "README.md"))
    assert sorted(named) == sorted(path.name for path in (ROOT / "tests").glob("test_*.py"))


def test_every_study_has_its_command_on_a_page():
    named = {words[0] for module, words in commands() if module == "grpo_min.lab.studies"}
    assert named == {*STUDIES, "all"}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_every_option_that_is_named_exists(help_of):
    options, unknown = {}, []
    for module, words in commands():
        named = [word for word in words if word.startswith("--") and word != "--help"]
        if not named or not module.startswith("grpo_min"):
            continue
        if module not in options:
            options[module] = set(re.findall(r"--[\w-]+", help_of(module)))
        unknown += [f"{module} {option}" for option in named if option not in options[module]]
    assert unknown == []


def test_the_recipes_are_listed_with_their_options():
    for name, settings in RECIPES.items():
        assert f"| `{name}` | `{as_options(settings)}` |" in read(ROOT / "tutorials" / "HOWTO.md")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(#[^)]*)?\)", read(page)):
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), target
        if anchor and path.suffix == ".md":
            headings = re.findall(r"^#+ (.+)$", read(path), re.MULTILINE)
            anchors = ["#" + re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in anchors, f"{target}{anchor}"
