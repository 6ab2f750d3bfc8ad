"""Fake parameters: stand-ins with shape and type but no memory, on which a program is recorded."""

import contextlib
from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from evenflow.errors import ConfigError
from evenflow.graph.nouns.dtensors import is_dtensor, local_part, with_local


class FakeParameters:
    """One fake stand-in per distinct parameter: the same shape, dtype and strides, no memory.

    One parameter in two places (*tied*) goes by the first of its names. Made once per model,
    so that it can be recorded again after a rank has let go of the stages that it does not own. `dtype_of`
    says which type a parameter will have, where that is another one.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        device: torch.device,
        dtype_of: Callable[[torch.nn.Parameter], torch.dtype] = attrgetter("dtype"),
    ) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        made: dict[Any, torch.nn.Parameter] = {}  # id(real), or its place in its storage -> fake
        memories: dict[int, str] = {}  # memory of a parameter -> its first name
        self.names: dict[int, str] = {}  # id(fake) -> first name
        self.slots: list[tuple[torch.nn.Module, str, torch.nn.Parameter]] = []
        self.tied: dict[str, str] = {}  # every name -> first name
        for path, module in model.named_modules(remove_duplicate=True):
            for key, parameter in module._parameters.items():
                if parameter is None:
                    continue
                name = f"{path}.{key}" if path else key
                _refuse_unfit(name, parameter)
                memory = storage_of(local_part(parameter))
                # Without memory, one storage is the only sign that is left of a tie that a library undid.
                place = (memory, parameter.storage_offset(), parameter.shape, parameter.stride())
                identity = place if parameter.is_meta else id(parameter)
                fake = made.get(identity)
                if fake is None:
                    if memory in memories and parameter.numel() and not parameter.is_meta:
                        raise ConfigError(
                            f"{name} and {memories[memory]} are two parameters in one memory, which "
                            "an optimizer would change twice; to tie them, assign the parameter itself "
                            "(head.weight = embedding.weight)"
                        )
                    memories[memory] = name
                    fake = made[identity] = self._stand_in(parameter, dtype_of(parameter), device)
                    self.names[id(fake)] = name
                self.slots.append((module, key, fake))
                self.tied[name] = self.names[id(fake)]

    def _stand_in(
        self, parameter: torch.nn.Parameter, dtype: torch.dtype, device: torch.device
    ) -> torch.nn.Parameter:
        fake = with_local(parameter, fake_like(local_part(parameter), self.mode, device, dtype))
        # What makes a parameter of it, and what a program may ask of it.
        vars(fake).update({"_is_param": True, **vars(parameter)})
        fake.requires_grad_(parameter.requires_grad)
        assert isinstance(fake, torch.nn.Parameter), "it is told by that mark"
        return fake

    @property
    def trainable_names(self) -> list[str]:
        """The first names of the parameters that require a gradient, in the model's order."""
        trained = {self.names[id(fake)] for _, _, fake in self.slots if fake.requires_grad}
        return [name for name in dict.fromkeys(self.tied.values()) if name in trained]

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Put the stand-ins into the model, and the real parameters back afterwards."""
        real = [module._parameters[key] for module, key, _ in self.slots]
        try:
            for (module, key, fake), parameter in zip(self.slots, real, strict=True):
                module._parameters[key] = fake
                if parameter is not None:  # it may have been frozen since
                    fake.requires_grad_(parameter.requires_grad)
            yield
        finally:
            for (module, key, _), parameter in zip(self.slots, real, strict=True):
                module._parameters[key] = parameter


def fake_like(
    tensor: torch.Tensor, mode: FakeTensorMode, device: torch.device, dtype: torch.dtype
) -> FakeTensor:
    """A fake tensor of a tensor's form, at a tenth of what `torch.empty_strided` takes under the mode."""
    form = torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device="meta")
    return FakeTensor(mode, form, device)


def _refuse_unfit(name: str, parameter: torch.nn.Parameter) -> None:
    if isinstance(parameter, torch.nn.parameter.UninitializedParameter):
        raise ConfigError(f"{name} has no shape yet: run the lazy module once before")
    if type(parameter) is not torch.nn.Parameter and not is_dtensor(parameter):
        raise ConfigError(
            f"{name} is a {type(parameter).__name__}, a kind of parameter of its own, of which only its own "
            "code knows how it computes; use plain parameters"
        )


class RealParameters:
    """A model's own parameters in the place of their stand-ins: to see what numbers a program makes."""

    def __init__(self, fakes: FakeParameters) -> None:
        self.slots = [(module, key, _real(module, key)) for module, key, _ in fakes.slots]
        pairs = zip(self.slots, fakes.slots, strict=True)
        self.names = {id(real): fakes.names[id(fake)] for (_, _, real), (_, _, fake) in pairs}
        self.tied = fakes.tied

    def installed(self) -> contextlib.AbstractContextManager[None]:
        """Nothing to do: they are where they belong."""
        return contextlib.nullcontext()


def _real(module: torch.nn.Module, key: str) -> torch.nn.Parameter:
    parameter = module._parameters[key]
    assert parameter is not None, "it was there when its stand-in was made"
    return parameter


@contextlib.contextmanager
def buffers_copied(model: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """Let a run work on copies of the buffers, on its device, and put the real ones back afterwards."""
    slots = [(m, k, b) for m in model.modules() for k, b in m._buffers.items() if b is not None]
    memories: dict[int, torch.Tensor] = {}  # views of one memory stay views,
    copies: dict[int, torch.Tensor] = {}  # and one buffer in two modules stays one
    try:
        for module, key, buffer in slots:
            if id(buffer) not in copies:
                copies[id(buffer)] = _copied_with_its_memory(buffer, device, memories)
            module._buffers[key] = copies[id(buffer)]
        yield
    finally:
        for module, key, buffer in slots:
            module._buffers[key] = buffer


def _copied_with_its_memory(
    buffer: torch.Tensor, device: torch.device, memories: dict[int, torch.Tensor]
) -> torch.Tensor:
    """A copy of a buffer in a copy of its whole memory, of which `memories` keeps one for each."""
    plain = buffer.detach()
    if plain.layout != torch.strided or plain.is_quantized:
        return plain.to(device, copy=True)
    memory, size = plain.untyped_storage(), plain.element_size()
    at = storage_of(plain)
    if at not in memories:
        flat = plain.as_strided((memory.nbytes() // size,), (1,), 0)
        memories[at] = flat.to(device, copy=True)
    whole = memories[at].view(plain.dtype) if memories[at].dtype != plain.dtype else memories[at]
    return whole.as_strided(plain.shape, plain.stride(), plain.storage_offset())


def storage_of(tensor: torch.Tensor) -> int:
    """A number for the memory behind a tensor: equal for aliases, fake ones too."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse, batched and other tensors without a storage
        return -id(tensor)
