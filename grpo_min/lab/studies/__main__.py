"""The command of the studies: python -m grpo_min.lab.studies NAME [options], or `all`, or --help for their names."""
import sys
import time
from datetime import date
from pathlib import Path

from grpo_min.lab.report import machine
from grpo_min.lab.studies import (baselines, countdown, coverage, credit, critic, forgetting, gradients, group_size,
                                  is_rl_needed, kl, length, luck, noise, overoptimisation, placebo, real, recipes,
                                  recipes_one_update, threads, tuning)
from grpo_min.lab.studies.common import StudyConfig, table, write_study
from grpo_min.run.config import parse, pick_device, require, run_command

IN_ALL = {"baselines": baselines, "group_size": group_size, "recipes": recipes, "length": length,
          "gradients": gradients, "recipes_one_update": recipes_one_update, "is_rl_needed": is_rl_needed,
          "critic": critic, "credit": credit, "noise": noise, "overoptimisation": overoptimisation, "kl": kl,
          "countdown": countdown, "coverage": coverage, "placebo": placebo, "forgetting": forgetting}
STUDIES = {"tuning": tuning, **IN_ALL, "luck": luck, "threads": threads, "real": real}


def run_all(config):
    """The studies of IN_ALL, one after the other. Where nothing had been run before, minutes.md says how long each
    took."""
    from_nothing, minutes = not Path(config.run).exists(), {}
    for name, module in IN_ALL.items():
        print(f"\n=== {name}, study {len(minutes) + 1} of {len(IN_ALL)} ".ljust(100, "="), flush=True)
        start = time.perf_counter()
        module.study(config)
        minutes[name] = (time.perf_counter() - start) / 60
    minutes["**all**"] = sum(minutes.values())
    if from_nothing:
        lines = table(["study", "minutes"], [[name, f"{taken:.1f}"] for name, taken in minutes.items()])
        write_study(config, "minutes", [*lines, "", f"{machine(pick_device(config.device))}, {date.today()}."])


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    names = [argument for argument in argv[:1] if not argument.startswith("-")]
    config = parse(StudyConfig, argv[len(names):])
    known = [*STUDIES, "all"]
    require(names, f"name a study first: {', '.join(known)}")
    require(names[0] in known, f"no study has the name {names[0]}; name a study first: {', '.join(known)}")
    pick_device(config.device)
    if config.quick:
        config.run = str(Path(config.run) / "quick")
        config.out = config.run if config.out == StudyConfig.out else config.out      # not over what is published
        config.eval_prompts = min(config.eval_prompts, 20)
    if names[0] == "all":
        run_all(config)
    else:
        STUDIES[names[0]].study(config)


if __name__ == "__main__":
    run_command(main)
