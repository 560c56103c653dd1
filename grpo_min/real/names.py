"""What others call things: the fields of a config.json, and the tensors of a checkpoint.

A config is refused, by the field's name, for whatever it asks for that is not built.
"""
import math

import torch

from grpo_min.model import GPTConfig
from grpo_min.real.llama import LlamaConfig
from grpo_min.run.config import require

# our module: theirs (several of theirs are ours below each other)
GPT2 = {"tokens": "transformer.wte", "positions": "transformer.wpe", "scalar": "score",
        "norm": "transformer.ln_f", "blocks": "transformer.h", "norm1": "ln_1",
        "attention.qkv": "attn.c_attn", "attention.out": "attn.c_proj", "norm2": "ln_2",
        "up": "mlp.c_fc", "down": "mlp.c_proj"}
LLAMA = {"tokens": "model.embed_tokens", "norm": "model.norm", "unembed": "lm_head",
         "scalar": "score", "blocks": "model.layers", "norm1": "input_layernorm",
         "attention.qkv": "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
         "attention.out": "self_attn.o_proj", "attention.norm_q": "self_attn.q_norm",
         "attention.norm_k": "self_attn.k_norm", "norm2": "post_attention_layernorm",
         "up": "mlp.gate_proj mlp.up_proj", "down": "mlp.down_proj"}
GGUF = {"tokens": "token_embd", "norm": "output_norm", "unembed": "output", "blocks": "blk",
        "norm1": "attn_norm", "attention.qkv": "attn_q attn_k attn_v",
        "attention.out": "attn_output", "attention.norm_q": "attn_q_norm",
        "attention.norm_k": "attn_k_norm", "norm2": "ffn_norm", "up": "ffn_gate ffn_up",
        "down": "ffn_down"}
# Tensors that hold no weights: masks, angles; and the head of a model where it is tied.
NO_WEIGHTS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")

FIXED = dict(activation_function="gelu_new", layer_norm_epsilon=1e-5, hidden_act="silu",
             scale_attn_weights=True, pretraining_tp=1)
# Fields that do not change what a trained model computes.
SILENT = set("""model_type architectures transformers_version torch_dtype dtype use_cache
    _name_or_path bos_token_id eos_token_id pad_token_id initializer_range return_dict n_ctx
    attention_dropout attn_pdrop embd_pdrop resid_pdrop summary_type summary_use_proj
    summary_activation summary_proj_to_labels summary_first_dropout task_specific_params
    id2label label2id reorder_and_upcast_attn is_llama_config transformers.js_config
    """.split())


