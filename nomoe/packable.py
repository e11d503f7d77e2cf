"""Modules whose matrices are laid out in advance for inference on a CPU.

A parameter whose numbers are in such matrices is sealed: it keeps identity, shape and dtype, but no
memory of its own. Whoever uses it in any way opens it, which gives it its numbers back; the next
inference lays them out again, unless anyone but the module still holds the parameter or its memory.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from nomoe_kernels import cpu
from nomoe_kernels.matrices import Matrix

from .backends import untraced

# whoever lays weights out, gives them back or looks which they are does so alone
LAYING_OUT = threading.RLock()
if hasattr(os, "register_at_fork"):
    # a child that is forked while another thread holds it would wait for ever
    os.register_at_fork(
        before=LAYING_OUT.acquire,
        after_in_parent=LAYING_OUT.release,
        after_in_child=LAYING_OUT.release,
    )

# what may be asked of a sealed parameter, and set, without its numbers
_ABOUT = {
    getattr(Tensor, name).__get__
    for name in (
        "shape dtype device layout ndim itemsize nbytes grad _grad requires_grad is_leaf grad_fn "
        "retains_grad is_cuda is_cpu is_meta is_sparse is_quantized"
    ).split()
} | {
    getattr(Tensor, "grad").__set__,  # noqa: B009
    getattr(Tensor, "grad").__delete__,  # noqa: B009
    getattr(Tensor, "requires_grad").__set__,  # noqa: B009
    Tensor.requires_grad_,
    Tensor.register_hook,
    Tensor.register_post_accumulate_grad_hook,
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.element_size,
    Tensor.is_floating_point,
    Tensor.is_complex,
    Tensor.__len__,
}


class Stack(NamedTuple):
    """How a parameter holds (O, I) matrices: how many, one below the other, as they are or not."""

    matrices: int = 1
    transposed: bool = False

    def views(self, tensor: Tensor) -> list[Tensor]:
        """View a parameter's tensor as its matrices."""
        stacked = tensor.unflatten(0, (self.matrices, -1))
        return list(stacked.transpose(1, 2) if self.transposed else stacked)

    def rows(self, tensor: Tensor) -> list[Tensor]:
        """As `views`, but a copy of all where they are transposed: contiguous matrices.

        Copies of one at a time would leave holes in memory, between the matrices that are packed.
        """
        views = self.views(tensor)
        return list(torch.stack(views)) if self.transposed else views


class Seal(NamedTuple):
    """What a sealed parameter's numbers are in."""

    stack: Stack
    matrices: list[Matrix]


class SealedParameter(nn.Parameter):
    """A parameter whose numbers are in packed matrices.

    One of torch's parameters becomes one, and becomes torch's again, by a change of its class. What
    passes torch's functions by, as C++ does, reads NaN.
    """

    # none while its numbers are being laid out
    seal: Seal | None = None

    def __new__(cls, *arguments: Any, **options: Any) -> nn.Parameter:  # type: ignore[misc]
        """Make one of torch's, for those who make another of a parameter's type."""
        return nn.Parameter(*arguments, **options)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Open what a function of torch is given, unless it asks for no numbers."""
        kwargs = kwargs or {}
        if func in _ABOUT:
            return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        # until the function has what it needs of them, nobody seals them again
        with LAYING_OUT:
            _open_all((args, kwargs))
            return func(*args, **kwargs)

    # both look at what the parameter is before they call a function of torch

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        with LAYING_OUT:
            return nn.Parameter.__deepcopy__(opened(self), memo)  # type: ignore[no-any-return]

    def __reduce_ex__(self, protocol: Any) -> Any:
        with LAYING_OUT:
            return nn.Parameter.__reduce_ex__(opened(self), protocol)


@contextmanager
def _by_itself() -> Iterator[None]:
    """Have torch do what it does to plain tensors, whatever is going on around, and alone."""
    with (
        LAYING_OUT,
        _disable_current_modes(),
        torch._C._DisableFuncTorch(),
        torch._C.DisableTorchFunctionSubclass(),
        torch.inference_mode(False),
        torch.no_grad(),
    ):
        yield


@untraced
def opened(parameter: nn.Parameter) -> nn.Parameter:
    """Give a parameter its numbers back, if it is sealed."""
    if type(parameter) is SealedParameter:
        with _by_itself():
            # another thread may have been faster
            if type(parameter) is SealedParameter:
                # without one this thread is laying it out, and a signal's handler, say, asks for it
                if (seal := parameter.seal) is not None:
                    stack, matrices = seal
                    dense = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
                    for view, matrix in zip(stack.views(dense), matrices, strict=True):
                        view.copy_(matrix.unpack())
                    # or such a handler was faster
                    if parameter.seal is seal:
                        _point(parameter, dense)
                vars(parameter).pop("seal", None)
                parameter.__class__ = nn.Parameter  # type: ignore[assignment]
    return parameter


def _open_all(inputs: Any) -> None:
    if isinstance(inputs, nn.Parameter):
        opened(inputs)
    elif isinstance(inputs, dict):
        _open_all(list(inputs.values()))
    elif isinstance(inputs, (list, tuple)):
        for one in inputs:
            _open_all(one)


def _seal_of(parameter: nn.Parameter | None, stack: Stack) -> Seal | None:
    """A parameter's seal, if its numbers are laid out in such a way."""
    if type(parameter) is not SealedParameter or parameter.seal is None:
        return None
    return parameter.seal if parameter.seal.stack == stack else None


