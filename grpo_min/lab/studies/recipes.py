"""Are the newer recipes better? Each of them with 4 updates per batch, since with one they hardly differ (the study
recipes_one_update). Writes recipes.csv, -curves.csv, .md and .png."""
from grpo_min.lab.studies.learning import compare_settings
from grpo_min.variants import RECIPES

# Those that were measured, DAPO before its penalty for length was here.
MEASURED = {name: dict(RECIPES[name], overlong_buffer=0.0)
            for name in ("grpo", "dapo", "dr_grpo", "rloo", "gspo", "cispo", "reinforce++")}
SETTINGS = {name: dict(recipe, minibatches=4) for name, recipe in {"no recipe": {}, **MEASURED}.items()}
NOTE = ("`dapo`: in the figure, the accuracy in training leaves out the dropped groups, in most of which every answer "
        "is right. ")


def study(config):
    compare_settings(config, "recipes", "recipe", SETTINGS, NOTE)
