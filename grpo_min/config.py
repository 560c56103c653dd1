"""From a dataclass to a command line, and from a user's mistake to one line of text."""
import argparse
import dataclasses
import sys

import torch

from grpo_min.ranks import join, leave


class UserError(ValueError):
    """Something the user can mend. Commands print it as one line and exit with `exit_code`."""

    def __init__(self, message, exit_code=2):
        super().__init__(message)
        self.exit_code = exit_code


def option(default, help, choices=None):
    """A field of a config: its default, and its meaning with the unit, which `--help` shows."""
    return dataclasses.field(default=default, metadata=dict(help=help, choices=choices))


def parse(config_class, argv=None, recipes={}):
    """Command line -> config. Every field is an option: `group_size: int = option(8, "...")` is --group-size 8.

    recipes: {name: {field: value}}; --recipe NAME sets these fields, and an option given beside it wins.
    """
    parser = argparse.ArgumentParser(description=config_class.__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: require(False, f"{message} (--help explains every option)")
    for field in dataclasses.fields(config_class):
        help = field.metadata["help"].replace("%", "%%") + f" (default: {field.default})"
        kind = (dict(action=argparse.BooleanOptionalAction) if isinstance(field.default, bool)
                else dict(type=type(field.default), choices=field.metadata["choices"]))
        parser.add_argument("--" + field.name.replace("_", "-"), default=field.default, help=help, **kind)
    if recipes:
        parser.add_argument("--recipe", choices=recipes, help="settings that belong together, see below")
        parser.epilog = "recipes (an option given beside --recipe wins):\n" + "\n".join(
            f"  {name:<12} {as_options(fields)}" for name, fields in recipes.items())
    recipe = vars(parser.parse_args(argv)).get("recipe")
    parser.set_defaults(**recipes.get(recipe, {}))
    settings = vars(parser.parse_args(argv))
    settings.pop("recipe", None)
    return config_class(**settings)


def as_options(fields):
    """{clip_eps: 0.2, resume: True} -> --clip-eps 0.2 --resume"""
    return " ".join(f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}")
                    for name, value in fields.items())


def require(condition, message):
    """Raise a UserError unless the condition holds."""
    if not condition:
        raise UserError(message)


def require_positive(config, *names):
    """A UserError unless the named fields are above 0 (and numbers)."""
    for name in names:
        require(getattr(config, name) > 0, f"--{name.replace('_', '-')} must be above 0, not {getattr(config, name)}")


def pick_device(name):
    """auto, cpu, cuda or mps -> a torch.device; auto is CUDA where there is one, else the CPU. Under torchrun: this
    rank's own, after it has met the others."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    require(name != "cuda" or torch.cuda.is_available(), "--device cuda: torch finds no CUDA device here")
    require(name != "mps" or torch.backends.mps.is_available(), "--device mps: torch finds no MPS device here")
    return join(torch.device(name))


def run_command(main):
    """Run a command's main(): a UserError becomes one line on standard error and its exit code."""
    code = 0
    try:
        main()
    except (UserError, OSError) as error:      # OSError: a full disk, a folder that may not be written to
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        code = 130
    leave(code)
