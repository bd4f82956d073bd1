"""Whole models: make their layers sparse, and dense again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

from ..distributions import allocate
from ..formats import parse_format
from .linear import SparseLinear


def sparsify(
    model: nn.Module,
    *,
    sparsity: float | None = None,
    format: str = "csr",
    transposable: bool = False,
    distribution: str | Mapping[str, float] = "uniform",
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
) -> nn.Module:
    """Replace the ``nn.Linear`` layers of ``model`` by :class:`SparseLinear`, each pruned by magnitude.

    Norms, embeddings, biases and subclasses of ``nn.Linear`` are left alone. A module that is used in several
    places stays one module. Make the optimizer afterwards: the layers have new parameters. Hooks of replaced
    layers are not carried over: register them afterwards too.

    Args:
        model: changed in place, unless it is itself an ``nn.Linear``: use what is returned.
        sparsity: fraction of zeros over the chosen layers, in [0, 1); None for 0.9, or for what the format
            fixes.
        format: the sparsity format, such as ``"csr"``, ``"bsr32"``, ``"2:4"`` or ``"64:2:8"``.
        transposable: keep the best N:M masks whose transposes are N:M too, see :func:`sparsekern.prune`; M
            must divide both sizes of each layer.
        distribution: how the layers share the sparsity: ``"uniform"``, ``"er"``, ``"erk"``, or a dict of
            layer name to sparsity, see :func:`sparsekern.training.allocate`. ``"uniform"`` or such a dict
            where the format fixes the sparsity. Layers whose share is 0, and
            those that a dict does not name, stay ``nn.Linear``.
        include: which layers to choose; None for all. Names as in ``model.named_modules()``, with ``*``,
            ``?`` and ``[...]`` as in a shell (``*`` also spans dots); the name of a container stands for all
            layers in it.
        exclude: which of those to leave dense, in the same way.

    Returns:
        The model.

    Raises:
        ValueError: an unknown format or distribution, a sparsity outside [0, 1), names that match no linear
            layer, no layer to make sparse, a layer so small that none of its weights or blocks would stay, or
            one whose weight another module uses too (tied weights would come apart).

    >>> model = sparsify(model, sparsity=0.9, distribution="erk", exclude=["head"])
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    fixed = parse_format(format).fixed_sparsity
    if fixed is not None and distribution in ("er", "erk"):
        raise ValueError(f"distribution must be 'uniform' for format {format!r}, got {distribution!r}")
    if sparsity is None:
        sparsity = 0.9 if fixed is None else fixed
    layers = {name: m for name, m in model.named_modules() if type(m) is nn.Linear}
    if not layers:
        raise ValueError(f"model must hold an nn.Linear to make sparse, got none in {type(model).__name__}")
    chosen = _choose(model, layers, include, exclude)
    shapes = {name: tuple(layer.weight.shape) for name, layer in chosen.items()}
    shares = allocate(distribution, shapes, sparsity)
    sparse: dict[nn.Module, nn.Module] = {}
    for name, layer in chosen.items():
        if shares[name] > 0.0:
            _check_untied(model, name, layer)
            try:
                sparse[layer] = SparseLinear.from_dense(
                    layer, sparsity=shares[name], format=format, transposable=transposable
                )
            except (TypeError, ValueError) as error:
                raise type(error)(f"layer {name!r}: {error}") from None
    model = _replace(model, sparse)
    _leave_fused_path(model)
    return model


def densify(model: nn.Module) -> nn.Module:
    """Replace every :class:`SparseLinear` of ``model`` by the equal ``nn.Linear``: undoes :func:`sparsify`.

    The model is changed in place, unless it is itself a ``SparseLinear``: use what is returned.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    return _replace(model, {m: m.to_dense() for m in model.modules() if isinstance(m, SparseLinear)})


def _choose(
    model: nn.Module,
    layers: dict[str, nn.Linear],
    include: str | Sequence[str] | None,
    exclude: str | Sequence[str] | None,
) -> dict[str, nn.Linear]:
    """The layers that ``include`` and ``exclude`` leave. Raises if a name matches nothing or none is left."""
    names: dict[nn.Module, list[str]] = {layer: [] for layer in layers.values()}  # a shared layer has several
    for name, module in model.named_modules(remove_duplicate=False):
        if module in names:
            names[module].append(name)

    def matched(argument: str, patterns: str | Sequence[str]) -> set[nn.Module]:
        found: set[nn.Module] = set()
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            hits = {layer for layer, known in names.items() if any(_matches(name, pattern) for name in known)}
            if not hits:
                raise ValueError(
                    f"{argument} must name nn.Linear layers among {sorted(layers)}, got {pattern!r}"
                )
            found |= hits
        return found

    included = set(names) if include is None else matched("include", include)
    excluded = set() if exclude is None else matched("exclude", exclude)
    chosen = {name: layer for name, layer in layers.items() if layer in included - excluded}
    if not chosen:
        raise ValueError(
            f"include and exclude must leave a layer to make sparse, got {include!r} and {exclude!r}"
        )
    return chosen


def _matches(name: str, pattern: str) -> bool:
    """Whether ``pattern`` matches a module's dotted name or that of a module that it is in."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[: i + 1]), pattern) for i in range(len(parts)))


def _check_untied(model: nn.Module, name: str, layer: nn.Linear) -> None:
    for other_name, other in model.named_modules():
        if other is not layer and any(parameter is layer.weight for parameter in other._parameters.values()):
            raise ValueError(
                f"layer {name!r} must own its weight, but {other_name!r} shares it and would not follow: "
                f"exclude={[name]!r} leaves it dense"
            )


def _replace(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Put ``new[module]`` wherever ``module`` is in ``model``."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in new:
                parent._modules[name] = new[child]
    return new.get(model, model)


def _leave_fused_path(model: nn.Module) -> None:
    """Keep torch's transformer encoder off its fused inference kernel, which reads dense weights."""
    for module in model.modules():
        if any(isinstance(m, SparseLinear) for m in module.modules()):
            if isinstance(module, nn.TransformerEncoder):
                module.use_nested_tensor = False
            elif isinstance(module, nn.TransformerEncoderLayer):
                module.activation_relu_or_gelu = 0