def _seal(parameter: nn.Parameter, seal: Seal) -> None:
    """Free a parameter's memory; it is sealed as soon as it has its seal."""
    nothing = torch.full((), torch.nan, dtype=parameter.dtype, device="cpu")
    parameter.seal = seal  # type: ignore[attr-defined]
    _point(parameter, nothing.expand(parameter.shape))
    # a handler of a signal may have opened it in between
    parameter.seal = seal  # type: ignore[attr-defined]
    parameter.__class__ = SealedParameter


def _point(parameter: nn.Parameter, tensor: Tensor) -> None:
    """Have a parameter read and write where a tensor does."""
    # as `.data =` does, which however waits for a lock of autograd's while it holds Python's
    torch.ops.aten.set_data(parameter, tensor)


def _holders(parameters: Mapping[str, nn.Parameter], name: str) -> tuple[int, int, int]:
    """How many hold a parameter, its memory, and Python's object for that memory."""
    memory = parameters[name].untyped_storage()
    return (
        sys.getrefcount(parameters[name]),
        torch._C._storage_Use_Count(memory._cdata),
        sys.getrefcount(memory),
    )


def _holders_of_a_lone_one() -> tuple[int, int, int]:
    """Two dictionaries and its tensor, by this Python's and this torch's ways to count."""
    parameters = {"": nn.Parameter(torch.empty(1, device="cpu"))}
    module = dict(parameters)
    holders = _holders(parameters, "")
    del module
    return holders


_LONE = _holders_of_a_lone_one()


def _is_held(parameters: Mapping[str, nn.Parameter], name: str) -> bool:
    """Whether anyone beside its module holds a parameter, and may read or write what it reads.

    That is whoever has a name for it, an optimizer, a function that it was given to, or a graph of
    autograd's; of its memory a view, a detached tensor, or an array of numpy's.
    """
    found = _holders(parameters, name)
    return any(holders > most for holders, most in zip(found, _LONE, strict=True))


