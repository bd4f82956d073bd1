"""The cost model behind ``backend="auto"``: profiles, what they predict, and what is chosen."""

import json
import subprocess
import sys

import pytest
import sparsekern as sk
import torch
from cases import MASKS, random_pattern
from sparsekern import cost, ops
from sparsekern.benchmark import tune
from sparsekern.dense import DENSE, NATIVE, By
from sparsekern.formats import parse_format


@pytest.fixture
def profile(tmp_path, monkeypatch):
    """Where this test's profile is looked for."""
    path = tmp_path / "profile.json"
    monkeypatch.setenv("SPARSEKERN_PROFILE", str(path))
    cost.current.cache_clear()
    yield path
    cost.current.cache_clear()


def flat(native=1.0, dense=1.0, copies=1.0):
    """Coefficients of calls that take a constant time; ``copies`` are scatter and gather."""
    coefficients = {}
    for key in cost.all_keys():
        copy = key.split("/")[2] in ("scatter", "gather")
        seconds = copies if copy else dense if key.startswith("dense/") else native
        coefficients[key] = [seconds, 0.0, 0.0, 0.0]
    return coefficients


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_a_profile_comes_with_the_package(isa):
    built_in = cost.read(cost._BUILT_IN / f"{isa}.json")
    for format in MASKS:
        pattern = random_pattern(format, (256, 256), 0.1)
        for batch in (1, 8, 256):
            at = (cost.family(pattern), torch.float32, "forward", (256, 256), pattern.nnz, batch)
            assert 0 < built_in.seconds(*at) < 1


def test_the_choice_follows_the_profile(profile):
    pattern = random_pattern("csr", (30, 20), 0.5)
    x, values = torch.randn(4, 20), torch.randn(pattern.values_shape)
    # Of equal times the dense one wins: near break-even a wrong guess must cost nothing.
    for native, dense, expected in ((1.0, 2.0, "native"), (2.0, 1.0, "dense"), (1.0, 1.0, "dense")):
        cost.write(profile, flat(native=native, dense=dense), "a test")
        pattern = pattern.to("cpu")  # a new one has chosen nothing yet
        assert ops.choose(x, values, pattern) == (NATIVE if expected == "native" else DENSE)
        prediction = cost.predict(pattern, 4, torch.float32, need_x=False, need_values=False)
        assert (prediction.seconds, prediction.dense) == (min(native, dense), dense)
        y = sk.linear(x, values, pattern)
        assert torch.equal(y, sk.linear(x, values, pattern, backend=expected))


def test_training_pays_for_scattering(profile):
    """Every part takes 1: a native step has 2, one for both gradients, a dense one 3 and 2 copies."""
    cost.write(profile, flat(), "a test")
    pattern = random_pattern("csr", (30, 20), 0.5)
    x, values = torch.randn(4, 20), torch.randn(pattern.values_shape, requires_grad=True)
    assert cost.predict(pattern, 4, torch.float32) == cost.Prediction(NATIVE, 2.0, 3.0)
    assert ops.choose(x, values, pattern) == NATIVE
    with torch.no_grad():
        assert ops.choose(x, values, pattern) == DENSE


def test_parts_are_chosen_one_by_one(profile):
    """A fast dense gradient of x is taken, a slow one of W is not."""
    coefficients = flat(native=10.0, dense=10.0)
    for key in coefficients:
        if key.startswith("dense/") and "/backward_input/" in key:
            coefficients[key] = [1.0, 0.0, 0.0, 0.0]
        slow = key.startswith("dense/") and "/backward_weight/" in key
        if slow or ("csr/" in key and "/backward/" in key):
            coefficients[key] = [20.0, 0.0, 0.0, 0.0]
    cost.write(profile, coefficients, "a test")
    pattern = random_pattern("csr", (30, 20), 0.5)
    prediction = cost.predict(pattern, 4, torch.float32)
    assert (prediction.plan.grad_x, prediction.plan.grad_values) == (By.DENSE, By.NATIVE)
    assert prediction.seconds == 10 + 1 + 10 + 1


def test_the_summary_says_what_is_chosen(profile):
    model = torch.nn.Sequential(sk.SparseLinear(20, 30), torch.nn.Linear(30, 5))
    cost.write(profile, flat(native=1.0, dense=4.0), "a test")
    row, head = sk.summary(model).rows
    assert (row.backend, row.speedup, row.reason) == ("native", 12 / 2, None)
    assert (head.backend, head.speedup) == ("torch", None)
    coefficients = flat(native=4.0, dense=1.0)
    cost.write(profile, coefficients, "a test")
    row, _ = sk.summary(model).rows
    assert (row.backend, row.speedup) == ("dense", 3 / 5)
    coefficients["dense/float32/backward_weight/8"] = [9.0, 0.0, 0.0, 0.0]
    cost.write(profile, coefficients, "a test")
    row, _ = sk.summary(model, batch=7).rows
    assert (row.backend, row.speedup) == ("native + dense", 11 / 6)
    assert row.reason == "at batch 7 the native kernels alone are not predicted to be faster"
    assert row.reason in str(sk.summary(model, batch=7))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must be a profile of sparsekern"),
        ("{", "must be a profile of sparsekern"),
        ("[]", "must be a profile of sparsekern"),
        ("{}", "no 'version'"),
        ('{"version": 0, "coefficients": {}}', "version must be 2, got 0"),
        ('{"version": 2, "source": "", "coefficients": {}}', "coefficients must hold"),
        ("[" * 100_000, "must be a profile of sparsekern"),
    ],
)
def test_a_file_that_is_none(profile, text, message):
    profile.write_text(text)
    with pytest.warns(RuntimeWarning, match=message):
        assert cost.current() == cost.read(cost._BUILT_IN / f"{cost.isa()}.json")
    with pytest.raises(ValueError, match=message) as caught:
        cost.read(profile)
    assert str(caught.value).startswith(f"{profile} must be")


