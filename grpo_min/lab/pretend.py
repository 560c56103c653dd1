"""A card that is not there: a torch device whose tensors hold CPU data, to find what would fail on a real one.

    with pretend_card() as card:
        torch.zeros(3, device=card.device) + torch.zeros(3)  # RuntimeError, as on any card
        print(card.waits)                                    # {("item", "grpo_min/run/optim.py:20"): 3, ..}

It computes what the CPU computes, to the bit, and refuses what cards refuse: tensors of the CPU beside its own, unless
they are 0-dimensional, and, as Apple's do, float64. It counts how often the CPU would wait for a real card, and where.
Stricter than a card: an index on the CPU is refused, too. What it lacks: streams, graphs, autocast.
"""
import traceback
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

PACKAGE = Path(__file__).parent.parent
CAN_PRETEND = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")  # experimental, says torch
# Beside copies: a number, or the size of a result, that the CPU has to know.
WAITED_FOR = dict(_local_scalar_dense="item", equal="equal", nonzero="nonzero", masked_select="mask",
                  masked_scatter_backward="mask")


class CardTensor(torch.Tensor):
    """What Python sees of a tensor on the card; `data_on_cpu` is what it holds."""

    @staticmethod
    def __new__(cls, data):
        if data.dtype == torch.float64:
            raise TypeError("the card has no float64")
        tensor = torch.Tensor._make_wrapper_subclass(cls, data.shape, data.stride(), data.storage_offset(),
                                                     dtype=data.dtype, device="card:0")
        tensor.data_on_cpu = data
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl  # Card does all, one level below

    @classmethod
    def __torch_dispatch__(cls, *_):
        return NotImplemented

    def __reduce_ex__(self, protocol):
        """torch.save writes a tensor of the CPU, as torch.load(map_location="cpu") makes it of a real card's."""
        return self.cpu().__reduce_ex__(protocol)

    def tolist(self):  # this and the next torch does itself for tensors of its own class alone
        return self.cpu().tolist()

    def __format__(self, form):
        return self.item().__format__(form)

    def __repr__(self, **_):
        return f"{self.data_on_cpu} on the card"


def held(tensor):
    return getattr(tensor, "data_on_cpu", tensor)


def kind_of_wait(name, arguments, device):
    """What the CPU waits for in an operation on the card, or "" if it goes on."""
    if name in ("copy_", "_to_copy"):
        from_card = isinstance(arguments[name == "copy_"], CardTensor)
        to_card = isinstance(arguments[0], CardTensor) if name == "copy_" else device == "card"
        return "" if from_card == to_card else "to the CPU" if from_card else "from the CPU"
    if "index" in name and any(getattr(x, "dtype", 0) is torch.bool for x in tree_leaves(arguments[1])):
        return "mask"
    return WAITED_FOR.get(name, "")


def place_of_wait():
    """The innermost line of the package that is being run: "file:line", or "" if there is none."""
    for frame, line in traceback.walk_stack(None):
        path = Path(frame.f_code.co_filename)
        if PACKAGE in path.parents and path != Path(__file__):
            return f"{path.relative_to(PACKAGE.parent)}:{line}"
    return ""


class Card(TorchDispatchMode):
    """Is asked for every operation of torch. waits: a Counter {(kind, "file:line"): times}, which may be cleared."""

    def __init__(self):
        super().__init__()
        self.device, self.waits = torch.device("card"), Counter()

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        """Compute with what the tensors hold; the result is where they are, or where it is asked for."""
        keywords, name = keywords or {}, operation.overloadpacket.__name__
        given = [x for x in tree_leaves((arguments, keywords)) if isinstance(x, torch.Tensor)]
        ours = [x for x in given if isinstance(x, CardTensor)]
        device = torch.device(keywords.get("device") or ("card" if ours else "cpu")).type
        if device == "cpu" and not ours:
            return operation(*arguments, **keywords)
        if ours and name != "copy_" and any(x is held(x) and x.dim() > 0 for x in given):
            raise RuntimeError(f"Expected all tensors to be on the same device, but found card:0 and cpu: {operation}")
        kind = kind_of_wait(name, arguments, device)
        if kind:
            self.waits[kind, place_of_wait()] += 1
        if "device" in keywords:
            keywords = dict(keywords, device="cpu")
        arguments, keywords = tree_map_only(torch.Tensor, held, (arguments, keywords))
        result = operation(*arguments, **keywords)
        assert all(x.shape == held(x).shape for x in ours), f"{operation} changes a shape in place"
        known = {id(held(x)): x for x in given}  # an operation in place returns the tensor that it was given
        return result if device == "cpu" else tree_map_only(
            torch.Tensor, lambda x: known[id(x)] if id(x) in known else CardTensor(x), result)


@contextmanager
def pretend_card():
    """-> a Card, with its device and waits."""
    if torch._C._get_privateuse1_backend_name() != "card":
        backend_registration._setup_privateuseone_for_python_backend("card")  # for the rest of this process
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # or torch.tensor(.., device="card") fails
    try:
        # Attention by plain products, the one way of both devices. Gradients in this thread: torch starts a thread per
        # card with the first of them alone, when there may be no card yet, and from another no line could be told.
        with sdpa_kernel(SDPBackend.MATH), torch.autograd.set_multithreading_enabled(False), Card() as card:
            yield card
    finally:
        torch._C._set_only_lift_cpu_tensors(before)