class Packable(nn.Module):
    """A module whose matrices can be laid out in advance for inference on a CPU."""

    # the parameters that hold such matrices, by name
    stacks: Mapping[str, Stack]

    @property
    def packed(self) -> dict[str, list[Matrix]] | None:
        """The matrices of each parameter, where all are laid out."""
        packed = {}
        with LAYING_OUT:
            for name, stack in self.stacks.items():
                parameter = self._parameters.get(name)
                seal = _seal_of(parameter, stack)
                if seal is None:
                    return None
                packed[name] = seal.matrices
        return packed

    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)
        return opened(found) if type(found) is SealedParameter else found

    def has_stand_ins(self) -> bool:
        """Whether something of another kind is in a parameter's place.

        `torch.func` puts it there for one call: it wraps a parameter that may be sealed itself.
        """
        stand_ins = [
            one
            for name in self.stacks
            if (one := self._parameters.get(name)) is not None
            and type(one) not in (nn.Parameter, SealedParameter)
        ]
        for one in stand_ins:
            inner: Any = one
            while torch._C._functorch.is_functorch_wrapped_tensor(inner):
                inner = torch._C._functorch.get_unwrapped(inner)
            opened(inner)
        return bool(stand_ins)

    def pack(self) -> None:
        """Lay the matrices out for `nomoe_kernels.cpu` and free the originals.

        What is computed from other parameters (torch's pruning, parametrizations) stays as it is,
        and so does what anyone else holds or other processes share.
        """
        if self.packed is not None:
            return
        with _by_itself():
            plain = self._to_seal()
            try:
                # from here on whoever comes to one of them waits; who came before still holds it
                for name in plain:
                    plain[name].__class__ = SealedParameter
                if any(_is_held(plain, name) for name in plain):
                    return
                # whole before any parameter loses its numbers
                seals = {}
                for name in plain:
                    stack = self.stacks[name]
                    matrices = [cpu.pack_weight(one) for one in stack.rows(plain[name].data)]
                    seals[name] = Seal(stack, matrices)
                for name, seal in seals.items():
                    # but where a handler of a signal, say, has asked for it meanwhile
                    if type(plain[name]) is SealedParameter:
                        _seal(plain[name], seal)
            finally:
                for name in plain:
                    if vars(plain[name]).get("seal") is None:
                        plain[name].__class__ = nn.Parameter

    def _to_seal(self) -> dict[str, nn.Parameter]:
        """The parameters to be sealed: none where one cannot be."""
        plain = {}
        for name, stack in self.stacks.items():
            parameter = self._parameters.get(name)
            if _seal_of(parameter, stack) is not None:
                continue
            if type(parameter) is not nn.Parameter or parameter.is_shared():
                return {}
            plain[name] = parameter
        del parameter
        # a first look, so that what is in use does not change its class in every forward
        return {} if any(_is_held(plain, name) for name in plain) else plain

    def unpack(self) -> None:
        """Give the parameters their numbers back."""
        for name in self.stacks:
            parameter = self._parameters.get(name)
            if parameter is not None:
                opened(parameter)

    def snapshot(self) -> tuple[dict[str, list[Matrix]] | None, dict[str, Tensor]]:
        """The packed matrices, or None and the parameters' numbers.

        Both stay what they are while another thread packs or unpacks.
        """
        with LAYING_OUT:
            if (packed := self.packed) is not None:
                return packed, {}
            return None, {name: getattr(self, name).detach() for name in self.stacks}

    def parameters_now(self) -> dict[str, Tensor]:
        """The parameters, or where gradients are asked for views, which nobody packs.

        Another thread may pack between this and their use, and between a forward and its backward.
        """
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return {name: getattr(self, name) for name in self.stacks}
        with LAYING_OUT:
            parameters: dict[str, Tensor] = {name: getattr(self, name) for name in self.stacks}
            return {name: one.view_as(one) for name, one in parameters.items()}

    def train(self, mode: bool = True) -> Self:
        """Set the mode; training needs the parameters."""
        if mode:
            self.unpack()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # SentenceTransformer moves its model to where it is, in every call
        with LAYING_OUT:
            if self.packed and all(
                _leaves_as_is(fn, one) for one in self._parameters.values() if one is not None
            ):
                return self
        self.unpack()
        return super()._apply(fn, recurse)  # type: ignore[no-any-return, no-untyped-call]

    def _save_to_state_dict(self, *arguments: Any) -> None:
        with LAYING_OUT:
            self.unpack()
            super()._save_to_state_dict(*arguments)


def _leaves_as_is(fn: Callable[[Tensor], Tensor], parameter: nn.Parameter) -> bool:
    """Whether a move or cast of a module would change nothing about a parameter's tensor."""
    probe = torch.zeros(1, dtype=parameter.dtype, device=parameter.device)
    # share_memory_ gives its argument back, but somewhere else
    return fn(probe) is probe and not probe.is_shared()
