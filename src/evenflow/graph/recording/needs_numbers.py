"""What fake parameters cannot give: a function that needs numbers, or a tensor of a class of its own."""

from evenflow.errors import RecordError


class NeedsNumbers(RecordError):
    """A function needs numbers that depend on parameters; a module that holds the call may run for real."""

    def __init__(self, function: str, message: str) -> None:
        super().__init__(message)
        self.function = function


def needs_numbers(name: str, where: str) -> NeedsNumbers:
    """What to raise where function `name` is called on numbers that do not exist."""
    remedy = (
        "a branch or a shape that depends on them must lie inside one module, whose results have "
        "the same shapes either way; a metric may be returned as the tensor that it is"
    )
    return NeedsNumbers(
        name,
        f"{where} calls {name} on numbers that depend on the parameters, which do not exist while "
        f"recording; {remedy}",
    )


def no_subclass(name: str, kind: type, where: str) -> NeedsNumbers:
    """What to raise where function `name` meets a tensor of class `kind` and a fake one."""
    return NeedsNumbers(
        name,
        f"{where} calls {name} on a {kind.__name__}, a subclass of Tensor, and on what depends on the "
        "parameters, which have stand-ins of a class of their own while recording; hand over plain "
        "tensors (x.as_subclass(torch.Tensor)), or do it inside one module, which returns plain ones",
    )
