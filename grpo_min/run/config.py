"""From a dataclass to a command line, and from a user's mistake to one line of text."""
import argparse
import dataclasses
import sys

import torch

from grpo_min.run.ranks import join, leave, meet


class UserError(ValueError):
    """Something the user can mend: one line, and an exit code of the command."""

    def __init__(self, message, exit_code=2):
        super().__init__(message)
        self.exit_code = exit_code


def option(default, help, choices=None):
    """A field of a config: its default, and its meaning with the unit, for --help."""
    return dataclasses.field(default=default, metadata=dict(help=help, choices=choices))


def parse(config_class, argv=None, **defaults):
    """Command line -> config: the field group_size is the option --group-size.

    defaults: of fields that shall have others than the class says.
    """
    parser = argparse.ArgumentParser(description=config_class.__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda text: require(False, f"{text} (--help explains every option)")
    for field in dataclasses.fields(config_class):
        help = field.metadata["help"].replace("%", "%%") + f" (default: {field.default})"
        keywords = dict(type=type(field.default), choices=field.metadata["choices"])
        if isinstance(field.default, bool):
            keywords = dict(action=argparse.BooleanOptionalAction)
        parser.add_argument("--" + field.name.replace("_", "-"), default=field.default,
                            help=help, **keywords)
    parser.set_defaults(**defaults)
    return config_class(**vars(parser.parse_args(argv)))


def require(condition, message):
    """Raise a UserError unless the condition holds."""
    if not condition:
        raise UserError(message)


def require_positive(config, *names):
    """A UserError unless the named fields are above 0 (and numbers)."""
    for name in names:
        value, option = getattr(config, name), name.replace("_", "-")
        require(value > 0, f"--{option} must be above 0, not {value}")


def pick_device(name):
    """A torch.device; auto is CUDA if there is any. Under torchrun: this rank's own."""
    from grpo_min.run.cores import keep_memory, limit_threads
    limit_threads()
    keep_memory()
    available = dict(cpu=True, cuda=torch.cuda.is_available(),
                     mps=torch.backends.mps.is_available())
    if name == "auto":
        name = "cuda" if available["cuda"] else "cpu"
    require(available.get(name, True),
            f"--device {name}: torch finds no {name.upper()} device here")
    return join(torch.device(name))


def run_command(main):
    """Run a command's main(): a UserError becomes one line and its exit code."""
    code = 0
    for stream in sys.stdout, sys.stderr:      # Windows' may know 256 characters only
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        meet()
        main()
        meet()
    # OSError: a full disk, a rank that has ended.
    except (UserError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        code = 130
    leave(code)
