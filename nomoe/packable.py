"""Modules whose matrices are laid out in advance for inference on a CPU.

A parameter whose numbers are in such matrices is sealed: it keeps identity, shape and dtype, but no
memory. Whoever uses it in any way opens it, which gives all parameters of its module their numbers
back; the next inference lays them out again.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

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


class SealedParameter(nn.Parameter):
    """A parameter whose numbers are in its module's packed matrices.

    One of torch's parameters becomes one, and becomes torch's again, by a change of its class. What
    passes torch's functions by, as C++ does, reads NaN.
    """

    sealed_by: weakref.ref[Packable]

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
        with LAYING_OUT:
            _open_all((args, kwargs))
        return func(*args, **kwargs)

    # both look at what the parameter is before they call a function of torch

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        opened(self)
        return nn.Parameter.__deepcopy__(self, memo)  # type: ignore[no-any-return]

    def __reduce_ex__(self, protocol: Any) -> Any:
        opened(self)
        return nn.Parameter.__reduce_ex__(self, protocol)


@untraced
def opened(parameter: nn.Parameter) -> nn.Parameter:
    """Give a parameter its numbers back, if it is sealed.

    Raises:
        RuntimeError: They went with its module.
    """
    if type(parameter) is SealedParameter:
        owner = parameter.sealed_by()
        if owner is not None:
            owner.unpack()
        if type(parameter) is SealedParameter:
            raise RuntimeError(
                "a weight's numbers went with the module that had packed it for inference: call "
                "parameters() of a model before taking its parameters"
            )
    return parameter


def _open_all(inputs: Any) -> None:
    if isinstance(inputs, nn.Parameter):
        opened(inputs)
    elif isinstance(inputs, dict):
        _open_all(list(inputs.values()))
    elif isinstance(inputs, (list, tuple)):
        for one in inputs:
            _open_all(one)


class Packable(nn.Module):
    """A module whose matrices can be laid out in advance for inference on a CPU.

    While they are, `packed` holds them, and their parameters are sealed.
    """

    # names of the parameters that are packed
    packable: tuple[str, ...]
    # the matrices of each, by name
    packed: dict[str, list[Matrix]] | None = None
    # the parameters whose numbers they hold
    sealed: dict[str, nn.Parameter]
    # ids of its own parameters, whatever `torch.func.functional_call` puts in their place for a
    # while; what shards a model wants the old ones gone, and `torch.utils.swap_tensors` no weakrefs
    own: dict[str, int]
    # a compiler made its forward with gradients, whose backward reads the parameters themselves
    is_traced = False
    # another module has a parameter of it
    is_shared = False

    def matrices(self, name: str, tensor: Tensor) -> list[Tensor]:
        """View a parameter's tensor as the (O, I) matrices it holds."""
        raise NotImplementedError

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As every module's; assigning one comes through here too."""
        super().register_parameter(name, param)
        self._note_own()

    def _note_own(self) -> None:
        self.own = {name: id(parameter) for name, parameter in self._parameters.items()}

    def has_stand_ins(self) -> bool:
        """Whether a parameter that would be packed is not the module's own, or no plain one."""
        for name in self.packable:
            one = self._parameters.get(name)
            if one is not None and (
                type(one) not in (nn.Parameter, SealedParameter) or self.own.get(name) != id(one)
            ):
                return True
        return False

    @torch.no_grad()
    def pack(self) -> None:
        """Lay the matrices out for `nomoe_kernels.cpu` and free the originals.

        What is computed from other parameters (torch's pruning, parametrizations) stays as it is,
        and so does what stands in for the module's own, or is another's too.
        """
        with LAYING_OUT, torch._C._DisableFuncTorch():
            now = self._parameters
            if self.packed is not None:
                if all(
                    now.get(name) is one and type(one) is SealedParameter
                    for name, one in self.sealed.items()
                ):
                    return
                self.unpack()
            parameters = {name: one for name in self.packable if (one := now.get(name)) is not None}
            if len(parameters) < len(self.packable) or self._opens_others():
                return
            packed = {
                name: [cpu.pack_weight(view) for view in self.matrices(name, parameter.data)]
                for name, parameter in parameters.items()
            }
            # whole before any parameter loses its numbers
            self.packed, self.sealed = packed, parameters
            for parameter in parameters.values():
                nothing = parameter.new_full((), torch.nan).expand(parameter.shape)
                parameter.sealed_by = weakref.ref(self)  # type: ignore[attr-defined]
                parameter.__class__ = SealedParameter
                with torch._C.DisableTorchFunctionSubclass():
                    parameter.data = nothing

    def _opens_others(self) -> bool:
        """Open parameters that another module had sealed; whether it did, now or before."""
        for parameter in self._parameters.values():
            if type(parameter) is SealedParameter:
                owner = parameter.sealed_by()
                opened(parameter)
                if owner is not None:
                    owner.is_shared = self.is_shared = True
        return self.is_shared

    def unpack(self) -> None:
        """Give the parameters their numbers back."""
        # made in inference mode, or under one of torch.func's transforms, they would be no plain
        # tensors
        with (
            LAYING_OUT,
            torch._C._DisableFuncTorch(),
            torch._C.DisableTorchFunctionSubclass(),
            torch.inference_mode(False),
            torch.no_grad(),
        ):
            for name, matrices in (self.packed or {}).items():
                parameter = self.sealed[name]
                # `torch.utils.swap_tensors` makes it another
                if type(parameter) is SealedParameter:
                    dense = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
                    for view, matrix in zip(self.matrices(name, dense), matrices, strict=True):
                        view.copy_(matrix.unpack())
                    parameter.data = dense
                    parameter.__class__ = nn.Parameter  # type: ignore[assignment]
                    del parameter.sealed_by
            self.packed, self.sealed = None, {}

    def snapshot(self) -> tuple[dict[str, list[Matrix]] | None, dict[str, Tensor]]:
        """The packed matrices, or None and the parameters' numbers.

        Both stay what they are while another thread packs or unpacks.
        """
        with LAYING_OUT:
            if self.packed is not None:
                return self.packed, {}
            return None, {name: getattr(self, name).detach() for name in self.packable}

    def parameters_now(self) -> dict[str, Tensor]:
        """Views of the parameters, with their gradients, that keep their numbers.

        Another thread may pack between this and their use, and between a forward and its backward.
        """
        parameters: dict[str, Tensor] = {name: getattr(self, name) for name in self.packable}
        if not torch.is_grad_enabled() or any(
            one.device.type != "cpu" for one in parameters.values()
        ):
            return parameters
        if torch.compiler.is_compiling():
            self.is_traced = True
            return parameters
        with LAYING_OUT:
            self.unpack()
            return {name: one.view_as(one) for name, one in parameters.items()}

    def train(self, mode: bool = True) -> Self:
        """Set the mode; training needs the parameters."""
        if mode:
            self.unpack()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # SentenceTransformer moves its model to where it is, in every call
        if self.packed and _leaves_as_is(fn, next(iter(self.sealed.values()))):
            with torch._C.DisableTorchFunctionSubclass():
                super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        else:
            self.unpack()
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._note_own()
        return self

    def _save_to_state_dict(self, *arguments: Any) -> None:
        with LAYING_OUT:
            self.unpack()
            super()._save_to_state_dict(*arguments)

    def __getstate__(self) -> dict[str, Any]:
        self.unpack()
        of_this_one = {"own", "is_traced", "is_shared"}
        return {name: value for name, value in self.__dict__.items() if name not in of_this_one}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._note_own()


def _leaves_as_is(fn: Callable[[Tensor], Tensor], parameter: nn.Parameter) -> bool:
    """Whether a move or cast of a module would change nothing about a parameter's tensor."""
    probe = torch.zeros(1, dtype=parameter.dtype, device=parameter.device)
    # share_memory_ gives its argument back, but somewhere else
    return fn(probe) is probe and not probe.is_shared()
