"""Stage 2: supervised fine-tuning on demonstrations. Loss: mean cross-entropy of the response's tokens, in nats.

Batches are drawn from shuffled rows, never sorted by length: with a token mean, a batch of short (direct) answers
would weigh their first token many times as much as a batch of long ones, and the model would hardly ever think.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from grpo_min.config import option, parse, pick_device, require, require_positive, run_command
from grpo_min.ranks import mean
from grpo_min.rollout import pad, require_fit
from grpo_min.runs import DATA, batch_rows, fit, load_model, read_jsonl
from grpo_min.task import load_task
from grpo_min.tokenizer import encode_completion, encode_prompt


@dataclass
class SFTConfig:
    """Stage 2: fine-tune the base model on demonstrations."""
    run: str = option("runs/sft", "folder to write into")
    resume: bool = option(False, "go on from the checkpoint in --run")
    base: str = option(str(DATA / "checkpoints/base.pt"), "checkpoint of the base model")
    demonstrations: str = option(str(DATA / "sft.jsonl"), "JSONL with the fields prompt and response")
    task: str = option("", "Python file with demonstrations of your own, see task.py; its code is executed")
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
    own, path = config.task, config.task or config.demonstrations
    require(not own or config.demonstrations == SFTConfig.demonstrations, "--task replaces --demonstrations")
    rows = (load_task(path, "demonstrations")[0](at_least=config.batch_size) if own else
            read_jsonl(path, ["prompt", "response"], config.batch_size))
    model = load_model(config.base, "GPT", device)
    require_fit(model.config.context, [(len(encode_prompt(row["prompt"])), len(encode_completion(row["response"])))
                                       for row in rows], path, "demonstration" if own else "line")

    def loss_at(step):
        batch = [rows[i] for i in batch_rows(len(rows), config.batch_size, config.seed, step)]
        prompts = [encode_prompt(row["prompt"]) for row in batch]
        ids, length = pad([prompt + encode_completion(row["response"]) for prompt, row in zip(prompts, batch)], device)
        start = torch.tensor([len(prompt) for prompt in prompts], device=device)                  # (batch,)
        column = torch.arange(ids.shape[1] - 1, device=device)                                    # (T,)
        real = column < length[:, None] - 1                                                       # (batch, T)
        response = real & (column >= start[:, None] - 1)        # column t is about token t + 1: of the response alone
        states = model.run(ids[:, :-1], column, mask=real)[0][response]                           # (n, D)
        weight = len(states) / mean(torch.tensor(float(len(states)), device=device))  # 1, unless there are other ranks
        return F.cross_entropy(model.head(states), ids[:, 1:][response]) * weight, {}

    return model, fit(config, model, [config.base, path], loss_at)


def main(argv=None):
    train(parse(SFTConfig, argv))


if __name__ == "__main__":
    run_command(main)
