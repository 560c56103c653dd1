"""Checkpoints: the weights of a model, and what is needed to build it again."""
import dataclasses
import io

import torch

from grpo_min.model import GPT, GPTConfig, copied
from grpo_min.run.config import UserError, require
from grpo_min.run.files import one_line
from grpo_min.tokenizer import Tokenizer


def serialise(**content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getbuffer()  # not a copy: that of a real model would take gigabytes


def weights(model):
    """A model as plain data: {kind, config, tokenizer, model, lora}."""
    return dict(kind=type(model).__name__, config=dataclasses.asdict(model.config),
                tokenizer=model.tokenizer.to_dict(), model=trained(model),
                lora=getattr(model, "lora", {}))


def trained(model):
    """The state of a model, but for its frozen weights (real/lora.py)."""
    frozen = {name for name, weight in model.named_parameters() if not weight.requires_grad}
    return {name: tensor for name, tensor in model.state_dict().items()
            if name not in frozen}


def load_checkpoint(path):
    try:
        with one_line(f"read the checkpoint {path}"):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception:  # torch.load fails in many ways
        raise UserError(f"{path} is no checkpoint, is damaged, or holds code (never run)")
    require(isinstance(checkpoint, dict) and "kind" in checkpoint,
            f"{path} is not a checkpoint of grpo_min")
    return checkpoint


def config_of(data):
    """The config of a checkpoint: of a GPT, or of a Llama, which has kv_heads, too."""
    if "kv_heads" in data:
        from grpo_min.real.llama import LlamaConfig
        return LlamaConfig(**data)
    return GPTConfig(**data)


def load_model(path, device="cpu", kind=GPT, like=None, lora=0):
    """The model of a checkpoint, of this kind; like: the model that it has to read.

    Where a GPT is asked for, a Llama will do; the others stand on either of them. lora: the
    rank of adapters to train on it (real/lora.py); 0: none.
    """
    checkpoint = load_checkpoint(path)
    require(checkpoint["kind"] == kind.__name__
            or kind is GPT and checkpoint["kind"] == "Llama",
            f"{path} holds a {checkpoint['kind']}, where a {kind.__name__} is needed")
    try:
        config, state = config_of(checkpoint["config"]), checkpoint["model"]
        tokenizer = Tokenizer.from_dict(checkpoint["tokenizer"])
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"{path} is not a checkpoint of this version of grpo_min")
    require(config.vocab_size >= tokenizer.vocab_size, f"{path} has a vocabulary of "
            f"{config.vocab_size}, its tokenizer one of {tokenizer.vocab_size}")
    require(like is None or like.tokenizer.to_dict() == tokenizer.to_dict()
            and like.config.context <= config.context,
            f"{path} has another tokenizer, or a shorter context, than the policy")
    if checkpoint.get("lora"):
        from grpo_min.real.lora import with_adapters
        model = with_adapters(checkpoint["lora"], state, path)
    else:
        model = config.build(tokenizer) if kind is GPT else kind(config, tokenizer)
        load_weights(model, state, path)
    model = model.to(device)
    if lora:
        from grpo_min.real.lora import adapt
        adapt(model, lora, path)
    return model


def frozen_copy(model):
    """A model as it is now, for a reference: it is not trained."""
    return copied(model).requires_grad_(False)


def load_weights(model, state, path):
    frozen = {name: weight for name, weight in model.named_parameters()
              if not weight.requires_grad}
    try:
        model.load_state_dict(frozen | state)
    except RuntimeError:
        raise UserError(f"{path}: the weights are of another shape than {model.config}")
