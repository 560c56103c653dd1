"""Going on with a run: its folder is read, checked, and cut back to the last checkpoint."""
import json
import os
import re
import shlex
import subprocess
import sys

from torch import nn

from grpo_min.run.checkpoint import load_checkpoint, load_weights
from grpo_min.run.config import UserError, require
from grpo_min.run.files import read_text, save_file
from grpo_min.run.ranks import RANK, RANKS
from grpo_min.run.table import read_csv, write_csv


class OtherSettings(UserError):
    """A run cannot be resumed, because it was begun with other settings."""


def restore(run):
    """Load the checkpoint into the parts of a log.Run, which begins where that ends."""
    try:
        path = run.folder / "checkpoint.pt"
        old = json.loads(read_text(run.folder / "config.json"))
        checkpoint = load_checkpoint(path)
        changed = [name for name, value in run.settings.items() if old.get(name) != value]
        if checkpoint["step"] == run.config.steps:             # threads matter no more
            changed = [name for name in changed if name != "threads"]
        if not run.schedule and checkpoint["step"] < run.config.steps:
            changed = [name for name in changed if name != "steps"]  # on to more steps
        if changed:
            why = " (its learning rate falls until the last step)"
            raise OtherSettings(f"--resume: {run.folder} was run with other settings: "
                                f"{', '.join(changed)}"
                                f"{why if run.schedule and changed == ['steps'] else ''}")
        (_, model), *others = run.parts.items()
        load_weights(model, checkpoint["model"], path)
        for name, part in others:
            if isinstance(part, nn.Module):
                load_weights(part, checkpoint[name], path)
            else:
                part.load_state_dict(checkpoint[name])
        run.first_step = checkpoint["step"]
        run.rows = read_csv(run.folder / "metrics.csv", run.first_step)
        require(len(run.rows) == run.first_step,
                f"--resume: {run.folder}/metrics.csv lacks rows")
        if RANK == 0:
            write_csv(run.folder / "metrics.csv", run.rows)
            cut_samples(run.folder / "samples.jsonl", run.first_step)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--resume: what is in {run.folder} is damaged ({error})")


def cut_samples(path, first_step):
    """Leave out what was sampled after the checkpoint, and a line that a crash has torn."""
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        step = re.match(rb'{"step": (\d+), ', line)
        if step and int(step[1]) < first_step:
            kept.append(line)
    save_file(path, b"".join(kept))


def resume_command():
    """What a user types to go on."""
    if RANKS > 1:
        return "the same words of torchrun, and --resume"
    arguments = [argument for argument in sys.argv[1:] if argument != "--resume"]
    spec = sys.modules["__main__"].__spec__
    module = getattr(spec, "name", "grpo_min").removesuffix(".__main__")
    if module != "grpo_min" and module.count(".") == 1:  # those of other rooms resume
        arguments.append("--resume")
    return command_line(module, *arguments)


def command_line(*words):
    """python -m and these words, as the shell of this machine reads them."""
    join = subprocess.list2cmdline if os.name == "nt" else shlex.join
    return join(["python", "-m", *words])
