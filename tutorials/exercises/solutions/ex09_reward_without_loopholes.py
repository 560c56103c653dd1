"""Solution of exercise 9."""


def reward(prompts, completions, answer, finished=None, **columns):
    """1.0 for each right completion, 0.0 for the others."""
    finished = finished or [True] * len(completions)
    return [float(end and final_answer(completion) == right)
            for completion, right, end in zip(completions, answer, finished)]


def final_answer(completion):
    """What stands after one pair of tags, or the whole where there is no tag; None where the tags are wrong."""
    if "<think>" not in completion and "</think>" not in completion:
        return completion.strip()
    thoughts, _, answer = completion.removeprefix("<think>").partition("</think>")
    well_formed = completion.startswith("<think>") and thoughts and completion.count("</think>") == 1
    return answer.strip() if well_formed and completion.count("<think>") == 1 else None
