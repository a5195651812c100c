"""Calls of the Triton backend, planned once for all that are alike and repeated.

What `launch_forward` and `launch_backward` do depends on the shapes, strides, dtypes, alignment and device of the
tensors and on the settings, never on values. The second call that is alike is recorded: what memory it takes, what it
asks of torch, which compiled kernels it launches with which numbers. The later ones only repeat that, and choose no
tiles, build no strides, and leave out triton's own search for the kernel.
"""

import threading
from collections.abc import Callable, Sequence
from functools import lru_cache
from operator import itemgetter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

MOST = 1024  # plans kept, of all operations together; the one unused for longest goes first

_aten = torch.ops.aten
_UNWRITTEN = (
    _aten.empty.memory_format, _aten.empty_strided.default, _aten.empty_like.default,
    _aten.new_empty.default, _aten.new_empty_strided.default,
)  # fmt: skip
_DEPENDS_ON_VALUES = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
_thread = threading.local()


def enqueue(kernel, programs: int, *arguments, **constants) -> None:
    """Launches `programs` programs of a kernel of triton; where the call is being recorded, into its plan too."""
    recorder = getattr(_thread, "recorder", None)
    if recorder is None:
        kernel[(programs,)](*arguments, **constants)
    else:
        recorder.launch(kernel, programs, arguments, constants)


def repeat(function: Callable, arguments: Sequence) -> Any:
    """Returns `function(*arguments)`, by its plan where calls like this one have been seen twice.

    arguments: tensors, lists of them, None, and settings: numbers, strings, and lists of numbers.
    """
    tensors = []
    key = _key(arguments, tensors)
    plan = _plan(function, tensors[0].device, torch.get_float32_matmul_precision(), key)
    if plan.replay is not None:
        return plan.replay(tensors)
    if not plan.seen:  # what never comes again is not recorded
        plan.seen = True
        return function(*arguments)
    # Each in an object of its own, since one tensor may be given for two arguments.
    recorder = _Recorder([tensor.detach() for tensor in tensors])
    with recorder:
        results = function(*_with(arguments, iter(recorder.memory.copy())))
    plan.replay = recorder.finish(results)
    return results


def forget() -> None:
    """Drops every plan, for whoever changes what triton compiles for."""
    _plan.cache_clear()


def _key(arguments, tensors):
    """What a plan depends on; puts the tensors of `arguments` into `tensors`."""
    key = []
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            tensors.append(argument)
            key += (argument.shape, argument.stride(), argument.dtype, argument.data_ptr() % 16 == 0)
        elif isinstance(argument, list):
            of_tensors = argument and isinstance(argument[0], torch.Tensor)
            key.append(_key(argument, tensors) if of_tensors else tuple(argument))
        else:
            key.append(argument)
    return tuple(key)


def _with(arguments, tensors):
    """`arguments` with other tensors, in their order."""
    return [
        next(tensors) if isinstance(argument, torch.Tensor)
        else _with(argument, tensors) if isinstance(argument, list) else argument
        for argument in arguments
    ]  # fmt: skip


class _Plan:
    """replay: from the tensors of a call to its results; None until a second call has been recorded."""

    def __init__(self):
        self.seen, self.replay = False, None


@lru_cache(MOST)
def _plan(function, device, precision, key) -> _Plan:
    return _Plan()


