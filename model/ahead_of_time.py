"""Functions compiled ahead of time by torch's AOTInductor: C++ from start to end, called without guards.

`torch.compile` checks before every call that its code still applies; between the small products of
generation on a CPU that costs half of what compiling gains. Here the caller promises it: weights of the
shapes compiled for, and any number of rows. What was compiled is kept in torch's own cache folder
(`TORCHINDUCTOR_CACHE_DIR`), so that only the first process waits for the compiler.
"""

import copy
import hashlib
import json
import os
import tempfile
import warnings
from pathlib import Path

import torch
from torch import nn

from model.precision import cpu_features

EXAMPLE_ROWS = 16  # of an example: any number above 1; the code is made for all


def ahead_of_time(
    function, weights: list, rows: list[torch.Tensor], facts: list, free: list[dict[int, str]] | None = None
) -> "Compiled":
    """function(*weights, *rows) compiled, or found compiled, for objects like `weights` and any number of
    rows.

    weights: objects whose attributes hold tensors; rows: examples of the other arguments; facts: what the
    function knows besides its arguments; free: the dimensions of each of `rows` that may have any size, each
    with a name: equal names, equal sizes; without it the first of each. Raises whatever torch's compiler
    stack raises.
    """
    free = free or [{0: "rows"}] * len(rows)
    fixed = [tensor for thing in weights for tensor in tensors_of(thing)]
    path = package_path(function.__name__, fixed + rows, facts)
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            package = make_package(function, weights, fixed, rows, free, f"{folder}/made.pt2")
            os.replace(package, path)  # another process may have done the same meanwhile
    return Compiled(path)


class Compiled:
    """Calls as `function(weights, rows)`, or `function(rows)` for one tensor of rows."""

    def __init__(self, path: Path):
        self.model = torch._inductor.aoti_load_package(str(path))
        self.run = self.model.loader.run  # calling the model itself looks for nested arguments first

    def __call__(self, weights, rows=None):
        if rows is None:
            return self.run([weights.contiguous()])
        inputs = []
        for thing in weights:
            if not hasattr(thing, "tensors"):  # found once
                thing.tensors = tensors_of(thing)
            inputs += thing.tensors
        found = self.run(inputs + [x.contiguous() for x in rows])  # nothing checks how they lie in memory
        return found if len(found) > 1 else found[0]


def make_package(function, weights, fixed, rows, free, path: str) -> str:
    """Export and compile, about 10 s; what torch's parts warn each other of on the way is left out."""
    sizes = {name: torch.export.Dim(name, max=1 << 24) for names in free for name in names.values()}
    shapes = [{dim: sizes[name] for dim, name in names.items()} for names in free]
    with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = Flat(function, [*weights, *rows])
        fixed = [tensor.clone() for tensor in fixed]  # a tensor given twice would be taken for one for ever
        exported = torch.export.export(
            module, (*fixed, *rows), dynamic_shapes=dict(tensors=(*[None] * len(fixed), *shapes))
        )
        return torch._inductor.aoti_compile_and_package(
            exported,
            package_path=path,
            inductor_configs={
                # Most of the time goes into the code around the kernels, which gains nothing from more.
                "aot_inductor.compile_wrapper_opt_level": "O1",
                "cpp.enable_floating_point_contract_flag": "fast",  # a product and a sum in one instruction
            },
        )


class Flat(nn.Module):
    """A function of objects and tensors as a module of tensors alone, which is what torch.export takes."""

    def __init__(self, function, arguments):
        super().__init__()
        self.function, self.arguments = function, arguments

    def forward(self, *tensors):
        rest = iter(tensors)
        return self.function(*[with_tensors(argument, rest) for argument in self.arguments])


def tensors_of(thing) -> list[torch.Tensor]:
    """All tensors in an object's attributes, and in theirs, in the order of the attributes."""
    if isinstance(thing, torch.Tensor):
        return [thing]
    return [tensor for part in vars(thing).values() if holds_tensors(part) for tensor in tensors_of(part)]


def with_tensors(thing, tensors):
    """A copy of the object with the next ones of `tensors` (an iterator) instead of its own."""
    if isinstance(thing, torch.Tensor):
        return next(tensors)
    twin = copy.copy(thing)
    for name, part in vars(thing).items():
        if holds_tensors(part):
            setattr(twin, name, with_tensors(part, tensors))
    return twin


def holds_tensors(part) -> bool:
    return isinstance(part, torch.Tensor) or type(part).__module__.startswith("model.")


def package_path(name: str, tensors: list[torch.Tensor], facts: list) -> Path:
    """One name for all that the compiled code depends on: this code, its facts, torch, and the machine."""
    from torch._inductor.runtime.runtime_utils import cache_dir

    sources = sorted(Path(__file__).parent.glob("*.py"))
    content = [
        [hashlib.sha256(source.read_bytes()).hexdigest() for source in sources],
        [(tuple(x.shape), x.stride(), str(x.dtype)) for x in tensors],
        [
            torch.__version__,
            torch.get_num_threads(),
            torch.backends.cpu.get_cpu_capability(),
            dict(cpu_features()),
        ],
        facts,
    ]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return Path(cache_dir()) / "minimind" / f"{name}-{digest[:32]}.pt2"
