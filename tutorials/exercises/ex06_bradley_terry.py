"""Exercise 6: the Bradley-Terry loss, which makes a reward model of choices.

What      People saw two answers and chose one. The reward model gives each answer a score; the probability that it
          assigns to the choice is sigmoid(score of the chosen - score of the rejected). The loss is the negative
          logarithm of that, averaged over the pairs.
Why       Nobody can say "this answer is worth 3.7", but everybody can say which of two is better.
Formula   loss = mean of -log sigmoid(chosen - rejected). Ouyang et al., 2203.02155, eq. 1.
Shapes    chosen, rejected (n,): row i is one pair. Returns a scalar.
Hint      log(sigmoid(x)) is -inf for x = -200, because sigmoid(x) is rounded to 0. torch.nn.functional has a function
          for both in one.
Real one  grpo_min/reward_model.py, preference_loss

    python -m tutorials.exercises.check 6
"""
import torch
import torch.nn.functional as F


def preference_loss(chosen, rejected):
    """(n,), (n,) -> scalar."""
    raise NotImplementedError
