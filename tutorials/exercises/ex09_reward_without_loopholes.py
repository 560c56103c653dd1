"""Exercise 9: a reward function without loopholes.

What      The function below is to say whether the answer to `start with 3, times 9, plus 1.` is right. It looks whether
          the right number occurs in the completion. A policy that is trained on it finds out what that allows. Mend it.
Why       RL raises what is rewarded, not what was meant. Each loophole is a shorter way than the task. Do not wait for
          a run to show it: in the 40 steps of --train the policy learns to think, which pays with either reward, and
          does not find the loopholes. A longer run, or another policy, may.
Rules     1 if the completion finished and its final answer is exactly the right number, as it is written, else 0. The
          final answer is the whole completion or, where it begins with <think>some thoughts</think>, what stands after
          it; spaces around it do not matter. One pair of tags at most, with something in it.
Signature reward(prompts, completions, answer, finished, **columns) -> list of B floats; all arguments are lists of B.
          This is TRL's signature, so that a function written here runs there.
Hint      Loopholes are found by answering: 128 where 28 is right, 27 28 29, 28.0, <think>28</think>27, half a pair of
          tags, and an answer that the length limit cut at 28. Read what is said, never eval it.
Real one  grpo_min/rewards.py, correct and final_answer

    python -m tutorials.exercises.check 9
"""


def reward(prompts, completions, answer, finished=None, **columns):
    """1.0 for each right completion, 0.0 for the others."""
    return [float(right in completion) for completion, right in zip(completions, answer)]
