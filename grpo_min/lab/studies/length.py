"""By what should the sum over a completion's tokens be divided: by nothing, its length, the batch's tokens, or a
constant? Does dividing by the length make wrong answers longer? Writes length.csv, -curves.csv, .md and .png."""
from grpo_min.lab.studies.learning import compare_settings

SETTINGS = {name: dict(aggregation=name) for name in ["sum", "sequence", "token", "constant"]}


def study(config):
    compare_settings(config, "length", "aggregation", SETTINGS)
