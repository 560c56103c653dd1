"""Small models with random weights, made by transformers in a folder, and tokenizers of each kind that is read."""
import json
import random

import torch
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from grpo_min.real import tokens

NAMES = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = ("{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nBe "
            "brief.<|im_end|>\n{% endif %}{{ '<|im_start|>' + message['role'] + '\n' + (message['content'] | trim) + "
            "'<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=96, rope_parameters=dict(rope_type="default", rope_theta=1000.0))
FAMILIES = {
    "gpt2": ("GPT2", dict(n_embd=32, n_layer=2, n_head=4, n_positions=96)),
    "llama": ("Llama", dict(tie_word_embeddings=True)),
    "llama, untied, not grouped": ("Llama", dict(num_key_value_heads=4)),
    "llama, one key": ("Llama", dict(num_key_value_heads=1, head_dim=16)),
    "qwen2": ("Qwen2", dict(tie_word_embeddings=True)),
    "qwen2, untied": ("Qwen2", dict()),
    "qwen3": ("Qwen3", dict(head_dim=16, tie_word_embeddings=True)),
    "qwen3, untied": ("Qwen3", dict(head_dim=6)),
}
CUTS = {"gpt2": tokens.GPT2, "digits": tokens.DIGITS, "llama3": tokens.LLAMA3, "qwen2": tokens.QWEN2}


def texts(count=200, seed=0):
    """What people type: words, code, digits, emoji, Chinese, spaces, and names of special tokens."""
    rng, parts = random.Random(seed), [
        "what does a cow eat?", " I'm", "we'll GO", "def f(x):\n    return x + 1\n", "\t\tif a==b:{}", "12345", " 7",
        "3.14", "  ", "\n\n", " \n ", "\r\n", "世界你好", "、。", "🐄🐎", "👩\u200d👩\u200d👧", "é", "e\u0301", "Grüße", "שלום",
        "٣٤", "Ⅷ½", "...", "!?;", "'s", " '5", "a1b22", "x" * 40, "\u00a0", "\u2028", "The", " cat", "CAFÉ",
        "http://a.b/c?d=1&e=%20", "{{ 7 * 7 }}", "{% if %}", "\x04", "\U000f0000", "_under_score", "<|im", "|>", "  5",
        "   a"]
    return ["".join(rng.choice(parts) for _ in range(rng.randrange(1, 9))) for _ in range(count)]


def tokenizer(cut="gpt2", alphabet=True, template=TEMPLATE, vocab_size=420):
    """A tokenizer of some 400 tokens, as transformers have it. alphabet: a token for every byte."""
    made = Tokenizer(models.BPE())
    bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cut in ("gpt2", "digits"))
    if cut == "digits":
        made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), bytewise])
    elif cut == "gpt2":
        made.pre_tokenizer = bytewise
    else:
        split = pre_tokenizers.Split(Regex(CUTS[cut]), "isolated")
        made.pre_tokenizer = pre_tokenizers.Sequence([split, bytewise])
        made.normalizer = normalizers.NFC() if cut == "qwen2" else None
    made.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet() if alphabet else []
    made.train_from_iterator(texts(400, seed=1), trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=NAMES, initial_alphabet=letters, show_progress=False))
    made.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token=NAMES[1], eos_token=NAMES[2], pad_token=NAMES[2],
                                   chat_template=template)


def randomised(model, seed=0):
    """Weights that matter: every parameter random, the norms' around 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2 + (
                "norm" in name or "ln_" in name) * (parameter.dim() == 1) * ("bias" not in name))
    return model.eval()


def save(folder, family="llama", tokens_of=None, vocab_size=512, **more):
    """A folder with a model of that family and a tokenizer -> the model."""
    kind, changes = FAMILIES[family]
    sizes = {} if kind == "GPT2" else SIZES
    ends = dict(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    config = getattr(transformers, f"{kind}Config")(vocab_size=vocab_size, **{**sizes, **changes, **ends, **more})
    model = randomised(AutoModelForCausalLM.from_config(config))
    model.save_pretrained(folder)
    (tokens_of or tokenizer("qwen2" if family.startswith("qwen") else "gpt2")).save_pretrained(folder)
    return model


def change(path, **fields):
    """Change fields of a JSON file; None takes one out."""
    content = {**json.loads(path.read_text(encoding="utf-8")), **fields}
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))