def read_config(fields, context, source):
    """The fields of a config.json -> a GPTConfig or LlamaConfig, or a UserError.

    context: positions, at most those that it was made for.
    """
    fields, used = dict(fields), set(SILENT)

    def take(name, default=None, kind=int):
        used.add(name)
        value = fields.get(name)
        value = default if value is None else value
        whole = isinstance(value, kind) and not isinstance(value, bool)
        require(whole and value > 0 and math.isfinite(value),
                f"{source}: config.json says {name} is {value}, where a number is needed")
        return value

    family = fields.get("model_type")
    require(family in ("gpt2", "llama", "qwen2", "qwen3"), f"{source}: a model of the kind "
            f"{family} is not built, only gpt2, llama, qwen2 and qwen3")
    if family == "gpt2":
        config = GPTConfig(take("vocab_size"), min(context, take("n_positions")),
                           take("n_layer"), take("n_head"), take("n_embd"))
        require(fields.get("tie_word_embeddings", True), f"{source}: config.json asks for "
                "tie_word_embeddings false, which is not built for gpt2")
        require(take("n_inner", 4 * config.width) == 4 * config.width,
                f"{source}: config.json asks for n_inner {fields.get('n_inner')}, where "
                "only 4 * n_embd is built")
        fits = config.width % config.heads == 0
    else:
        heads, width = take("num_attention_heads"), take("hidden_size")
        config = LlamaConfig(
            take("vocab_size"), min(context, take("max_position_embeddings")),
            take("num_hidden_layers"), heads, take("num_key_value_heads", heads), width,
            take("head_dim", width // heads), take("intermediate_size"),
            float(take("rope_theta", rope_theta(fields, source), (int, float))),
            float(take("rms_norm_eps", 1e-6, float)), bias=family == "qwen2",
            head_norm=family == "qwen3", tied=bool(fields.get("tie_word_embeddings")))
        used.update(["rope_parameters", "rope_scaling"])
        if family != "llama" and not fields.get("use_sliding_window"):
            used.update(["sliding_window", "max_window_layers"])
        fits = heads % config.kv_heads == 0 and config.head_size % 2 == 0
    require(fits, f"{source}: config.json has heads that do not fit its width")
    used.add("tie_word_embeddings")
    if set(fields.get("layer_types") or []) <= {"full_attention"}:
        used.add("layer_types")
    for name in fields.keys() - used:
        value = fields[name]
        require(value == FIXED[name] if name in FIXED else not value,
                f"{source}: config.json asks for {name} {value}, which is not built")
    return config


def rope_theta(fields, source):
    """The base of the angles, which newer configs have beside the kind of scaling."""
    found = 10000.0
    for name in "rope_scaling", "rope_parameters":
        rope = dict(fields.get(name) or {})
        kind = rope.pop("rope_type", rope.pop("type", "default"))
        rope.pop("type", None)
        found = rope.pop("rope_theta", found)
        require(kind == "default" and not rope, f"{source}: config.json asks for {name} "
                f"{fields.get(name)}, which is not built")
    return found


def write_config(config, kind):
    """The reverse, for a GPT, Llama or ScalarGPT -> the fields of a config.json."""
    scores = dict(id2label={"0": "score"}, label2id={"score": 0})
    head, scores = ("LMHeadModel", {}) if kind != "ScalarGPT" else (
        "ForSequenceClassification", scores)
    shared = dict(vocab_size=config.vocab_size, dtype="float32", **scores)
    if isinstance(config, GPTConfig):
        return dict(architectures=[f"GPT2{head}"], model_type="gpt2", n_layer=config.layers,
                    n_positions=config.context, n_head=config.heads, n_embd=config.width,
                    activation_function="gelu_new", layer_norm_epsilon=1e-5, **shared)
    family = "Qwen2" if config.bias else "Qwen3" if config.head_norm else "Llama"
    head = head.replace("LMHeadModel", "ForCausalLM")
    return dict(
        architectures=[f"{family}{head}"], model_type=family.lower(), hidden_act="silu",
        hidden_size=config.width, intermediate_size=config.hidden, rms_norm_eps=config.eps,
        num_hidden_layers=config.layers, num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads, head_dim=config.head_size,
        max_position_embeddings=config.context, tie_word_embeddings=config.tied,
        rope_theta=config.theta,
        rope_parameters=dict(rope_type="default", rope_theta=config.theta), **shared)


def their_names(ours, words):
    """blocks.3.norm1.weight -> [transformer.h.3.ln_1.weight], as a list of one or more."""
    module, kind = ours.removeprefix("trunk.").rsplit(".", 1)
    before = ""
    if module.startswith("blocks."):
        _, layer, module = module.split(".", 2)
        before = f"{words['blocks']}.{layer}."
    return [f"{before}{word}.{kind}" for word in words[module].split()]


def turned(name):
    """Whether GPT-2 keeps this matrix as (inputs, outputs), and not as torch's Linear."""
    return ".c_" in name and name.endswith(".weight")


@torch.no_grad()
def fill(model, tensors, words, source):
    """Copy tensors {their name: tensor} into a model; a UserError unless all is there.

    The dict is emptied on the way, so that memory holds the weights once.
    """
    if words is GPT2 and "wte.weight" in tensors:  # as in the first release
        for name in list(tensors):
            tensors[f"transformer.{name}"] = tensors.pop(name)
    for ours, parameter in model.state_dict().items():
        parts, names = [], their_names(ours, words)
        for name in names:
            if name == "score.bias":  # others' scores have none
                tensors.setdefault(name, torch.zeros(1))
            require(name in tensors, f"{source} lacks the tensor {name}")
            part = tensors.pop(name)
            parts.append(part.T if turned(name) and part.dim() == 2 else part)
        if ours.endswith("positions.weight"):
            parts = [part[:len(parameter)] for part in parts]
        shapes = [tuple(part.shape) for part in parts]
        fits = all(shape and shape[1:] == parameter.shape[1:] for shape in shapes)
        require(fits and sum(shape[0] for shape in shapes) == len(parameter),
                f"{source}: {' '.join(names)} of the shape {shapes} where config.json says "
                f"{tuple(parameter.shape)}")
        parameter.copy_(torch.cat(parts))
    known = NO_WEIGHTS + ("lm_head.weight",)  # tied, or it had been taken
    left = [name for name in tensors if not name.endswith(known)]
    require(not left, f"{source} has tensors that are not built: {', '.join(left[:3])}")


def named(model, words):
    """A model's weights under their names -> {their name: tensor}, each of its own."""
    tensors = {}
    for ours, weight in model.state_dict().items():
        names, config = their_names(ours, words), model.config
        sizes = [len(weight) // len(names)] * len(names)
        if len(names) == 3:
            sizes = [K * config.head_size
                     for K in (config.heads, config.kv_heads, config.kv_heads)]
        for name, part in zip(names, weight.split(sizes)):
            tensors[name] = (part.T if turned(name) else part).cpu().clone().contiguous()
    return tensors
