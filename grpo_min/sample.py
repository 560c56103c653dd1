"""Talk to a checkpoint: python -m grpo_min.sample --prompt "what does a cow eat?"

Without --prompt it reads questions line by line. With --best-of 16 and a reward model, 16
answers are sampled and the one with the highest score is shown: what can be had of a reward
model without any training.
"""
from dataclasses import dataclass

from grpo_min.model import ScalarGPT
from grpo_min.rewards import learned
from grpo_min.rollout import Prompts, sample
from grpo_min.run.checkpoint import load_model
from grpo_min.run.config import (option, parse, pick_device, require, require_positive,
                                 run_command)
from grpo_min.run.files import DATA
from grpo_min.run.rng import generator


@dataclass
class SampleConfig:
    """Ask a checkpoint and read its answers."""
    checkpoint: str = option(str(DATA / "checkpoints/sft.pt"), "checkpoint of a base, SFT, "
                             "DPO, GRPO or PPO model")
    prompt: str = option("", "what to ask; without it, questions are read line by line "
                         "until an empty one")
    answers: int = option(2, "answers sampled to each prompt")
    best_of: int = option(0, "show one answer alone: of so many samples that with the "
                          "highest score by --reward-model; 0: all --answers")
    temperature: float = option(1.0, "sampling temperature; 0 takes the likeliest token")
    max_new_tokens: int = option(40, "longest answer, in tokens")
    reward_model: str = option("", "checkpoint of a reward model, to see its scores too")
    seed: int = option(1, "seed of the sampling")
    device: str = option("auto", "where to compute", ["auto", "cpu", "cuda", "mps"])


def ask(policy, text, answers=2, temperature=1.0, max_new_tokens=40, seed=1):
    """Completions of one prompt -> their texts, and whether each ended; or a UserError."""
    device = next(policy.parameters()).device
    prompts = Prompts.from_texts([text], policy.tokenizer, device)
    rollout = sample(policy, prompts, answers, max_new_tokens, temperature,
                     generator(seed, 0))
    return rollout.texts(policy.tokenizer), rollout.finished.tolist()


def show_answers(policy, questions, reward=None):
    """Print a sampled answer to each question, and its score if there is a reward."""
    for question in questions:
        texts, finished = ask(policy, question, answers=1)
        scores = reward([question], texts, finished) if reward else []
        score = f"    (score {scores[0]:.2f})" if scores else ""
        print(f"  {question}\n      -> {texts[0].strip()}{score}", flush=True)


def main(argv=None):
    config = parse(SampleConfig, argv)
    require_positive(config, "answers", "max_new_tokens")
    require(config.temperature >= 0, "--temperature must be at least 0")
    require(config.best_of >= 0, f"--best-of must be at least 0, not {config.best_of}")
    require(config.reward_model or not config.best_of,
            f"--best-of {config.best_of} needs a --reward-model to choose by")
    device = pick_device(config.device)
    policy, reward = load_model(config.checkpoint, device), None
    if config.reward_model:
        reward = learned(load_model(config.reward_model, device, ScalarGPT))

    def answer(text):
        texts, finished = ask(policy, text, config.best_of or config.answers,
                              config.temperature, config.max_new_tokens, config.seed)
        lines = [f"  {completion.strip()}" for completion in texts]
        if reward:
            scores = reward([text] * len(texts), texts, finished)
            lines = [f"{line}    (score {score:.2f})" for line, score in zip(lines, scores)]
            if config.best_of:
                lines = [lines[scores.index(max(scores))]]
        print("\n".join(lines))

    if config.prompt:
        answer(config.prompt)
        return
    print("ask, for example: what does a cow eat?   or: start with 3, times 9, minus 7.   "
          "(an empty line ends)")
    try:
        while text := input("> ").strip():
            answer(text)
    except (EOFError, KeyboardInterrupt):
        print()


if __name__ == "__main__":
    run_command(main)