@pytest.mark.parametrize(
    "bad",
    [
        [1.0],
        [1.0, 0.0, -1.0, 0.0],
        [float("nan")] * 4,
        [float("inf")] * 4,
        [0.0] * 4,
        [10**400] * 4,
        ["1", 0, 0, 0],
        "x",
        None,
    ],
)
def test_coefficients_that_are_none(profile, bad):
    cost.write(profile, flat(), "a test")
    data = json.loads(profile.read_text())
    data["coefficients"]["csr/float32/forward/1"] = bad
    profile.write_text(json.dumps(data))
    with pytest.warns(RuntimeWarning, match="'csr/float32/forward/1' must be 4 numbers from 0 to 1000"):
        cost.current()


def test_fit_finds_what_made_the_times():
    true = [2e-6, 3e-10, 0.0, 1e-9]
    readings = []
    for batch in (32, 64, 256):
        for size in (100, 1000, 4000):
            terms = cost.features(size, size, size * size // 10, batch)
            readings.append(tune.Reading("k", terms, sum(c * f for c, f in zip(true, terms, strict=True))))
    assert tune.fit(readings) == pytest.approx(true, rel=1e-6, abs=1e-16)


def test_fit_is_never_negative():
    readings = [tune.Reading("k", cost.features(9, 9, 81, batch), 1.0 / batch) for batch in (17, 33, 65)]
    assert all(c >= 0 for c in tune.fit(readings))


def test_every_sample_is_of_its_family():
    assert set(tune.SAMPLES) == set(cost.FAMILIES)
    for family, samples in tune.SAMPLES.items():
        for spec, sparsity in samples:
            kind = parse_format(spec)
            pattern = kind.from_mask(kind.prune(torch.rand(128, 128), sparsity))
            assert cost.family(pattern) == family


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(tune, "SHAPES", ((256, 256),))
    monkeypatch.setattr(tune, "_MIN_SECONDS", 1e-5)


@pytest.mark.usefixtures("quick")
def test_tune_writes_a_profile(profile, monkeypatch, capsys):
    from sparsekern import cli

    monkeypatch.setattr(tune, "_WORST_FIT", 1e9)

    assert cli.main(["tune"]) == 0
    assert f"wrote {profile}" in capsys.readouterr().out
    assert "measured with" in cost.current().source


@pytest.mark.usefixtures("quick")
def test_tune_refuses_readings_that_no_model_fits(profile, monkeypatch, capsys):
    from sparsekern import cli

    monkeypatch.setattr(tune, "_WORST_FIT", -1.0)
    assert cli.main(["tune"]) == 1
    assert "run it again on an idle machine" in capsys.readouterr().err
    assert not profile.exists()


def test_tune_is_interrupted(profile, monkeypatch, capsys):
    from sparsekern import cli

    def measure():
        raise KeyboardInterrupt

    monkeypatch.setattr(tune, "measure", measure)
    assert cli.main(["tune"]) == 130
    assert capsys.readouterr().err == "interrupted; no profile was written\n"
    assert not list(profile.parent.iterdir())


def test_tune_looks_at_the_path_first(profile, tmp_path, monkeypatch, capsys):
    from sparsekern import cli

    monkeypatch.setattr(tune, "measure", lambda: pytest.fail("measured for nothing"))
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "profile.json"):
        assert cli.main(["tune", "--output", str(path)]) == 2
        assert str(tmp_path) in capsys.readouterr().err


def test_a_profile_that_was_asked_for_and_is_not_there(profile):
    with pytest.warns(RuntimeWarning, match="No such file"):
        assert cost.current() == cost.read(cost._BUILT_IN / f"{cost.isa()}.json")


def test_the_path_follows_the_platform(monkeypatch):
    monkeypatch.delenv("SPARSEKERN_PROFILE", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", "/somewhere")
    if sys.platform.startswith("linux"):
        assert str(cost.profile_path()) == f"/somewhere/sparsekern/{cost.isa()}.json"


def test_a_bad_profile_does_not_stop_an_import(profile):
    profile.write_text("{")
    done = subprocess.run(
        [sys.executable, "-c", "import sparsekern"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")
