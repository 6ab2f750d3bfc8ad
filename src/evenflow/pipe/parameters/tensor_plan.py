"""Tensor parallelism inside of stages: which modules tensor ranks share, by torch's `parallelize_module`.

The model is recorded as each tensor rank runs it: modules of the plan hold DTensors of which the rank has a
part, and stay whole, since torch's hooks around them do the communication. All else works on the rank's own
tensors. So the plan must fit together, as with torch: what a "colwise" module makes, a part of each row, only
goes where parts may go, and into a "rowwise" one.

Source: Shoeybi et al., "Megatron-LM", 2019.
"""

import fnmatch
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from evenflow.errors import ConfigError
from evenflow.runtime.ranks.mesh import Mesh

if TYPE_CHECKING:
    from torch.distributed.tensor.parallel import ParallelStyle

TensorPlan = Mapping[str, Any]  # of a module's name, or a pattern: a style's name, or a ParallelStyle

# Hugging Face's names; a part that several use is named alike by all.
_STYLES = (
    *("colwise", "colwise_rep", "colwise_gather_output"),
    *("rowwise", "rowwise_rep", "rowwise_split_input", "embedding_rowwise"),
    *("sequence_parallel", "replicated_with_grad_allreduce", "replicate"),
)
_GATHERED = ("colwise_rep", "colwise_gather_output")
_TIED = (
    "the tensor plan shares {}, whose weight is tied to {}: share both alike, or neither (tensor_plan=), or "
    "build the model untied (tie_word_embeddings=False in its configuration)"
)
_ROWS, _COLUMNS = 0, 1  # of a weight: outputs, inputs


@dataclass(frozen=True, slots=True)
class SharedModules:
    """What tensor ranks share beside parameters.

    `partial` are parameters that every rank has whole, and of whose gradients each has a part; `heads` maps
    the paths of products, of which a rank makes some columns and gathers the rest, to how many there are.
    """

    partial: frozenset[str] = frozenset()
    heads: Mapping[str, int] = field(default_factory=dict)


def share_modules(model: torch.nn.Module, mesh: Mesh, given: TensorPlan | None) -> SharedModules:
    """Let the tensor ranks share the plan's modules, without numbers yet; the model is changed.

    By default the plan is the model's own, as Hugging Face's have one. Raises `ConfigError` for a plan that
    names no module of the model, or a style that is not known, or sizes that the ranks cannot share.
    """
    if mesh.tensor.size == 1:
        if given is not None:
            raise ConfigError('tensor_plan= needs tensor ranks, and there is one: give mesh= with "tp"')
        return SharedModules()
    plan = _matched(model, _plan_of(model) if given is None else given)
    if given is None:
        _check_heads(model, mesh.tensor.size)
    for name, style in plan.items():
        _check_sizes(name, model.get_submodule(name), style, mesh.tensor.size)
    from torch.distributed.tensor.parallel import parallelize_module

    assert mesh.devices is not None, "there are tensor ranks"
    styles = {name: _style(style) for name, style in plan.items()}
    made = {name: style for name, style in styles.items() if style is not None}
    ties = _ties(model, made)
    for name in made:
        _empty(model.get_submodule(name))
    parallelize_module(model, mesh.devices["tp"], made, src_data_rank=None)
    _tie(model, ties)
    parted = [name for name, style in plan.items() if style == "replicated_with_grad_allreduce"]
    linear = {
        name: module
        for name, style in plan.items()
        if isinstance(module := model.get_submodule(name), torch.nn.Linear) and style in _GATHERED
    }
    return SharedModules(
        frozenset(
            f"{name}.{key}" for name in parted for key, _ in model.get_submodule(name).named_parameters()
        ),
        {name: module.out_features for name, module in linear.items()},
    )


def _plan_of(model: torch.nn.Module) -> TensorPlan:
    found: TensorPlan | None = getattr(model, "tp_plan", None) or getattr(model, "_tp_plan", None)
    if not found:
        raise ConfigError(
            f"mesh= has tensor ranks, and nothing says how they share the {type(model).__name__}: give "
            'tensor_plan={"layers.*.up": "colwise", "layers.*.down": "rowwise"}, say, or leave "tp" out'
        )
    # Patterns of parameters (experts, say) are not followed; what they mean is said where it is refused.
    return found


def _matched(model: torch.nn.Module, plan: TensorPlan) -> dict[str, Any]:
    """The plan with the names of modules in the place of patterns."""
    names = [name for name, _ in model.named_modules() if name]
    found: dict[str, Any] = {}
    for pattern, style in plan.items():
        if isinstance(style, str) and style not in _STYLES:
            raise ConfigError(
                f"the tensor plan shares {pattern} as {style!r}, which is none of {', '.join(_STYLES)}: give "
                "tensor_plan= with these, or with torch's ParallelStyles"
            )
        matching = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
        if not matching:
            near = ", ".join(name for name in names if name.rpartition(".")[2] == pattern.rpartition(".")[2])
            hint = f"; there are {near}" if near else ""
            raise ConfigError(
                f"the tensor plan names {pattern!r}, and the {type(model).__name__} has no such module{hint}"
            )
        found |= dict.fromkeys(matching, style)
    return found


