"""Whole models: make their layers sparse, make them dense again, and show what they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from .. import cost, ops
from ..dense import DENSE, NATIVE
from ..distributions import allocate
from ..formats import parse_format
from .linear import SparseLinear


def sparsify(
    model: nn.Module,
    *,
    sparsity: float | None = None,
    format: str = "csr",
    distribution: str | Mapping[str, float] = "uniform",
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
) -> nn.Module:
    """Replace the ``nn.Linear`` layers of ``model`` by :class:`SparseLinear`, each pruned by magnitude.

    Norms, embeddings, biases and subclasses of ``nn.Linear`` are left alone. A module that is used in several
    places stays one module. Make the optimizer afterwards: the layers have new parameters.

    Args:
        model: changed in place, unless it is itself an ``nn.Linear``: use what is returned.
        sparsity: fraction of zeros over the chosen layers, in [0, 1); None for 0.9, or for what the format
            fixes.
        format: the sparsity format, such as ``"csr"``, ``"bsr32"``, ``"2:4"`` or ``"64:2:8"``.
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
            layer, no layer to make sparse, or a layer whose weight another module uses too (tied weights
            would come apart).

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
                sparse[layer] = SparseLinear.from_dense(layer, sparsity=shares[name], format=format)
            except ValueError as error:
                raise ValueError(f"layer {name!r}: {error}") from None
    model = _replace(model, sparse)
    _leave_fused_path(model)
    return model


def densify(model: nn.Module) -> nn.Module:
    """Replace every :class:`SparseLinear` of ``model`` by the equal ``nn.Linear``: undoes :func:`sparsify`.

    The model is changed in place, unless it is itself a ``SparseLinear``: use what is returned.
    """
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


@dataclass(frozen=True)
class Row:
    """One layer of a :class:`Summary`. Bytes are those of the weight, without bias."""

    name: str
    format: str
    shape: tuple[int, int]
    nnz: int
    value_bytes: int
    index_bytes: int
    backend: str
    speedup: float | None
    """Predicted time of a dense training step over this layer's, or None where nothing is predicted."""
    reason: str | None
    """Why the native kernels do not run, or None."""

    @property
    def size(self) -> int:
        """``out · in``."""
        return self.shape[0] * self.shape[1]

    @property
    def sparsity(self) -> float:
        """Fraction of zeros."""
        return 1.0 - self.nnz / self.size


@dataclass(frozen=True, repr=False)
class Summary:
    """What :func:`summary` found; ``str()`` makes the table."""

    rows: tuple[Row, ...]
    model_bytes: int
    """Bytes of all parameters, buffers and indices of the model."""
    dense_bytes: int
    """Bytes of the same model with every layer dense."""

    def __str__(self) -> str:
        size, nnz = sum(row.size for row in self.rows), sum(row.nnz for row in self.rows)
        cells = [("layer", "format", "shape", "sparsity", "values", "index", "vs dense", "backend")]
        reasons = list(dict.fromkeys(row.reason for row in self.rows if row.reason))
        for row in self.rows:
            note = f" [{reasons.index(row.reason) + 1}]" if row.reason else ""
            shape = f"{row.shape[0]} x {row.shape[1]}"
            gain = "-" if row.speedup is None else f"{row.speedup:.2g}x"
            cells.append((row.name or "(model)", row.format, shape, *_amounts(row), gain, row.backend + note))
        values, index = sum(row.value_bytes for row in self.rows), sum(row.index_bytes for row in self.rows)
        cells.append(
            ("total", "", "", f"{1 - nnz / size:.2%}" if size else "", _bytes(values), _bytes(index), "", "")
        )
        lines = list(_align(cells))
        rule = "-" * max(map(len, lines))
        share = f" ({self.model_bytes / self.dense_bytes:.0%})" if self.dense_bytes else ""
        closing = f"model {_bytes(self.model_bytes)}, dense {_bytes(self.dense_bytes)}{share}"
        notes = [f"[{i}] {reason}" for i, reason in enumerate(reasons, start=1)]
        return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1], closing, *notes])

    __repr__ = __str__


def summary(model: nn.Module, *, batch: int = 256) -> Summary:
    """What each linear layer of ``model`` is: format, shape, sparsity, bytes, and which backend runs it.

    ``print(summary(model))`` shows a table; the numbers are in its ``rows``. "vs dense" is the predicted
    speed-up of a training step over an ``nn.Linear`` for ``batch`` rows of x, see :mod:`sparsekern.cost`.
    Where a sparse layer does not run on the native kernels, a note below the table says why. Subclasses of
    ``nn.Linear`` are counted in the totals of the model only.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    rows, index_bytes, saved = [], 0, 0
    for name, module in model.named_modules():
        if isinstance(module, SparseLinear):
            row = _sparse_row(name, module, batch)
            index_bytes += row.index_bytes
            saved += row.size * module.values.element_size() - row.value_bytes
            rows.append(row)
        elif type(module) is nn.Linear:
            shape = (module.out_features, module.in_features)
            rows.append(
                Row(name, "dense", shape, module.weight.numel(), module.weight.nbytes, 0, "torch", None, None)
            )
    stored = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    return Summary(tuple(rows), stored + index_bytes, stored + saved)


def _sparse_row(name: str, layer: SparseLinear, batch: int) -> Row:
    values, pattern = layer.values, layer.pattern
    reason = ops.unavailable(values.dtype, values.device.type, pattern)
    speedup, backend = None, layer.backend
    if backend == "auto":
        backend = "native" if reason is None else "dense"
    if reason is None and values.device.type == "cpu":
        predicted = cost.predict(pattern, batch, values.dtype)
        speedup = predicted.dense / predicted.seconds
        if layer.backend == "auto" and predicted.plan != NATIVE:
            backend = "dense" if predicted.plan == DENSE else "native + dense"
            reason = f"torch's dense products are predicted to be as fast at batch {batch}"
    return Row(
        name,
        pattern.spec,
        pattern.shape,
        pattern.nnz,
        values.nbytes,
        pattern.nbytes,
        backend,
        speedup,
        reason,
    )


def _amounts(row: Row) -> tuple[str, str, str]:
    return f"{row.sparsity:.2%}", _bytes(row.value_bytes), _bytes(row.index_bytes) if row.index_bytes else "-"


def _bytes(count: int) -> str:
    """``count`` in the decimal unit in which it is below 1000."""
    amount, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if amount < 999.5:
            break
        amount, unit = amount / 1000, larger
    return f"{amount:.3g} {unit}"


def _align(cells: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Lines of a table whose columns are as wide as their widest cell; amounts are flush right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        padded = (
            c.rjust(w) if 2 <= i <= 6 else c.ljust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        )
        yield "  ".join(padded).rstrip()
