"""Solution of exercise 2."""
from grpo_min.tokenizer import END


def completion_mask(completion_ids):
    """(B, N) -> (B, N): True up to and with the first END of each row."""
    is_end = (completion_ids == END).long()                                                   # (B, N)
    ends_before = is_end.cumsum(dim=1) - is_end                                               # (B, N)
    return ends_before == 0
