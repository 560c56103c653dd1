"""What others call things: the fields of a config.json, and the tensors of a checkpoint.

A config is refused, by the field's name, for whatever it asks for that is not built.
"""
from contextlib import contextmanager

import torch

from grpo_min.model import GPTConfig
from grpo_min.real.llama import LlamaConfig
from grpo_min.run.config import UserError, require

# Our module: theirs. Several of theirs are ours below each other.
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
        "norm1": "attn_norm", "attention.qkv": "attn_q attn_k attn_v", "norm2": "ffn_norm",
        "attention.out": "attn_output", "attention.norm_q": "attn_q_norm",
        "attention.norm_k": "attn_k_norm", "up": "ffn_gate ffn_up", "down": "ffn_down"}

# Our field: theirs; and a GGUF's: theirs.
GPT2_FIELDS = dict(vocab_size="vocab_size", context="n_positions", layers="n_layer",
                   heads="n_head", width="n_embd")
LLAMA_FIELDS = dict(
    vocab_size="vocab_size", context="max_position_embeddings", layers="num_hidden_layers",
    heads="num_attention_heads", kv_heads="num_key_value_heads", width="hidden_size",
    head_size="head_dim", hidden="intermediate_size", eps="rms_norm_eps", theta="rope_theta"
)
GGUF_FIELDS = {
    "block_count": "num_hidden_layers", "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size", "context_length": "max_position_embeddings",
    "attention.head_count": "num_attention_heads", "rope.freq_base": "rope_theta",
    "attention.head_count_kv": "num_key_value_heads", "attention.key_length": "head_dim",
    "attention.value_length": "head_dim", "rope.dimension_count": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps", "vocab_size": "vocab_size"}
# What fields must say, and those that do not change what a trained model computes.
FIXED = dict(activation_function="gelu_new", layer_norm_epsilon=1e-5, hidden_act="silu",
             scale_attn_weights=True, pretraining_tp=1)
SILENT = set("""model_type architectures transformers_version torch_dtype dtype use_cache
    _name_or_path bos_token_id eos_token_id pad_token_id initializer_range return_dict n_ctx
    attention_dropout attn_pdrop embd_pdrop resid_pdrop summary_type summary_use_proj
    summary_activation summary_proj_to_labels summary_first_dropout task_specific_params
    id2label label2id is_llama_config transformers.js_config sliding_window
    max_window_layers""".split())  # not use_sliding_window


@contextmanager
def refusing(what):
    """Whatever goes wrong with others' data or packages is one line, a UserError."""
    try:
        yield
    except UserError:
        raise
    except ImportError as error:
        package = error.name.split(".")[0]
        raise UserError(f"{what}: it takes {package}: python -m pip install {package}")
    except Exception as error:  # others' code fails in many ways
        line = " ".join(str(error).split())[:200]
        raise UserError(f"{what}: {line or type(error).__name__}")


def read_config(fields, context, source):
    """The fields of a config.json -> a GPTConfig or LlamaConfig of at most that context, in
    tokens; or a UserError."""
    fields = {name: value for name, value in fields.items() if value is not None}
    family = fields.get("model_type")
    require(family in ("gpt2", "llama", "qwen2", "qwen3"), f"{source}: a model of the kind "
            f"{family} is not built, only gpt2, llama, qwen2 and qwen3")
    tied = bool(fields.pop("tie_word_embeddings", family == "gpt2"))
    if family == "gpt2":
        words, fixed = GPT2_FIELDS, dict(FIXED, n_inner=4 * fields["n_embd"])
        require(tied, f"{source}: config.json asks for no tie_word_embeddings: not built")
    else:
        heads, rope = fields["num_attention_heads"], fields.get("rope_parameters", {})
        fields = dict(num_key_value_heads=heads, head_dim=fields["hidden_size"] // heads,
                      rms_norm_eps=1e-6, rope_theta=rope.get("rope_theta", 1e4)) | fields
        words, fixed = LLAMA_FIELDS, dict(
            FIXED, layer_types=["full_attention"] * fields["num_hidden_layers"],
            rope_parameters=dict(rope_type="default", rope_theta=fields["rope_theta"]))
    for name in sorted(fields.keys() - SILENT - {*words.values()}):
        fine = fields[name] == fixed[name] if name in fixed else not fields[name]
        require(fine, f"{source}: config.json asks for {name} {fields[name]}: not built")
    sizes = {ours: fields[name] for ours, name in words.items()}
    sizes["context"] = min(context, sizes["context"])
    return GPTConfig(**sizes) if family == "gpt2" else LlamaConfig(
        **sizes, bias=family == "qwen2", head_norm=family == "qwen3", tied=tied)


def write_config(config, scores):
    """The reverse, for a policy or a model that scores -> the fields of a config.json."""
    if isinstance(config, GPTConfig):
        family, head, words = "GPT2", "LMHeadModel", GPT2_FIELDS
        fields = dict(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)  # by default 0.1
    else:
        family = "Qwen2" if config.bias else "Qwen3" if config.head_norm else "Llama"
        head, words = "ForCausalLM", LLAMA_FIELDS
        fields = dict(tie_word_embeddings=config.tied, rope_parameters=dict(
            rope_type="default", rope_theta=config.theta))
    if scores:
        head, fields["id2label"] = "ForSequenceClassification", {"0": "score"}
    fields.update(model_type=family.lower(), architectures=[family + head], dtype="float32")
    return fields | {theirs: getattr(config, ours) for ours, theirs in words.items()}


def their_names(ours, words):
    """blocks.3.norm1.weight -> [transformer.h.3.ln_1.weight], as a list of one or more."""
    module, kind = ours.removeprefix("trunk.").rsplit(".", 1)
    before = ""
    if module.startswith("blocks."):
        _, layer, module = module.split(".", 2)
        before = f"{words['blocks']}.{layer}."
    return [f"{before}{word}.{kind}" for word in words[module].split()]


def turned(name, weight):
    """As torch's Linear has it, and back: GPT-2's matrices are (inputs, outputs)."""
    return weight.T if ".c_" in name and weight.dim() == 2 else weight


@torch.no_grad()
def fill(model, tensors, words, source):
    """Copy tensors {their name: tensor}, which are used up, into a model; UserError."""
    if "wte.weight" in tensors:  # as in the first release of GPT-2
        tensors = {f"transformer.{name}": weight for name, weight in tensors.items()}
    tensors.setdefault("score.bias", torch.zeros(1))  # others' scores have none
    for ours, parameter in model.state_dict().items():
        names = their_names(ours, words)
        for name in names:
            require(name in tensors, f"{source} lacks the tensor {name}")
        whole = torch.cat([turned(name, tensors.pop(name)) for name in names])
        if ours.endswith("positions.weight"):
            whole = whole[:len(parameter)]
        require(whole.shape == parameter.shape, f"{source}: {' '.join(names)} of the shape "
                f"{[*whole.shape]} where config.json says {[*parameter.shape]}")
        parameter.copy_(whole)
    known = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq",  # masks, angles
             "lm_head.weight", "score.bias")  # of a tied head, of a policy
    left = [name for name in tensors if not name.endswith(known)]
    require(not left, f"{source} has tensors that are not built: {', '.join(left[:3])}")


def named(model, words):
    """A model's weights under their names -> {their name: tensor}, each of its own."""
    tensors, config = {}, model.config
    for ours, weight in model.state_dict().items():
        names = their_names(ours, words)
        sizes = [len(weight) // len(names)] * len(names)
        if len(names) == 3:
            heads = [config.heads, config.kv_heads, config.kv_heads]
            sizes = [config.head_size * n for n in heads]
        for name, part in zip(names, weight.split(sizes)):
            tensors[name] = turned(name, part).cpu().clone().contiguous()
    return tensors