class _Recorder(TorchDispatchMode):
    """Notes what a call does, while it does it."""

    def __init__(self, tensors):
        super().__init__()
        self.inputs = len(tensors)
        self.memory = []  # every tensor of the call, where it stands in its memory; kept, so that none has another's id
        self.places = {}  # id → place
        self.roots = {}  # place of a view → place of what it is a view of, and how many elements it begins behind that
        self.steps = []  # (step, places read, places written, whether it does nothing else)
        self.launching = False
        for tensor in tensors:
            self.place(tensor)

    def __enter__(self):
        _thread.recorder = self
        return super().__enter__()

    def __exit__(self, *exception):
        _thread.recorder = None
        return super().__exit__(*exception)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        results = op(*args, **kwargs)
        if self.launching:  # by triton's interpreter, which uses torch
            return results
        if any(tag in op.tags for tag in _DEPENDS_ON_VALUES):
            raise NotImplementedError(f"{op} in a launch, which must not depend on the values of tensors")
        if not op._schema.is_mutable and args and _shares_memory(results, args[0]):
            self.note_view(results, args[0])
            return results
        values = (*args, *kwargs.values())
        read = self.places_in(values)
        written = [self.place(made) for made in ([results] if isinstance(results, torch.Tensor) else results)]
        if op in _UNWRITTEN:
            step = _allocation(results, *written)
        else:
            step = _operation(op, self.maker(values), tuple(kwargs), written)
        self.steps.append((step, read, written, not op._schema.is_mutable))
        return results

    def note_view(self, view, base):
        place = self.places[id(base)]
        root, skipped = self.roots.get(place, (place, 0))
        skipped += view.storage_offset() - base.storage_offset()
        self.memory.append(view)
        if (view.shape, view.stride(), skipped) == (base.shape, base.stride(), 0):
            self.places[id(view)] = place  # another name of the same
            return
        self.places[id(view)] = written = len(self.memory) - 1
        self.roots[written] = root, skipped
        self.steps.append((_view(root, tuple(view.shape), view.stride(), skipped, written), [root], [written], True))

    def launch(self, kernel, programs, arguments, constants):
        self.launching = True
        compiled = kernel[(programs,)](*arguments, **constants)
        self.launching = False
        if compiled is None:  # there is no compiled kernel in triton's interpreter
            run = lambda *arguments: kernel[(programs,)](*arguments, **constants)  # noqa: E731
        else:
            run = compiled[(programs, 1, 1)]
            arguments = (*arguments, *(constants[name] for name in kernel.arg_names[len(arguments) :]))
        fill, read = self.maker(arguments, pointers=True), self.places_in(arguments, pointers=True)
        self.steps.append((lambda memory: run(*fill(memory)), read, [], False))

    def finish(self, results):
        """A function that repeats what was noted: from the tensors of a call to its results."""
        needed, steps = set(self.places_in([results])), []
        for step, read, written, droppable in reversed(self.steps):
            if droppable and needed.isdisjoint(written):
                continue
            unneeded = {*read, *written} - needed
            needed |= unneeded
            steps.append((step, tuple(unneeded)))
        steps.reverse()
        make_results, more = self.maker([results]), [None] * (len(self.memory) - self.inputs)

        def replay(tensors):
            memory = tensors + more
            for step, unneeded in steps:
                step(memory)
                for place in unneeded:
                    memory[place] = None
            return make_results(memory)[0]

        return replay

    def place(self, tensor):
        """Where a tensor stands in the memory: as before, or behind all others."""
        if id(tensor) not in self.places:
            self.places[id(tensor)] = len(self.memory)
            self.memory.append(tensor)
        return self.places[id(tensor)]

    def places_in(self, items, pointers=False):
        """The places of all tensors in `items`, however deep in tuples and lists. pointers: see `maker`."""
        places = []
        for item in items:
            if isinstance(item, torch.Tensor):
                place = self.places[id(item)]
                root, skipped = self.roots.get(place, (place, 0))
                places.append(root if pointers and skipped == 0 else place)
            elif isinstance(item, (tuple, list)):
                places += self.places_in(item, pointers)
        return places

    def maker(self, items, pointers=False):
        """A function from the memory of a call to the tuple or list `items` with the tensors of that call.

        pointers: of a tensor only its pointer counts, so what a view has in common with another may be taken.
        """
        new, kind, constants, holes = tuple.__new__, type(items), list(items), []
        for number, item in enumerate(items):
            places = self.places_in([item], pointers)
            if isinstance(item, torch.Tensor):
                holes.append((number, itemgetter(*places)))
            elif places:
                holes.append((number, self.maker(item, pointers)))

        def make(memory):
            made = constants.copy()
            for number, maker in holes:
                made[number] = maker(memory)
            return made if kind is list else new(kind, made)

        if holes and holes[0][0] == 0 and len(holes) == 1 and kind is not list:  # as most that kernels take
            first, others = holes[0][1], tuple(constants[1:])
            return lambda memory: new(kind, (first(memory), *others))
        return make


def _shares_memory(result, argument):
    """Whether one is a view of the other. The schema does not tell: `contiguous` may return one or a copy."""
    if not (isinstance(result, torch.Tensor) and isinstance(argument, torch.Tensor) and result.dtype == argument.dtype):
        return False
    return result.untyped_storage()._cdata == argument.untyped_storage()._cdata


def _allocation(tensor, place):
    size, stride, kind = tuple(tensor.shape), tensor.stride(), dict(dtype=tensor.dtype, device=tensor.device)

    def allocate(memory):
        memory[place] = torch.empty_strided(size, stride, **kind)

    return allocate


def _view(base, size, stride, skipped, place):
    def view(memory):
        memory[place] = memory[base].as_strided(size, stride, memory[base].storage_offset() + skipped)

    return view


def _operation(op, fill, names, written):
    def compute(memory):
        values = fill(memory)
        positional = len(values) - len(names)
        results = op(*values[:positional], **dict(zip(names, values[positional:])))
        for place, result in zip(written, [results] if isinstance(results, torch.Tensor) else results):
            memory[place] = result

    return compute
