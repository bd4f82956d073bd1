"""Layer-wise sparsities: the reference's numbers, the global budget, and bad input."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sparsekern.training import allocate

REFERENCE = json.loads((Path(__file__).parent / "reference" / "erk.json").read_text())["cases"]
LENET = {"conv1": (6, 1, 5, 5), "conv2": (16, 6, 5, 5), "fc1": (120, 400), "fc2": (84, 120), "fc3": (10, 84)}

shapes = st.dictionaries(
    st.text("abc", min_size=1),
    st.lists(st.integers(1, 300), min_size=2, max_size=4).map(tuple),
    min_size=1,
    max_size=8,
)


@pytest.mark.parametrize(
    "case", REFERENCE, ids=lambda c: f"{c['distribution']}-{c['sparsity']}-{len(c['shapes'])}"
)
def test_agrees_with_jaxpruner(case):
    ours = allocate(case["distribution"], case["shapes"], case["sparsity"])
    assert ours == pytest.approx(case["result"], abs=1e-4)


@given(shapes, st.floats(0.0, 0.999), st.sampled_from(["uniform", "er", "erk"]))
def test_keeps_the_budget(shapes, sparsity, distribution):
    ours = allocate(distribution, shapes, sparsity)
    assert list(ours) == list(shapes)
    assert all(0.0 <= value < 1.0 for value in ours.values())
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    kept = sum((1.0 - ours[name]) * size for name, size in sizes.items())
    assert kept == pytest.approx((1.0 - sparsity) * sum(sizes.values()), rel=1e-9)


@given(shapes, st.floats(0.001, 0.999))
def test_erk_density_is_proportional_to_dims_where_not_dense(shapes, sparsity):
    ours = allocate("erk", shapes, sparsity)
    scales = {
        name: (1.0 - ours[name]) * math.prod(shape) / sum(shape)
        for name, shape in shapes.items()
        if ours[name] > 0
    }
    assert max(scales.values(), default=0) == pytest.approx(min(scales.values(), default=0), rel=1e-6)


def test_er_ignores_the_kernel_and_erk_does_not():
    linear = {"a": (300, 100), "b": (50, 300)}
    assert allocate("er", linear, 0.9) == allocate("erk", linear, 0.9)
    assert allocate("er", LENET, 0.9) != allocate("erk", LENET, 0.9)


def test_dict_is_taken_as_it_is():
    assert allocate({"fc1": 0.5}, {"fc1": (4, 4), "fc2": (4, 4)}, 0.9) == {"fc1": 0.5, "fc2": 0.0}


def test_nothing_to_allocate():
    assert allocate("erk", {}, 0.9) == {}


@pytest.mark.parametrize("distribution", ["uniform", "er", "erk"])
def test_dense(distribution):
    assert set(allocate(distribution, LENET, 0.0).values()) == {0.0}


@pytest.mark.parametrize(
    ("distribution", "shapes", "sparsity", "message"),
    [
        ("global", LENET, 0.9, "distribution must be one of .*got 'global'"),
        ("erk", LENET, 1.0, r"sparsity must be in \[0, 1\), got 1.0"),
        ("uniform", LENET, -0.1, r"sparsity must be in \[0, 1\), got -0.1"),
        ("er", LENET, float("nan"), r"sparsity must be in \[0, 1\), got nan"),
        ("erk", {"norm": (64,)}, 0.9, r"shape of 'norm' must be .*got \(64,\)"),
        ({"fc9": 0.5}, LENET, 0.9, r"distribution must name layers among .*got \['fc9'\]"),
        ({"fc1": 1.5}, LENET, 0.9, r"sparsity of 'fc1' must be in \[0, 1\), got 1.5"),
    ],
)
def test_bad_input(distribution, shapes, sparsity, message):
    with pytest.raises(ValueError, match=message):
        allocate(distribution, shapes, sparsity)
