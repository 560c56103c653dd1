"""Solution of exercise 10."""


def fill_batch(batch, draw, rounds):
    """-> (batch, dropped): Q groups, and how many were replaced."""
    batch, dropped = list(batch), 0
    for _ in range(rounds):
        equal = [q for q, group in enumerate(batch) if len(set(group)) == 1]
        if not equal:
            break
        fresh = draw(len(equal))
        for q, group in zip(equal, fresh):
            batch[q] = group
        dropped += len(fresh)
        if len(fresh) < len(equal):             # the prompts are used up
            break
    return batch, dropped
