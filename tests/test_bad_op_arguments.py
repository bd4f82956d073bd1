"""The ops check their arguments themselves: called directly with bad ones they raise, and never crash."""

import pytest
import torch
from cases import MASKS, op, random_pattern, where

formats = pytest.mark.parametrize("format", MASKS)
products = pytest.mark.parametrize(
    "product", ["linear", "linear_backward", "linear_backward_input", "linear_backward_weight"]
)


def calls(pattern):
    """Good arguments of each op."""
    x, grad = torch.randn(5, 70), torch.randn(5, 100)
    values, at = torch.randn(pattern.values_shape), where(pattern)
    return {
        "linear": [x, values, None, *at],
        "linear_backward": [grad, x, values, *at, True, True, True],
        "linear_backward_input": [grad, values, *at],
        "linear_backward_weight": [grad, x, *at],
    }


def corruptions(tensors):
    """Lists of another length, and tensors of another kind."""
    yield []
    yield tensors[:-1]
    yield [*tensors, tensors[0]]
    for i, tensor in enumerate(tensors):
        strided = torch.stack([tensor, tensor], -1)[..., 0]
        for bad in (tensor.long(), tensor.float(), tensor.to("meta"), tensor[None], strided):
            if bad is strided and strided.is_contiguous():  # one element has no stride
                continue
            yield [*tensors[:i], bad, *tensors[i + 1 :]]


def assert_refused(pattern, product, lists):
    arguments = calls(pattern)[product]
    at = next(i for i, argument in enumerate(arguments) if isinstance(argument, list))
    accepted = []
    for bad in lists:
        arguments[at] = bad
        try:
            op(pattern, product)(*arguments)
        except RuntimeError as error:
            text = str(error)
        else:
            accepted.append([f"{t.dtype} {list(t.shape)} strides {t.stride()} on {t.device}" for t in bad])
            continue
        assert f"sparsekern::{pattern.format}_{product}: " in text
        assert " must be " in text
    assert not accepted


@products
@formats
def test_a_bad_pattern_is_refused(format, product):
    pattern = random_pattern(format, (100, 70), 0.3)
    assert_refused(pattern, product, corruptions(pattern.tensors()))


@products
def test_csr_sizes_that_do_not_fit(product):
    pattern = random_pattern("csr", (100, 70), 0.3)
    tensors = pattern.tensors()
    row_ptr, col_idx, columns, tile_ptr, t_tile_ptr, t_slot = range(6)
    changes = [
        (row_ptr, lambda t: t[:-1]),
        (row_ptr, lambda t: t[:0]),
        (row_ptr, lambda t: torch.cat([t, t[-1:]])),
        (col_idx, lambda t: t[:-1]),
        (col_idx, lambda t: t[:0]),
        (col_idx, lambda t: torch.cat([t, t])),
        (columns, lambda t: t[:-1]),
        (columns, lambda t: torch.cat([t, t])),
        (tile_ptr, lambda t: t[:1]),
        (tile_ptr, lambda t: t[:, :-1].contiguous()),
        (tile_ptr, lambda t: torch.cat([t, t], 1)),
        (t_tile_ptr, lambda t: t[:1]),
        (t_slot, lambda t: t[:-1]),
        (t_slot, lambda t: torch.cat([t, t])),
    ]
    lists = [[*tensors[:i], change(tensors[i]), *tensors[i + 1 :]] for i, change in changes]
    shorter = random_pattern("csr", (100, 70), 0.1).tensors()
    swapped = (col_idx, columns, t_slot)
    lists += [[shorter[i] if i in swapped else t for i, t in enumerate(tensors)]]
    assert_refused(pattern, product, lists)


@products
@formats
def test_a_bad_tensor_is_refused(format, product):
    pattern = random_pattern(format, (100, 70), 1.0)
    good = calls(pattern)[product]
    for i, tensor in enumerate(good):
        if not isinstance(tensor, torch.Tensor):
            continue
        for bad in (
            tensor.double(),
            tensor.half(),
            tensor.int(),
            tensor[None],
            tensor[..., :-1],
            tensor[:0] if tensor.dim() == 1 else tensor[:, :0],
            torch.cat([tensor, tensor], -1),
            tensor.repeat_interleave(2, -1)[..., ::2],
        ):
            arguments = [*good[:i], bad, *good[i + 1 :]]
            with pytest.raises(
                RuntimeError, match=rf"sparsekern::{pattern.format}_{product}: \w+ must be .*, got "
            ):
                op(pattern, product)(*arguments)


@formats
def test_a_bias_of_the_op(format):
    pattern = random_pattern(format, (100, 70), 0.3)
    x, values, _, *at = calls(pattern)["linear"]
    for bad in (torch.randn(99), torch.randn(1, 100), torch.randn(100).double(), torch.randn(200)[::2]):
        with pytest.raises(RuntimeError, match=r"bias must be contiguous float32 \[100\] on cpu, got"):
            op(pattern, "linear")(x, values, bad, *at)


@formats
def test_batches_that_differ(format):
    pattern = random_pattern(format, (100, 70), 0.3)
    grad, x = torch.randn(5, 100), torch.randn(6, 70)
    with pytest.raises(RuntimeError, match=r"_weight: x must be \[5, in\], got float32 \[6, 70\] on cpu"):
        op(pattern, "linear_backward_weight")(grad, x, *where(pattern))
