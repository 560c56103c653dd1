"""What the benchmark holds GRPO against: TRL's GRPO and transformers' generate() on work of the same shape.

Neither is required: `python -m grpo_min.lab.benchmark --against trl` says what to install.
"""
import contextlib
import io
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from grpo_min import tokenizer
from grpo_min.run.config import pick_device, require
from grpo_min.run.metrics import Clock


def gpt2(work):
    """transformers' GPT-2 of this shape, with random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel
    return GPT2LMHeadModel(GPT2Config(
        vocab_size=tokenizer.own().vocab_size, n_positions=128, n_layer=work["layers"], n_head=work["width"] // 32,
        n_embd=work["width"], resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, activation_function="gelu_pytorch_tanh",
        bos_token_id=1, eos_token_id=1, pad_token_id=0))


def random_ids(prompt_length, count):
    """Token ids (count, prompt_length), none of them special."""
    return np.random.default_rng(0).integers(6, tokenizer.own().vocab_size, (count, prompt_length))


def generate_steps(config, work):
    """A function that lets transformers' generate() sample as many completions -> rows {seconds_sample}."""
    device = pick_device(config.device)
    model = gpt2(work).to(device).eval()
    ids = torch.tensor(random_ids(work["prompt_length"], work["prompts"]), device=device)
    ids = ids.repeat_interleave(work["group_size"], dim=0)

    def steps():
        rows = []
        for _ in range(config.steps):
            clock = Clock(device)
            model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=work["new"],
                           do_sample=True, top_k=0, suppress_tokens=[1])
            clock.lap("sample")
            rows.append(clock.laps)
        return rows[1:]
    return steps


def trl_steps(config, work):
    """A function that lets TRL's GRPO take some steps of this work -> rows {seconds_update: the whole step}.

    One generation batch, one forward and backward a step: TRL's fastest settings on a CPU.
    """
    with installed():
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast
        import trl  # noqa: F401
    words = {f"w{i}": i for i in range(tokenizer.own().vocab_size)}
    word_level = Tokenizer(models.WordLevel(words, unk_token="w0"))
    word_level.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    word_level = PreTrainedTokenizerFast(tokenizer_object=word_level, eos_token="w1", pad_token="w0", unk_token="w0")
    folder = Path(config.out) / f"trl-{work['width']}"
    gpt2(work).save_pretrained(folder)
    model = GPT2LMHeadModel.from_pretrained(folder)                          # TRL reads its reference from there, too
    prompts = []
    for ids in random_ids(work["prompt_length"], 1000):
        prompts.append(" ".join(f"w{i}" for i in ids))
    take_steps = trainer_steps(
        model, word_level, prompts, lambda completions, **columns: [float(len(text) % 7) for text in completions],
        pick_device(config.device), folder, per_device_train_batch_size=work["prompts"] * work["group_size"],
        gradient_accumulation_steps=1, num_generations=work["group_size"], max_completion_length=work["new"], beta=0.01,
        learning_rate=3e-4, max_steps=config.steps, generation_kwargs=dict(suppress_tokens=[1]))
    return lambda: [dict(seconds_update=seconds) for seconds in take_steps()]


@contextlib.contextmanager
def installed():
    """Around imports of what is not required: a UserError of one line."""
    try:
        yield
    except ImportError as error:
        require(False, f"--against trl: {error}; pip install trl transformers datasets accelerate")


def trainer_steps(model, processing, prompts, reward, device, folder, **settings):
    """A function that lets TRL's GRPO take some steps -> seconds of each but the first. settings: of its GRPOConfig.

    Neither gradient checkpointing nor bfloat16, which are its defaults and slow on a CPU.
    """
    with installed():
        from datasets import Dataset
        from transformers import TrainerCallback
        from trl import GRPOConfig, GRPOTrainer
    times = []
    settings = GRPOConfig(
        output_dir=str(folder), use_cpu=device.type == "cpu", bf16=False, fp16=False, seed=1, temperature=1.0,
        lr_scheduler_type="constant", gradient_checkpointing=False, logging_strategy="no", save_strategy="no",
        report_to="none", disable_tqdm=True, **settings)

    class Times(TrainerCallback):
        def on_step_begin(self, *arguments, **keywords):
            self.start = getattr(self, "end", time.perf_counter())

        def on_step_end(self, *arguments, **keywords):
            self.end = time.perf_counter()
            times.append(self.end - self.start)
    trainer = GRPOTrainer(model=model, reward_funcs=reward, args=settings, processing_class=processing,
                          train_dataset=Dataset.from_dict(dict(prompt=prompts)), callbacks=[Times()])

    def steps():
        times.clear()
        with contextlib.redirect_stdout(io.StringIO()):
            trainer.train()
        return times[1:]
    return steps


OTHERS = {     # name: (what makes its turns, the phase of ours that it is held against; "": the step)
    "TRL GRPO": (trl_steps, ""), "generate()": (generate_steps, "sample"),
}


def versions():
    return f"TRL {version('trl')}, transformers {version('transformers')}"
