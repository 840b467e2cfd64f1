"""Initialisation that is put off until a model is sharded, and gives the numbers that it would have given at once.

Within `Deferred` every parameter that a module registers has a shape and no memory (torch's meta device). What is done
to it is noted, with where the generator stood before each operation that draws. Once the model is sharded, the
operations are performed on whole tensors, one parameter after the other, and of each is kept what this rank holds. So
the bits depend neither on the number of ranks nor on whether initialisation was put off; a rank needs memory for its
shards and for what is initialised at the moment, as a rule the largest parameter. It takes each rank twice the time:
operations that draw are performed at once too, for the sake of the generator, and their results dropped.

What is overwritten as a whole before it is read is not computed again: a model that initialises its modules once all
of them are made (`self.apply(init)`) needs no more memory than one in which each does it itself. Where values are
read, as by a truncated normal distribution that looks whether it has to draw again, they are computed on the spot.
What a parameter is made of with its values, as `nn.Parameter(torch.randn(n))`, stays in memory until it is overwritten
or handed out.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_unflatten

from harness.dist.shards import copy_own_part
from harness.dist.tape import Operation, Tape, View
from harness.errors import ConfigError
from harness.wrappers import without_wrappers

__all__ = ["Deferred"]

_META = torch.device("meta")

_OVERWRITING = {
    *("normal_", "uniform_", "zero_", "fill_", "copy_", "bernoulli_", "random_", "log_normal_"),
    *("exponential_", "cauchy_", "geometric_"),
}
"""Operations whose result does not depend on what was in their first argument."""


class Deferred:
    """A context in which models are built on the CPU without memory for their parameters."""

    def __init__(self) -> None:
        self._tape = Tape()
        self._number_of: dict[int, int] = {}
        """Of each storage without memory, by its address."""
        self._storages: list[torch.UntypedStorage] = []
        """These, so that none of the addresses is given to another one."""
        self._registered: dict[int, tuple[weakref.ref[Tensor], nn.Parameter]] = {}
        """Parameters with memory that were registered, and what stands for them."""
        self._views: dict[str, View] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        hook = register_module_parameter_registration_hook(self._without_memory)  # type: ignore[arg-type]
        self._stack.callback(hook.remove)
        self._stack.enter_context(_Recording(self))
        self._stack.enter_context(_Disguise(self))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def name(self, model: nn.Module) -> None:
        """Notes the names of what is to be initialised, before the model is sharded."""
        self._views = {name: view for name, tensor in _named(model) if (view := self.view(tensor)) is not None}

    def materialise(self, model: nn.Module, device: torch.device) -> None:
        """Gives the tensors of `model`, which FSDP2 has sharded, memory on `device` and their values; those that have
        memory are moved. The same model as was given to `name`. No collectives; draws nothing."""
        model._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device))
        names: dict[int, list[str]] = {}
        for name, view in self._views.items():
            names.setdefault(view.storage, []).append(name)
        tensors = dict(_named(model))

        def hand_out(storage: int, memory: torch.UntypedStorage) -> None:
            for name in names[storage]:
                copy_own_part(self._views[name].on(memory), tensors[name])

        with torch.no_grad():
            self._tape.perform(list(self._views.values()), hand_out)
        self._tape = Tape()

    def view(self, tensor: Any) -> View | None:
        """What stands for a tensor without memory; None for any other."""
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            return None
        storage = tensor.untyped_storage()
        number = self._number_of.get(storage._cdata)
        if number is None:
            return None
        return View(
            storage=number,
            size_bytes=storage.nbytes(),
            dtype=tensor.dtype,
            size=tuple(tensor.size()),
            stride=tuple(tensor.stride()),
            offset=int(tensor.storage_offset()),
        )

    def adopt(self, tensor: Tensor) -> View:
        """Takes in a tensor on the meta device."""
        storage = tensor.untyped_storage()
        self._number_of.setdefault(storage._cdata, len(self._storages))
        self._storages.append(storage)
        view = self.view(tensor)
        assert view is not None
        return view

    def values(self, leaves: list[Any]) -> list[Any]:
        """`leaves` with memory for all tensors: copies of their present values."""
        views = [self.view(leaf) for leaf in leaves]
        memory = self._tape.perform([view for view in views if view is not None])
        return [
            leaf if view is None else view.on(memory[view.storage])
            for leaf, view in zip(leaves, views, strict=True)
        ]

    def anything(self, leaves: list[Any]) -> list[Any]:
        """`leaves` with memory for all tensors, whatever is in it."""
        views = map(self.view, leaves)
        return [
            leaf if view is None else view.on(self._tape.memory(view.size_bytes))
            for leaf, view in zip(leaves, views, strict=True)
        ]

    def give_up(self, leaves: list[Any], real: list[Any]) -> None:
        """The memory that `leaves` were given is not needed any more."""
        for leaf, one in zip(leaves, real, strict=True):
            if self.view(leaf) is not None:
                self._tape.give_up(one.untyped_storage())

    def record(self, operation: Operation) -> None:
        """Notes an operation."""
        self._tape.add(operation)

    def _without_memory(self, module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        """What is registered instead of a parameter; None: the parameter itself."""
        # Subclasses may keep more than their values: those have memory at once.
        if type(parameter) is not nn.Parameter or self.view(parameter) or parameter.layout != torch.strided:
            return None
        original, bare = self._registered.get(id(parameter), (None, None))
        # A tied parameter is registered twice and has to stay one; an id alone may be another's by now.
        if original is None or original() is not parameter:
            with _disable_current_modes():
                shape = torch.empty_strided(
                    parameter.size(), parameter.stride(), dtype=parameter.dtype, device=_META
                )
            bare = nn.Parameter(shape, requires_grad=parameter.requires_grad)
            bare.__dict__.update(parameter.__dict__)
            self._tape.begin_with(self.adopt(bare), parameter.detach())
            self._registered[id(parameter)] = weakref.ref(parameter), bare
        return bare


class _Recording(TorchDispatchMode):
    """Notes what is done to tensors without memory."""

    def __init__(self, deferred: Deferred) -> None:
        super().__init__()
        self._deferred = deferred

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves, structure = tree_flatten((args, kwargs))
        views = [self._deferred.view(leaf) for leaf in leaves]
        if not any(views) and _META not in [leaf for leaf in leaves if isinstance(leaf, torch.device)]:
            return function(*args, **kwargs)
        written = _written(function, args, kwargs)
        # What goes into memory (a buffer made of a parameter), or to Python, has to have its value now.
        if any(self._deferred.view(tensor) is None for tensor in written) or _gives_numbers(function):
            return self._with_values(function, leaves, structure)
        try:
            bare = [_without_device(leaf) for leaf in leaves]
            given, named = tree_unflatten(bare, structure)
            output = function(*given, **named)
        except NotImplementedError:  # its shape depends on values
            return self._with_values(function, leaves, structure)
        results = [
            self._deferred.adopt(one) if isinstance(one, Tensor) and self._deferred.view(one) is None else None
            for one in tree_flatten(output)[0]
        ]
        if written or any(results):
            self._note(function, (leaves, structure), written, results)
        # `x.normal_()` gives x itself: the operation was given a stand-in on the meta device.
        return output if not written else _same_objects(output, bare, leaves)

    def _with_values(self, function: Any, leaves: list[Any], structure: Any) -> Any:
        args, kwargs = tree_unflatten(self._deferred.values(leaves), structure)
        return function(*args, **kwargs)

    def _note(
        self, function: Any, call: tuple[list[Any], Any], written: list[Tensor], results: list[View | None]
    ) -> None:
        leaves, structure = call
        views = [self._deferred.view(leaf) for leaf in leaves]
        changed = {view.storage: view for tensor in written if (view := self._deferred.view(tensor))}
        made = frozenset(view.storage for view in results if view)
        name = function.__name__.split(".")[0]
        over = frozenset(n for n, view in changed.items() if name in _OVERWRITING and view.is_whole)
        draws = torch.Tag.nondeterministic_seeded in function.tags
        generator = next((one for one in leaves if isinstance(one, torch.Generator)), torch.default_generator)
        operation = Operation(
            function=function,
            leaves=[_kept(leaf) if view is None else view for leaf, view in zip(leaves, views, strict=True)],
            structure=structure,
            generator=generator,
            generator_state=generator.get_state() if draws else None,
            results=results,
            writes=made | changed.keys(),
            overwrites=made | over,
            reads=frozenset(view.storage for view in views if view and view.storage not in over),
        )
        if draws:
            self._draw(operation, leaves)
        self._deferred.record(operation)

    def _draw(self, operation: Operation, leaves: list[Any]) -> None:
        """Brings the generator to where the operation leaves it."""
        # How many numbers are drawn may depend on what is read (`poisson(rate)`); else anything will do.
        if operation.reads:
            real = self._deferred.values(leaves)
        else:
            real = self._deferred.anything(leaves)
        args, kwargs = tree_unflatten([_on_cpu(leaf) for leaf in real], operation.structure)
        operation.function(*args, **kwargs)
        self._deferred.give_up(leaves, real)


class _Disguise(TorchFunctionMode):
    """Tensors without memory say that they lie on the CPU: torch's own initialisation leaves out the others."""

    def __init__(self, deferred: Deferred) -> None:
        super().__init__()
        self._deferred = deferred

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in _ANSWERS and self._deferred.view(args[0]) is not None:
            return _ANSWERS[function]
        if function is Tensor.__setitem__ and isinstance(args[2], int | float):
            # Torch makes a tensor of it on the device of the other one, by itself.
            args = (*args[:2], torch.tensor(args[2], dtype=args[0].dtype))
        return function(*args, **(kwargs or {}))


