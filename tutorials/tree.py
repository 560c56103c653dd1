"""The tree of notebooks 01 and 05: a policy that can say 15 things, so that every expectation is a finite sum.

A state is the tokens written so far; the prompt is always `greet me`. C = 15 completions of up to LONGEST = 3 tokens,
7 states, 3 actions. Entries behind the end of a completion are 0 and not in MASK.
"""
import torch

ACTIONS = "hi", "!", "END"
LONGEST = 3                                     # tokens, END included


def is_over(tokens):
    return len(tokens) == LONGEST or tokens[-1:] == ("END",)


def all_completions(tokens=()):
    if is_over(tokens):
        return [tokens]
    return [longer for action in ACTIONS for longer in all_completions(tokens + (action,))]


COMPLETIONS = all_completions()
STATES = [()]
for state in STATES:                            # grows while it is read: from each state on to those that follow
    STATES += [state + (a,) for a in ACTIONS if not is_over(state + (a,))]
NAMES = [" ".join(s) or "greet me" for s in STATES]


def rectangle(rows):
    """Rows of different lengths, padded with 0: (C, LONGEST)."""
    return torch.tensor([row + [0] * (LONGEST - len(row)) for row in rows])


AT = rectangle([[STATES.index(c[:t]) for t in range(len(c))] for c in COMPLETIONS])  # (C, 3) the state of each token
IDS = rectangle([[ACTIONS.index(token) for token in c] for c in COMPLETIONS])  # (C, 3) the action
MASK = rectangle([[1] * len(c) for c in COMPLETIONS]).bool()  # (C, 3)
LOGITS = torch.tensor([[0.7, 0.4, 0.0],         # nothing written yet:      hi, !, END
                       [0.5, 0.2, 0.4],         # greet me | hi
                       [0.6, 0.3, 0.1],         # greet me | !
                       [0.2, 0.0, 0.5],         # greet me | hi hi
                       [0.4, 0.5, 0.6],         # greet me | hi !
                       [0.1, 0.6, 0.2],         # greet me | ! hi
                       [0.3, 0.1, 0.4]], dtype=torch.float64)  # (states, actions)


def reward_of(completion):
    """0.6 if it begins with hi, 0.4 more if ! stands before END; 0 if the length limit cut it."""
    *words, last = completion
    if last != "END":
        return 0.0
    return 0.6 * (words[:1] == ["hi"]) + 0.4 * (words[-1:] == ["!"])


REWARDS = torch.tensor([reward_of(c) for c in COMPLETIONS], dtype=torch.float64)  # (C,)


def logprobs_of(logits):
    """log pi(token t | state t) of every token of every completion, 0 where there is none: (C, 3)."""
    return logits.log_softmax(dim=-1)[AT, IDS] * MASK


def probabilities(logits):
    """Of the completions: (C,)."""
    return logprobs_of(logits).sum(dim=1).exp()


def values_of(logits):
    """V of each state, the mean reward of the completions that pass it: (states,)."""
    p = probabilities(logits)
    through = torch.stack([((AT == s) & MASK).any(dim=1) for s in range(len(STATES))])  # (states, C)
    return (through * p * REWARDS).sum(dim=1) / (through * p).sum(dim=1)


def q_of(logits):
    """Q (states, actions): the reward if the completion is over after the action, else the value of what follows."""
    V, Q = values_of(logits), torch.zeros_like(logits)
    for i, s in enumerate(STATES):
        for j, a in enumerate(ACTIONS):
            after = s + (a,)
            Q[i, j] = REWARDS[COMPLETIONS.index(after)] if is_over(after) else V[STATES.index(after)]
    return Q
