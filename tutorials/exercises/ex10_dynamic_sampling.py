"""Exercise 10: dynamic sampling.

What      A group whose rewards are all equal has advantages of 0 and teaches nothing. Replace such groups by groups of
          other prompts, until there is none left in the batch, or the rounds are over, or the prompts are.
Why       When the policy is good, most groups are all right, and most of a batch is wasted. DAPO, 2503.14476,
          section 3.2.
Steps     In each round: find the groups of equal rewards, draw as many new ones, put them in their places. The next
          round looks at all groups again, for the new ones may be equal, too.
Shapes    batch: a list of Q groups; a group is a list of G rewards. draw(n) samples groups of other prompts and returns
          a list of n groups, of fewer if the prompts are used up. rounds: how often draw may be called, at most.
          Returns (a list of Q groups, number of groups that were replaced). What is still equal then stays, so that a
          batch is never smaller.
Hint      Equal means equal to each other, not equal to 0: all right teaches as little as all wrong. Rewards need not
          be 0 and 1.
Real one  grpo_min/variants.py, refilled

    python -m tutorials.exercises.check 10
"""


def fill_batch(batch, draw, rounds):
    """-> (batch, dropped): Q groups, and how many were replaced."""
    raise NotImplementedError
