"""Go on with TRL's GRPOTrainer where our loop has stopped: the same model, prompts and reward.

    python -m grpo_min.real.export --checkpoint runs/two-words/checkpoint.pt --out runs/two-words/folder
    python -m tutorials.with_trl runs/two-words/folder --task tutorials/tasks/two_words.py

It takes `pip install trl transformers datasets accelerate safetensors`. A task file (see grpo_min/task.py) needs no
change.

Prompts become messages, which TRL wraps by the exported chat template: the ids are ours, unless a prompt spells the
name of a special token, which theirs becomes and ours never does. The reward gets what it gets from our loop: strings,
decoded from the ids with special tokens shown and END left out, the fields of the rows, and `finished`, which is
whether the last id is END.

Models with learned positions (GPT-2, and our own small GPTs): in a batch of prompts of different lengths TRL pads the
shorter ones on the left and counts the padding as positions when it trains, so that it reads them otherwise than it
sampled them. Llama and its relatives know distances alone and do not mind.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

from grpo_min.real.names import refusing
from grpo_min.run.config import option, parse, require, require_positive, run_command
from grpo_min.task import load_task


@dataclass
class WithTRLConfig:
    """Let TRL's GRPO go on from a folder that grpo_min.real.export has written, the first word; on a CPU."""
    folder: str = option("", "the same, as an option")
    task: str = option("tutorials/tasks/two_words.py", "Python file with prompts and reward; its code is executed")
    out: str = option("runs/with_trl", "folder to write the model into; grpo_min.real.load reads it")
    steps: int = option(2, "batches: sample, score, update")
    prompts_per_step: int = option(8, "prompts per batch")
    group_size: int = option(8, "completions per prompt")
    max_new_tokens: int = option(24, "longest completion, in tokens")
    lr: float = option(1e-5, "learning rate")
    beta: float = option(0.0, "weight of the KL penalty")


def as_ours(reward, fields, tokenizer, end):
    """A reward function of ours -> one that takes what TRL gives. fields: of the rows; end: the id of END."""
    def trl_reward(prompts, completion_ids, **columns):
        finished = [ids[-1] == end for ids in completion_ids]
        texts = [tokenizer.decode(ids[:-1] if done else ids) for ids, done in zip(completion_ids, finished)]
        asked = [messages[-1]["content"] for messages in prompts]
        return reward(asked, texts, finished=finished, **{name: columns[name] for name in fields})
    return trl_reward


def train(config):
    """Take some steps -> the trainer, with its model."""
    require_positive(config, "steps", "prompts_per_step", "group_size", "max_new_tokens", "lr")
    with refusing("going on with TRL"):
        from datasets import Dataset
        from transformers import AutoTokenizer, GenerationConfig
        from trl import GRPOConfig, GRPOTrainer
    require((Path(config.folder) / "config.json").exists() and config.folder,
            f"{config.folder or 'the first word'} is no folder that grpo_min.real.export has written: no config.json")
    prompts, reward = load_task(config.task, "prompts", "reward")
    rows = prompts("train", at_least=config.prompts_per_step)
    with refusing(f"{config.folder} cannot be read"):
        tokenizer = AutoTokenizer.from_pretrained(config.folder)
        end = GenerationConfig.from_pretrained(config.folder).eos_token_id
    reward = as_ours(reward, rows[0].keys() - {"prompt"}, tokenizer, end)
    rows = [{**row, "prompt": [dict(role="user", content=row["prompt"])]} for row in rows]
    settings = GRPOConfig(
        output_dir=config.out, max_steps=config.steps, num_generations=config.group_size,
        per_device_train_batch_size=config.group_size, gradient_accumulation_steps=config.prompts_per_step,
        max_completion_length=config.max_new_tokens, temperature=1.0, learning_rate=config.lr, beta=config.beta,
        lr_scheduler_type="constant", use_cpu=True, bf16=False, gradient_checkpointing=False, logging_steps=1,
        save_strategy="no", report_to="none")
    trainer = GRPOTrainer(model=config.folder, reward_funcs=reward, args=settings, processing_class=tokenizer,
                          train_dataset=Dataset.from_list(rows))
    trainer.train()
    trainer.save_model(config.out)
    return trainer


def main(argv=None):
    words = list(sys.argv[1:] if argv is None else argv)
    folder = words.pop(0) if words and not words[0].startswith("-") else ""
    train(parse(WithTRLConfig, words, folder=folder))


if __name__ == "__main__":
    run_command(main)
