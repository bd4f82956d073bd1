"""The ops check their arguments themselves: called directly with bad ones they raise, and never crash."""

import pytest
import torch
from cases import MASKS, op, random_pattern

formats = pytest.mark.parametrize("format", MASKS)
products = pytest.mark.parametrize(
    "product", ["linear", "linear_backward", "linear_backward_input", "linear_backward_weight"]
)


def calls(pattern):
    """Good arguments of each op."""
    x, grad = torch.randn(5, 20), torch.randn(5, 30)
    values, tensors = torch.randn(pattern.values_shape), pattern.tensors()
    return {
        "linear": [x, values, None, tensors],
        "linear_backward": [grad, x, values, tensors, True, True, True],
        "linear_backward_input": [grad, values, tensors],
        "linear_backward_weight": [grad, x, tensors],
    }


def corruptions(tensors):
    """Lists of another length, and tensors of another kind."""
    yield []
    yield tensors[:-1]
    yield [*tensors, tensors[0]]
    for i, tensor in enumerate(tensors):
        strided = tensor.repeat_interleave(2, -1)[..., ::2]
        for bad in (tensor.long(), tensor.float(), tensor.to("meta"), tensor[None], strided):
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
    pattern = random_pattern(format, (30, 20), 0.3)
    assert_refused(pattern, product, corruptions(pattern.tensors()))


@products
def test_csr_sizes_that_do_not_fit(product):
    pattern = random_pattern("csr", (30, 20), 0.3)
    tensors = pattern.tensors()
    row_ptr, col_idx, tile_ptr, t_tile_ptr, t_slot = range(5)
    changes = [
        (row_ptr, lambda t: t[:-1]),
        (row_ptr, lambda t: t[:0]),
        (row_ptr, lambda t: torch.cat([t, t[-1:]])),
        (col_idx, lambda t: t[:-1]),
        (col_idx, lambda t: t[:0]),
        (col_idx, lambda t: torch.cat([t, t])),
        (tile_ptr, lambda t: t[:1]),
        (tile_ptr, lambda t: t[:, :-1].contiguous()),
        (tile_ptr, lambda t: torch.cat([t, t], 1)),
        (t_tile_ptr, lambda t: t[:1]),
        (t_slot, lambda t: t[:-1]),
        (t_slot, lambda t: torch.cat([t, t])),
    ]
    lists = [[*tensors[:i], change(tensors[i]), *tensors[i + 1 :]] for i, change in changes]
    shorter = random_pattern("csr", (30, 20), 0.1).tensors()
    lists += [[*tensors[:col_idx], shorter[col_idx], *tensors[tile_ptr:t_slot], shorter[t_slot]]]
    assert_refused(pattern, product, lists)


@products
@formats
def test_a_bad_tensor_is_refused(format, product):
    pattern = random_pattern(format, (30, 20), 0.3)
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
            with pytest.raises(RuntimeError, match=rf"sparsekern::{format}_{product}: \w+ must be .*, got "):
                op(pattern, product)(*arguments)


@formats
def test_a_bias_of_the_op(format):
    pattern = random_pattern(format, (30, 20), 0.3)
    x, values, _, tensors = calls(pattern)["linear"]
    for bad in (torch.randn(29), torch.randn(1, 30), torch.randn(30).double(), torch.randn(60)[::2]):
        with pytest.raises(RuntimeError, match=r"bias must be contiguous float32 \[30\] on cpu, got"):
            op(pattern, "linear")(x, values, bad, tensors)


@formats
def test_batches_that_differ(format):
    pattern = random_pattern(format, (30, 20), 0.3)
    grad, x = torch.randn(5, 30), torch.randn(6, 20)
    with pytest.raises(RuntimeError, match=r"_weight: x must be \[5, in\], got float32 \[6, 20\] on cpu"):
        op(pattern, "linear_backward_weight")(grad, x, pattern.tensors())
