"""Run the notebooks from top to bottom and save them with their outputs: python tutorials/build.py [01 04 ..]

Every notebook gets the same first cell, the one below. Needs nbclient and ipykernel.
"""
import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from traitlets.config import Config

HERE = Path(__file__).parent
FIRST_CELL = '''\
# On Colab this fetches the repository and what is missing there. Elsewhere it only goes to the repository's folder.
import importlib.util, os, subprocess, sys
from pathlib import Path

REPOSITORY = "https://github.com/grpo-min/grpo_min"
if "google.colab" in sys.modules and not Path("grpo_min").exists():
    subprocess.run(["git", "clone", "--quiet", "--depth", "1", REPOSITORY, "grpo_min"], check=True)
    missing = [name for name in ("numpy", "tiktoken", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *missing], check=True)
    os.chdir("grpo_min")
root = next(folder for folder in [Path.cwd(), *Path.cwd().parents] if (folder / "grpo_min" / "grpo.py").exists())
os.chdir(root)
sys.path.insert(0, str(root))'''


def notebooks(numbers=()):
    """The notebooks, or those whose names begin with one of the numbers."""
    paths = sorted(HERE.glob("[0-9][0-9]_*.ipynb"))
    matching = [path for path in paths if not numbers or path.name.startswith(tuple(numbers))]
    if not matching:
        names = ", ".join(path.name for path in paths)
        sys.exit(f"error: no notebook begins with {' or '.join(numbers)}; there are {names}")
    return matching


def run(path, save=True):
    """Execute a notebook in a kernel of its own, save it with its outputs -> the notebook.

    CellExecutionError if a cell fails; the notebook on the disk then stays as it is.
    """
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[0].source = FIRST_CELL
    notebook.metadata = dict(kernelspec=dict(name="python3", display_name="Python 3", language="python"),
                             language_info=dict(name="python"))
    resources = dict(metadata=dict(path=str(HERE)))
    with tempfile.TemporaryDirectory() as folder:             # sockets: two runs at a time may choose the same TCP port
        config = Config(KernelManager=dict(transport="ipc", ip=f"{folder}/kernel"))
        NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources, config=config).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)                      # when each cell ran: another text in every run
    if save:
        nbformat.write(notebook, path)
    return notebook


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("numbers", nargs="*", help="notebooks to run, by how their names begin (default: all)")
    for path in notebooks(parser.parse_args(argv).numbers):
        started = time.perf_counter()
        try:
            run(path)
        except CellExecutionError as error:
            sys.exit(f"error: {path.name}: {error}")
        print(f"{path.name}: {time.perf_counter() - started:.0f} s, {os.path.getsize(path) / 2**10:.0f} KB", flush=True)


if __name__ == "__main__":
    main()
