"""Which baseline learns best? GRPO with its advantage formed in four ways.

Writes baselines.csv, -curves.csv, .md and .png. leave_one_out is not among the four: it is the mean's advantage times
G / (G - 1), see tests/test_variants.py.
"""
from grpo_min.lab.studies.learning import compare_settings

SETTINGS = {"mean": {}, "none": dict(advantage="none"), "batch": dict(advantage="batch"),
            "mean_std": dict(scale_advantages=True)}      # the first is the default, in every study


def study(config):
    compare_settings(config, "baselines", "advantage", SETTINGS)
