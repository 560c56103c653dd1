"""Stage 2: supervised fine-tuning on demonstrations.

Loss: mean cross-entropy of the response's tokens, in nats: minus the log-probabilities that
RL is about, read by the same function.

Batches are drawn from shuffled rows, never sorted by length: with a token mean, a batch of
short (direct) answers would weigh their first token many times as much as one of long
answers, and the model would hardly ever think.
"""
from dataclasses import dataclass

from grpo_min.rollout import Prompts, pad_completions, require_fit, token_logprobs
from grpo_min.run.checkpoint import load_model
from grpo_min.run.config import (option, parse, pick_device, require, require_positive,
                                 run_command)
from grpo_min.run.data import batch_rows, read_jsonl
from grpo_min.run.files import DATA
from grpo_min.run.fit import fit
from grpo_min.run.ranks import mean
from grpo_min.task import load_task


@dataclass
class SFTConfig:
    """Stage 2: fine-tune the base model on demonstrations."""
    run: str = option("runs/sft", "folder to write into")
    resume: bool = option(False, "go on from the checkpoint in --run")
    base: str = option(str(DATA / "checkpoints/base.pt"), "checkpoint of the base model")
    demonstrations: str = option(str(DATA / "sft.jsonl"),
                                 "JSONL with the fields prompt and response")
    task: str = option("", "Python file with demonstrations of your own, see task.py; its "
                       "code is executed")
    steps: int = option(3000, "updates")
    batch_size: int = option(16, "demonstrations per update")
    lr: float = option(4e-3, "peak learning rate")
    warmup: int = option(100, "updates over which the learning rate rises")
    seed: int = option(1, "seed of the order of demonstrations")
    device: str = option("auto", "where to compute", ["auto", "cpu", "cuda", "mps"])


def train(config):
    """Fine-tune -> the SFT model and one row of metrics per step."""
    require_positive(config, "steps", "batch_size", "lr", "warmup")
    device = pick_device(config.device)
    path, unit = config.task or config.demonstrations, "line"
    if config.task:
        require(config.demonstrations == SFTConfig.demonstrations,
                "--task replaces --demonstrations")
        rows = load_task(path, "demonstrations")[0](at_least=config.batch_size)
        unit = "demonstration"
    else:
        rows = read_jsonl(path, ["prompt", "response"], config.batch_size)
    model = load_model(config.base, device)
    tokenizer = model.tokenizer
    lengths = [(len(tokenizer.encode_prompt(row["prompt"])),
                len(tokenizer.encode_completion(row["response"]))) for row in rows]
    require_fit(model.config.context, lengths, path, unit)

    def loss_at(step):
        numbers = batch_rows(len(rows), config.batch_size, config.seed, step)
        batch = [rows[number] for number in numbers]
        prompts = Prompts.from_texts([row["prompt"] for row in batch], tokenizer, device)
        ids, mask = pad_completions([row["response"] for row in batch], tokenizer, device)
        logprobs, _ = token_logprobs(model, prompts, ids, mask)  # (batch, N)
        tokens = mean(mask.sum().float())  # over the ranks, of which most have one
        return -logprobs.sum() / tokens, {}

    return model, fit(config, model, [config.base, path], loss_at)


def main(argv=None):
    train(parse(SFTConfig, argv))


if __name__ == "__main__":
    run_command(main)