def _style(style: Any) -> "ParallelStyle | None":  # a name of `_STYLES`, or torch's own
    """Torch's object of that name; None where nothing is to be done to the module."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        ParallelStyle,
        RowwiseParallel,
        SequenceParallel,
    )

    if isinstance(style, ParallelStyle):
        return style
    makers: dict[str, Callable[[], ParallelStyle]] = {
        "colwise": ColwiseParallel,
        "rowwise": RowwiseParallel,
        "sequence_parallel": lambda: SequenceParallel(use_local_output=True),
    }
    makers |= dict.fromkeys(_GATHERED, lambda: ColwiseParallel(output_layouts=Replicate()))
    makers |= dict.fromkeys(
        ("rowwise_rep", "rowwise_split_input", "embedding_rowwise"),
        lambda: RowwiseParallel(input_layouts=Replicate()),
    )
    return makers[style]() if style in makers else None


def _ties(model: torch.nn.Module, shared: Collection[str]) -> list[list[str]]:
    """The names that go together of parameters that the model ties and the ranks share."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    found = []
    for group in names.values():
        inside = [name for name in group if name.rpartition(".")[0] in shared]
        if inside and len(inside) < len(group):
            other = next(name for name in group if name not in inside)
            raise ConfigError(_TIED.format(inside[0].rpartition(".")[0], other))
        if len(inside) > 1:
            found.append(inside)
    return found


def _tie(model: torch.nn.Module, ties: Iterable[Sequence[str]]) -> None:
    """Let the names of each group be one parameter again."""
    for first, *others in ties:
        shared = model.get_parameter(first)
        for name in others:
            path, _, key = name.rpartition(".")
            if getattr(model.get_parameter(name), "placements", None) != getattr(shared, "placements", None):
                raise ConfigError(_TIED.format(path, f"{first}, which is shared in another way"))
            model.get_submodule(path)._parameters[key] = shared


def _empty(module: torch.nn.Module) -> None:
    """Let a module's parameters have no memory: each rank makes its own part later."""
    for key, parameter in module._parameters.items():
        if parameter is not None:
            empty = torch.nn.Parameter(
                torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad
            )
            vars(empty).update(vars(parameter))
            module._parameters[key] = empty


def _check_sizes(name: str, module: torch.nn.Module, style: Any, degree: int) -> None:
    """Refuse a product that the ranks cannot share evenly: the model works with parts of equal sizes."""
    given = {"ColwiseParallel": "colwise", "RowwiseParallel": "rowwise"}  # torch's own
    style = style if isinstance(style, str) else given.get(type(style).__name__, "")
    if "wise" not in style:
        return
    if not isinstance(module, torch.nn.Linear | torch.nn.Embedding):
        raise ConfigError(
            f"the tensor plan shares {name} as {style!r}, and it is a {type(module).__name__}; that is for "
            "nn.Linear and nn.Embedding"
        )
    is_embedding = isinstance(module, torch.nn.Embedding)
    # An embedding's rows are words, which a row-wise style parts; a product's rows are its outputs.
    dim = _ROWS if style.startswith("colwise") != is_embedding else _COLUMNS
    size = module.weight.shape[dim]
    if size % degree:
        raise ConfigError(
            f"{degree} tensor ranks cannot share {name} as {style!r}: {size} is no multiple of {degree}; "
            'change "tp" in mesh=, or leave that module out of tensor_plan='
        )


def _check_heads(model: torch.nn.Module, degree: int) -> None:
    config = getattr(model, "config", None)
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, name, None)
        if isinstance(heads, int) and heads % degree:
            raise ConfigError(
                f'{degree} tensor ranks cannot share the model\'s {heads} heads ({name}): give a "tp" that '
                f"divides {heads}"
            )


def part_of(numbers: torch.Tensor, like: torch.nn.Parameter) -> torch.nn.Parameter:
    """This rank's part of a parameter's numbers, as a DTensor like one that has none."""
    from torch.distributed.tensor import DTensor, Shard

    assert isinstance(like, DTensor), "it was shared"
    local = numbers.detach()
    coordinate: Sequence[int] = like.device_mesh.get_coordinate() or ()
    for placement, at, size in zip(like.placements, coordinate, like.device_mesh.shape, strict=True):
        if isinstance(placement, Shard):
            local = local.chunk(size, placement.dim)[at]
    made = DTensor.from_local(
        local.clone(memory_format=torch.contiguous_format),
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )
    parameter = torch.nn.Parameter(made, requires_grad=like.requires_grad)
    vars(parameter).update(vars(like))
    return parameter
