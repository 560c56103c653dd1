"""How many completions in a group? GRPO with groups of 2 to 64, and fewer prompts the larger they are, so that a step
has 128 completions. Writes group_size.csv, -curves.csv, .md and .png."""
from grpo_min.lab.studies.learning import compare_settings

SETTINGS = {f"{128 // G} x {G}": dict(prompts_per_step=128 // G, group_size=G) for G in [8, 2, 4, 16, 32, 64]}


def study(config):
    compare_settings(config, "group_size", "prompts x completions", SETTINGS)
