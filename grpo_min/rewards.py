"""Rewards: functions reward(prompts, completions, **columns) -> list[float], as in TRL.

prompts and completions are lists of B strings, completions without END; so are the columns:
the fields of the prompt's row in its data file, such as `answer`, and `finished`, False
where the length limit cut the completion. A completion is parsed, never evaluated. None in
place of a number: not judged, so that nothing is learned from this completion.
"""
import math
import re

import torch

from grpo_min.model import ScalarGPT
from grpo_min.rollout import Prompts, pad, require_fit
from grpo_min.run.checkpoint import load_model
from grpo_min.run.config import require
from grpo_min.run.data import columns, read_jsonl
from grpo_min.run.files import DATA

THINKING = re.compile(r"<think>(?:(?!</?think>).)+</think>(.*)", re.DOTALL)   # one pair


def final_answer(completion):
    """What stands after well-formed thinking; all of it if there is no tag; else None."""
    thinking = THINKING.fullmatch(completion)
    answer = thinking[1] if thinking else completion
    return None if "<think>" in answer or "</think>" in answer else answer.strip()


def correct(prompts, completions, answer, finished=None, **columns):
    """1 if it finished and the final answer is exactly the right one (not 012), else 0."""
    finished = finished or [True] * len(completions)
    return [float(end and final_answer(text) == right)
            for text, right, end in zip(completions, answer, finished)]


def well_formed(prompts, completions, finished=None, **columns):
    """1 if it is <think>some</think>thing, finished, and without other tags, else 0."""
    finished = finished or [True] * len(completions)
    return [float(bool(end and THINKING.fullmatch(text) and final_answer(text)))
            for text, end in zip(completions, finished)]


def weighted_sum(*parts):
    """weighted_sum((correct, 1.0), (well_formed, 0.2)): correct + 0.2 * well_formed."""
    def reward(prompts, completions, **columns):
        total = [0.0] * len(completions)
        for function, weight in parts:
            scores = function(prompts, completions, **columns)
            total = [before + weight * (score or 0) for before, score in zip(total, scores)]
        return total
    return reward


def learned(reward_model, batch_size=256):
    """The reward function of a reward model, a ScalarGPT: its score at the last token, END
    if the completion finished. What does not fit into its context is cut on the right."""
    device = next(reward_model.parameters()).device
    tokenizer, context = reward_model.tokenizer, reward_model.config.context

    def read(answers):
        """(prompt, completion, finished) of n answers -> n scores."""
        asked = [tokenizer.encode_prompt(prompt)[:context - 1] for prompt, _, _ in answers]
        answered = [tokenizer.encode_completion(text, end)[:context - len(prompt)]
                    for prompt, (_, text, end) in zip(asked, answers)]
        ids, length = pad(answered, tokenizer.pad, device)  # (n, N), (n,)
        mask = torch.arange(ids.shape[1], device=device) < length[:, None]  # (n, N)
        prompts = Prompts(*pad(asked, tokenizer.pad, device), [])
        return reward_model.last(prompts, ids, mask).tolist()

    @torch.no_grad()
    def reward(prompts, completions, finished=None, **columns):
        answers = list(zip(prompts, completions, finished or [True] * len(completions)))
        distinct, scores = list(dict.fromkeys(answers)), {}     # twice the same: read once
        for i in range(0, len(distinct), batch_size):
            scores.update(zip(distinct[i:], read(distinct[i:i + batch_size])))
        return [scores[answer] for answer in answers]
    return reward


RULES = {"correct": correct, "well_formed": well_formed,
         "both": weighted_sum((correct, 1.0), (well_formed, 0.2))}


def load_reward(config, reward, policy, device):
    """The reward of config, or the function given; its rows of prompts; their files."""
    name = "animals" if config.reward == "learned" else "arithmetic"
    path = config.task or config.prompts or str(DATA / f"{name}_train.jsonl")
    files, fields, unit, at_least = [path], ["prompt"], "line", config.prompts_per_step
    if config.task:
        require(config.reward == "correct" and not config.prompts,
                "--task replaces --reward and --prompts: leave them")
        from grpo_min.task import load_task
        prompts, own_reward = load_task(path, "prompts", "reward")
        reward, unit = reward or own_reward, "prompt"
        rows = prompts("train", at_least=at_least)
    elif reward is None and config.reward == "learned":
        checkpoints = config.reward_model.split(",")
        models = [load_model(each, device, ScalarGPT) for each in checkpoints]
        for each, model in zip(checkpoints, models):
            require(model.tokenizer.to_dict() == policy.tokenizer.to_dict(),
                    f"{each} has another tokenizer than the policy")
        reward = weighted_sum(*((learned(model), 1 / len(models)) for model in models))
        files += checkpoints
    elif reward is None:
        reward, fields = RULES[config.reward], ["prompt", "answer"]
    if not config.task:
        rows = read_jsonl(path, fields, at_least)
    taken = ", ".join({"prompts", "completions", "finished"} & rows[0].keys())
    require(not taken, f"{path}: the field {taken} has a name that rewards get already")
    lengths = [(len(policy.tokenizer.encode_prompt(row["prompt"])), config.max_new_tokens)
               for row in rows]
    require_fit(policy.config.context, lengths, path, unit)
    return reward, rows, files


def numbers(reward, prompts, completions, /, **columns):
    """What a reward function says of B completions -> B floats, or a UserError. They are
    finite, but for a NaN where it says None."""
    said, judged, rewards = reward(prompts, completions, **columns), [], []
    try:
        said = list(said)
        judged = [float(number) for number in said if number is not None]
        rewards = [math.nan if number is None else float(number) for number in said]
    except (TypeError, ValueError):
        pass  # too few, then
    require(len(rewards) == len(completions) and torch.tensor(judged).isfinite().all(),
            f"the reward function {getattr(reward, '__qualname__', '')} must return "
            f"{len(completions)} finite numbers, one per completion (None: not judged)")
    return rewards


def score(reward, batch, rollout, group_size, tokenizer):
    """Call a reward function on a batch (Q rows) and its rollout -> rewards (B,), texts.

    A completion that it does not judge gets the mean reward of those of its group that it
    does (0 if none), and its mask is cleared: no advantage, and no part in any loss.
    """
    fields = columns([row for row in batch for _ in range(group_size)])  # B values each
    texts, finished = rollout.texts(tokenizer), rollout.finished.tolist()
    rewards = numbers(reward, fields.pop("prompt"), texts, finished=finished, **fields)
    groups = torch.tensor(rewards, dtype=torch.float64).view(-1, group_size)  # (Q, G)
    judged = ~groups.isnan()  # (Q, G)
    mean = groups.nanmean(dim=1, keepdim=True).nan_to_num()  # (Q, 1)
    rollout.mask &= judged.view(-1, 1).to(rollout.mask.device)  # (B, N)
    rewards = groups.where(judged, mean).flatten().to(torch.get_default_dtype())  # (B,)
    return rewards.to(rollout.mask.device), texts
