"""Spec strings, and what holds for the patterns of every format."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sparsekern.formats import BSR, CSR, NM, VNM, Format, parse_format

SPECS = (
    *("csr", "bsr4", "bsr8x16", "bsr32", "1:1", "1:2", "2:4", "1:4", "3:5", "2:8", "4:8", "8:16", "16:16"),
    *("4:2:4", "4:2:5", "64:2:8", "8:2:9", "128:2:16"),
)
SHAPES = ((0, 0), (0, 5), (7, 0), (1, 1), (7, 5), (9, 3), (16, 16), (66, 35), (130, 51))

specs = pytest.mark.parametrize("spec", SPECS)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def random_mask(format, shape):
    return format.prune(torch.rand(shape), 0.6 if format.fixed_sparsity is None else None)


def same(a, b):
    return (
        type(a) is type(b)
        and (a.shape, a.options, a.spec) == (b.shape, b.options, b.spec)
        and len(a.tensors()) == len(b.tensors())
        and all(
            torch.equal(s, t) and s.dtype == t.dtype for s, t in zip(a.tensors(), b.tensors(), strict=True)
        )
    )


# --- spec strings ---


@pytest.mark.parametrize(
    ("spec", "kind", "options", "sparsity"),
    [
        ("csr", CSR, {}, None),
        ("bsr32", BSR, {"block": (32, 32)}, None),
        ("bsr64x32", BSR, {"block": (64, 32)}, None),
        ("bsr4x128", BSR, {"block": (4, 128)}, None),
        ("2:4", NM, {"n": 2, "m": 4}, 0.5),
        ("1:16", NM, {"n": 1, "m": 16}, 0.9375),
        ("16:16", NM, {"n": 16, "m": 16}, 0.0),
        ("64:2:8", VNM, {"v": 64, "n": 2, "m": 8}, 0.75),
        ("4:2:256", VNM, {"v": 4, "n": 2, "m": 256}, 1 - 2 / 256),
    ],
)
def test_spec(spec, kind, options, sparsity):
    format = parse_format(spec)
    assert (format.kind, format.options, format.fixed_sparsity) == (kind, options, sparsity)
    assert format.spec == spec
    assert parse_format(spec) == format
    assert hash(parse_format(spec)) == hash(format)


def test_shortest_spec():
    assert parse_format("bsr32x32") == parse_format("bsr32")
    assert parse_format("bsr32x32").spec == "bsr32"


def test_formats_differ():
    assert len({parse_format(spec) for spec in SPECS}) == len(SPECS)


BAD_SPECS = (
    *(
        "",
        " ",
        "CSR",
        "csr ",
        "csr\n",
        "csr4",
        "coo",
        "bsr",
        "bsr7",
        "bsr0",
        "bsr256",
        "bsr32x",
        "bsrx32",
        "bsr-4",
    ),
    *(
        "bsr32x7",
        "bsr4x4x4",
        "BSR32",
        "bsr 32",
        "bsr04",
        "5:4",
        "0:4",
        "2:",
        ":4",
        "2:4:",
        "2:17",
        "-2:4",
        "2:4 ",
    ),
    *(
        "02:4",
        "2.0:4",
        "64:3:8",
        "64:1:8",
        "64:2:3",
        "64:2:257",
        "6:2:8",
        "0:2:8",
        "2:3:4",
        "64:2:8:1",
        "٢:٤",
    ),
    *("4294967296:2:8", "99999999999999999999:2:8", "2:99999999999999999999", None, 4, ("2", "4")),
)


@pytest.mark.parametrize("spec", BAD_SPECS)
def test_bad_spec(spec):
    with pytest.raises(ValueError, match=r"format must be 'csr', 'bsr<side>'.* 'N:M'.* 'V:2:M'") as error:
        parse_format(spec)
    assert str(error.value).endswith(f"got {spec!r}")


@given(st.text(alphabet="bcrsx:0123456789 -", max_size=12))
def test_any_text_is_a_format_or_refused(spec):
    try:
        format = parse_format(spec)
    except ValueError:
        return
    assert parse_format(format.spec) == format
    assert format.spec == spec or format.kind is BSR


# --- patterns ---


@shapes
@specs
def test_round_trips(spec, shape):
    format = parse_format(spec)
    mask = random_mask(format, shape)
    pattern = format.from_mask(mask)
    assert pattern.shape == shape
    assert pattern.spec == format.spec
    assert pattern.options == format.options
    assert pattern.sizes()[:2] == list(shape)
    assert torch.equal(pattern.to_mask(), mask)
    assert pattern.nnz == int(mask.sum())
    assert same(format.from_state(shape, dict(pattern.state())), pattern)
    assert same(Format(type(pattern), pattern.options).from_mask(mask), pattern)


@shapes
@specs
def test_gather_and_scatter(spec, shape):
    format = parse_format(spec)
    mask = random_mask(format, shape)
    pattern = format.from_mask(mask)
    dense = torch.randn(shape)
    index = pattern.flat_index()
    assert index.dtype == torch.int64
    assert tuple(index.shape) == pattern.values_shape
    inside = index < mask.numel()
    assert torch.equal(index[inside].sort().values, mask.reshape(-1).nonzero()[:, 0])
    assert (index[~inside] == mask.numel()).all()
    values = pattern.gather(dense)
    assert torch.equal(values[inside], dense.reshape(-1)[index[inside]])
    assert (values[~inside] == 0).all()
    assert torch.equal(pattern.scatter(values), dense * mask)
    assert torch.equal(pattern.gather(pattern.scatter(values)), values)


@specs
def test_padding_is_dropped(spec):
    pattern = parse_format(spec).from_mask(random_mask(parse_format(spec), (66, 35)))
    values = torch.full(pattern.values_shape, 2.0)
    assert torch.equal(pattern.scatter(values), 2.0 * pattern.to_mask())


@specs
def test_masks_of_any_layout(spec):
    format = parse_format(spec)
    mask = random_mask(format, (66, 35))
    frame = torch.ones(70, 80, dtype=torch.bool)
    frame[2:68, 5:75:2] = mask
    for same_mask in (mask.t().contiguous().t(), frame[2:68, 5:75:2]):
        assert not same_mask.is_contiguous()
        assert same(format.from_mask(same_mask), format.from_mask(mask))


@specs
def test_later_changes_of_the_mask_do_not_matter(spec):
    format = parse_format(spec)
    mask = random_mask(format, (66, 35))
    pattern, before = format.from_mask(mask), mask.clone()
    mask.logical_not_()
    assert torch.equal(pattern.to_mask(), before)


@specs
def test_meta_device(spec):
    format = parse_format(spec)
    pattern = format.from_mask(random_mask(format, (66, 35)))
    meta = pattern.to("meta")
    assert {tensor.device.type for tensor in meta.tensors()} == {"meta"}
    assert [tensor.shape for tensor in meta.tensors()] == [tensor.shape for tensor in pattern.tensors()]
    assert meta.values_shape == pattern.values_shape
    assert meta.nnz == pattern.nnz
    assert meta.options == pattern.options


@specs
@pytest.mark.parametrize(
    ("mask", "error"),
    [
        (torch.ones(4, 4), r"mask must be a dense bool tensor \[out, in\], got torch.float32 \[4, 4\]"),
        (
            torch.ones(4, dtype=torch.bool),
            r"mask must be a dense bool tensor \[out, in\], got torch.bool \[4\]",
        ),
    ],
)
def test_no_mask(spec, mask, error):
    with pytest.raises(ValueError, match=error):
        parse_format(spec).from_mask(mask)


@specs
def test_mask_of_another_type(spec):
    with pytest.raises(TypeError, match=r"mask must be a torch.Tensor, got list"):
        parse_format(spec).from_mask([[True]])