_ANSWERS: dict[Any, Any] = {
    Tensor.is_meta.__get__: False,  # type: ignore[attr-defined]
    Tensor.is_cpu.__get__: True,  # type: ignore[attr-defined]
    Tensor.device.__get__: torch.device("cpu"),
}


def _named(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, shared ones under each of their names."""
    for named in (model.named_parameters, model.named_buffers):
        for name, tensor in named(remove_duplicate=False):
            yield without_wrappers(name), tensor


def _written(function: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The arguments that an operation writes to."""
    found: list[Tensor] = []
    for index, argument in enumerate(function._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            found += [one for one in tree_flatten(value)[0] if isinstance(one, Tensor)]
    return found


def _gives_numbers(function: Any) -> bool:
    return any("Tensor" not in str(one.type) for one in function._schema.returns)


def _without_device(leaf: Any) -> Any:
    """An argument for an operation on the meta device."""
    if isinstance(leaf, torch.device):
        return _META
    return leaf.to(_META) if isinstance(leaf, Tensor) and leaf.dim() else leaf


def _kept(leaf: Any) -> Any:
    """An argument to be used later, on the CPU."""
    if isinstance(leaf, torch.device):
        return torch.device("cpu")
    if isinstance(leaf, Tensor) and leaf.untyped_storage().device == _META:
        raise ConfigError(
            f"a parameter is made of a tensor {tuple(leaf.shape)} on the meta device",
            rule="initialisation that is put off takes values that it can compute",
            remedy="set --parallel.meta_init false",
        )
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def _on_cpu(leaf: Any) -> Any:
    return torch.device("cpu") if isinstance(leaf, torch.device) else leaf


def _same_objects(output: Any, bare: list[Any], leaves: list[Any]) -> Any:
    """What an operation in place gives back is what it was given."""
    place = {id(one): leaf for one, leaf in zip(bare, leaves, strict=True) if isinstance(one, Tensor)}
    outputs, structure = tree_flatten(output)
    return tree_unflatten([place.get(id(one), one) for one in outputs], structure)
