"""Stage 1: a base model that predicts the next token of a text.

Documents are shuffled in every epoch, joined by END and cut into rows that fill the whole
context: no position stays untrained. Loss: mean cross-entropy of the next token, in nats.
"""
import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from grpo_min import tokenizer as tokenizers
from grpo_min.model import GPT, GPTConfig
from grpo_min.run.config import (option, parse, pick_device, require, require_positive,
                                 run_command)
from grpo_min.run.files import DATA, read_text
from grpo_min.run.fit import fit
from grpo_min.run.ranks import RANKS, share


@dataclass
class PretrainConfig:
    """Stage 1: pretrain a small GPT on a text, from nothing."""
    run: str = option("runs/pretrain", "folder to write into")
    resume: bool = option(False, "go on from the checkpoint in --run")
    text: str = option(str(DATA / "pretrain.txt"),
                       "text file in UTF-8, a document per line")
    tokenizer: str = option(str(DATA / "tokenizer.json"), "tokenizer, as "
                            "grpo_min.tokenizer writes it; the checkpoint holds it")
    layers: int = option(3, "transformer blocks")
    heads: int = option(3, "attention heads; must divide the width")
    width: int = option(96, "size of the residual stream")
    context: int = option(80, "positions, in tokens")
    steps: int = option(3600, "updates")
    batch_size: int = option(8, "rows of `context` tokens per update")
    lr: float = option(8e-3, "peak learning rate")
    warmup: int = option(100, "updates over which the learning rate rises")
    seed: int = option(1, "seed of the weights and of the order of documents")
    device: str = option("auto", "where to compute", ["auto", "cpu", "cuda", "mps"])


def read_documents(path, tokenizer):
    """The documents of a text file as lists of token ids, each ending in END."""
    lines = [line.strip() for line in read_text(path).splitlines()]
    documents = [tokenizer.encode(line) + [tokenizer.end] for line in lines if line]
    require(documents, f"{path} is empty")
    return documents


def pack(documents, context, seed):
    """Shuffle the documents, join them and cut them: (rows, context + 1)."""
    documents = documents[:]
    random.Random(seed).shuffle(documents)
    ids = torch.tensor([token for document in documents for token in document])
    rows = range((len(ids) - 1) // context)
    return torch.stack([ids[i * context:(i + 1) * context + 1] for i in rows])


def train(config):
    """Pretrain -> the base model and one row of metrics per step."""
    require_positive(config, "layers", "heads", "width", "context", "steps", "batch_size",
                     "lr", "warmup")
    device = pick_device(config.device)
    require(config.width % config.heads == 0,
            f"a width of {config.width} does not divide into {config.heads} heads")
    tokenizer = tokenizers.load(config.tokenizer)
    documents = read_documents(config.text, tokenizer)
    torch.manual_seed(config.seed)
    model = GPT(GPTConfig(tokenizer.vocab_size, config.context, config.layers, config.heads,
                          config.width), tokenizer).to(device)
    rows_per_epoch = (sum(map(len, documents)) - 1) // config.context
    batches = rows_per_epoch // config.batch_size
    require(config.batch_size % RANKS == 0,
            f"a batch of {config.batch_size} does not divide among {RANKS} ranks")
    require(batches > 0, f"{config.text} fills only {rows_per_epoch} rows, --batch-size is "
            f"{config.batch_size}")
    packed = {}  # {epoch: rows}, the current one only

    def loss_at(step):
        epoch, index = divmod(step, batches)
        if epoch not in packed:
            packed.clear()
            rows = pack(documents, config.context, f"{config.seed} {epoch}")
            packed[epoch] = rows.to(device)
        ids = packed[epoch][index * config.batch_size:(index + 1) * config.batch_size]
        ids = share(ids)  # (batch, context + 1), of this rank
        logits = model.plain(ids[:, :-1])  # (batch, context, V)
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()), {}

    return model, fit(config, model, [config.text, config.tokenizer], loss_at)


def main(argv=None):
    train(parse(PretrainConfig, argv))


if __name__ == "__main__":
    run_command(main)
