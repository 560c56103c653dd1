"""Rewards: functions `reward(prompts, completions, **columns) -> list[float]`, the signature TRL uses.

prompts and completions are lists of B strings (a completion without END); the columns are lists of B values too: the
fields of the prompt's row in its data file, such as `answer`, and `finished`, False where the length limit cut the
completion. What a completion says is parsed, never evaluated.
"""
import re

import torch

from grpo_min.config import require
from grpo_min.rollout import Prompts, pad, require_fit
from grpo_min.runs import DATA, columns, load_model, read_jsonl
from grpo_min.task import load_task
from grpo_min.tokenizer import encode_completion, encode_prompt

THINKING = re.compile(r"<think>(?:(?!</?think>).)+</think>(.*)", re.DOTALL)   # one pair of tags, around something


def final_answer(completion):
    """What stands after well-formed thinking, or the whole completion where there is no tag; else None."""
    thinking = THINKING.fullmatch(completion)
    answer = thinking[1] if thinking else completion
    return None if "<think>" in answer or "</think>" in answer else answer.strip()


def correct(prompts, completions, answer, finished=None, **columns):
    """1 if the completion finished and its final answer is exactly the right number (neither 012 nor 12.), else 0."""
    finished = finished or [True] * len(completions)
    return [float(end and final_answer(c) == a) for c, a, end in zip(completions, answer, finished)]


def well_formed(prompts, completions, finished=None, **columns):
    """1 if the completion is <think>something</think>something, finished and with no other tag, else 0."""
    finished = finished or [True] * len(completions)
    return [float(bool(end and THINKING.fullmatch(c) and final_answer(c))) for c, end in zip(completions, finished)]


def weighted_sum(*parts):
    """weighted_sum((correct, 1.0), (well_formed, 0.2)) is the reward function 1.0 * correct + 0.2 * well_formed."""
    def reward(prompts, completions, **columns):
        scores = [function(prompts, completions, **columns) for function, _ in parts]
        return [sum(weight * score for (_, weight), score in zip(parts, row)) for row in zip(*scores)]
    return reward


def learned(reward_model, batch_size=256):
    """The reward function of a trained reward model (a ScalarGPT): its score at the last real token.

    That token is END where the completion finished; a completion that was cut is read as it is, without END. What does
    not fit into the reward model's context is cut on the right.
    """
    device = next(reward_model.parameters()).device
    context = reward_model.config.context

    @torch.no_grad()
    def reward(prompts, completions, finished=None, **columns):
        answers = list(zip(prompts, completions, finished or [True] * len(completions)))
        distinct, scores = list(dict.fromkeys(answers)), {}                  # what was answered twice is read once
        for i in range(0, len(distinct), batch_size):
            part = distinct[i:i + batch_size]
            ids, length = pad([(encode_prompt(p) + encode_completion(c, end))[:context] for p, c, end in part], device)
            scores.update(zip(part, reward_model.last_of(Prompts(ids, length, [])).tolist()))
        return [scores[answer] for answer in answers]
    return reward


def load_reward(config, reward, context, device):
    """What a loop is to be rewarded for -> the reward function, the rows of prompts, the files both come from.

    config has task, reward, reward_model and prompts; a reward given as a function replaces config's.
    """
    path = config.task or config.prompts or str(DATA / ("animals_train.jsonl" if config.reward == "learned" else
                                                        "arithmetic_train.jsonl"))
    files, fields, unit = [path], ["prompt"], "line"
    if config.task:
        require(config.reward == "correct" and not config.prompts, "--task replaces --reward and --prompts: leave them")
        prompts, own_reward = load_task(path, "prompts", "reward")
        reward, unit = reward or own_reward, "prompt"
    elif reward is None and config.reward == "learned":
        reward = learned(load_model(config.reward_model, "ScalarGPT", device))
        files.append(config.reward_model)
    elif reward is None:
        reward = {"correct": correct, "well_formed": well_formed,
                  "both": weighted_sum((correct, 1.0), (well_formed, 0.2))}[config.reward]
        fields.append("answer")
    at_least = config.prompts_per_step
    rows = prompts("train", at_least=at_least) if config.task else read_jsonl(path, fields, at_least)
    require(not {"completions", "finished"} & rows[0].keys(), f"{path}: completions and finished cannot be fields: the "
            "rewards get columns of these names already")
    require_fit(context, [(len(encode_prompt(row["prompt"])), config.max_new_tokens) for row in rows], path, unit)
    return reward, rows, files


def numbers(reward, prompts, completions, **columns):
    """What a reward function says of B completions -> B floats; a UserError unless it is a finite number for each."""
    rewards = reward(prompts, completions, **columns)
    try:
        rewards = [float(number) for number in rewards]
    except (TypeError, ValueError):
        rewards = []
    require(len(rewards) == len(completions) and torch.tensor(rewards).isfinite().all(),
            f"the reward function {getattr(reward, '__qualname__', '')} must return {len(completions)} finite numbers, "
            "one per completion")
    return rewards


def score(reward, batch, rollout, group_size):
    """Call a reward function on a batch of rows and its rollout -> rewards (B,) and the completions' texts."""
    repeated = [row for row in batch for _ in range(group_size)]                              # B rows
    column, texts = columns(repeated), rollout.texts()
    rewards = numbers(reward, column.pop("prompt"), texts, finished=rollout.finished.tolist(), **column)
    return torch.tensor(rewards, device=rollout.mask.device), texts
