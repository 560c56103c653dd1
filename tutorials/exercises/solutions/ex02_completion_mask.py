"""Solution of exercise 2."""


def completion_mask(completion_ids, end):
    """(B, N) -> (B, N): True up to and with the first END of each row."""
    is_end = (completion_ids == end).long()  # (B, N)
    ends_before = is_end.cumsum(dim=1) - is_end  # (B, N)
    return ends_before == 0
