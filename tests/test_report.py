"""The HTML report: what it holds, and what a browser makes of it."""

import base64
import json
import math
import re
import shutil
from pathlib import Path

import _chromium
import numpy as np
import pytest
import torch
from _photos import write_photos
from typer.testing import CliRunner

from robattr_fast import Certificate
from robattr_fast.certificates.certificate import files
from robattr_fast.certificates.theorems.membership import membership
from robattr_fast.cli.app import app
from robattr_fast.report import entry, rounding
from robattr_fast.report.page import SHARES, Entry, page

# One process makes the run, and opens the browser.
pytestmark = [pytest.mark.wheel, pytest.mark.xdist_group("report")]

RADII = (0.01, 0.03, 0.06)


def synthetic(shape=(3, 8, 10), samples=4096, levels=1, seed=0, **options):
    """A certificate that proves something at every radius that is looked at."""
    generator = torch.Generator().manual_seed(seed)
    n = math.prod(shape)
    share = torch.linspace(0.999, 0.0005, n).pow(1.5)[torch.randperm(n, generator=generator)]
    counts = torch.zeros(1, n, levels, dtype=torch.int32)
    counts[0, :, -1] = torch.binomial(torch.full((n,), float(samples)), share, generator=generator).int()
    votes = torch.tensor([[samples - 40, 40]], dtype=torch.int32)
    return Certificate.from_counts(counts, samples, sigma=0.2, shape=shape, class_counts=votes, **options)


def data(html):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)[1])


@pytest.fixture(scope="module")
def certs():
    return [synthetic(), synthetic((8, 10), seed=1, levels=3), synthetic((80,), seed=2, samples=300)]


@pytest.fixture(scope="module")
def html(certs):
    picture = torch.rand(3, 8, 10, generator=torch.Generator().manual_seed(0))
    names = ["with <b>image</b>", "map alone", "a row"]
    return page([Entry(names[i], cert, image=picture if i == 0 else None) for i, cert in enumerate(certs)], radii=RADII)


def test_numbers_are_those_of_the_certificates(html, certs):
    held = data(html)
    assert held["shares"] == list(SHARES)
    grid = torch.tensor(held["radii"], dtype=torch.float64)
    assert set(RADII) <= set(held["radii"])
    assert len(grid) <= 127
    torch.testing.assert_close(grid.diff(), torch.full_like(grid[1:], float(grid[1])), rtol=1e-9, atol=0)
    for cert, one in zip(certs, held["certificates"], strict=True):
        for share, of_share in zip(SHARES, one["sets"], strict=True):
            k = of_share["k"]
            assert k == max(1, int(share * cert.settings.n))
            proved = cert.overlap(k, grid).share[:, 0] * k
            assert of_share["counts"][0] == proved.round().int().tolist()
            published = cert.with_bounds(bound="hoeffding", slack=0).overlap(k, grid).share[:, 0] * k
            assert of_share["counts"][-1] == published.round().int().tolist()
            # The last radii have nothing left to tell, the first have.
            assert of_share["counts"][0][0] > 0


def test_the_shown_set_is_the_certified_set(html, certs):
    held = data(html)
    for cert, one in zip(certs, held["certificates"], strict=True):
        shape = (1,) * (3 - len(cert.settings.shape)) + cert.settings.shape
        for of_share in one["sets"]:
            lower, upper = cert.lower.flatten(1), cert.upper.flatten(1)
            stays_in, stays_out = (r[0].numpy() for r in membership(lower, upper, of_share["k"], cert.settings.sigma))
            codes = np.frombuffer(base64.b64decode(of_share["steps"]), np.uint8).astype(int)
            for step, radius in enumerate(held["radii"]):
                assert of_share["inside"][step] == (stays_in > radius).sum()
                assert of_share["outside"][step] == (stays_out > radius).sum()
                inside = (codes < 128) & (step < codes)
                outside = (codes > 128) & (step < codes - 128)
                some_in = (stays_in > radius).reshape(shape).any(0).ravel()
                all_out = (stays_out > radius).reshape(shape).all(0).ravel()
                np.testing.assert_array_equal(inside, some_in)
                np.testing.assert_array_equal(outside, all_out & ~(stays_in > 0).reshape(shape).any(0).ravel())


def test_tables_round_down(html, certs):
    rows = re.findall(r'<tr><th scope="row">([\d.]+) %, (\d+) elements</th>(.*?)</tr>', html)
    assert len(rows) == len(certs) * len(SHARES)
    for index, (share, k, cells) in enumerate(rows):
        cert, k = certs[index // len(SHARES)], int(k)
        assert float(share) == 100 * SHARES[index % len(SHARES)]
        if not cert.overlap(k, RADII).share.any():
            assert "colspan" in cells
            assert "nothing certified at radius 0.01 or above: " in cells
            continue
        *kept, half = re.findall(r"<td>(.*?)</td>", cells)
        assert kept == [rounding.percent(float(value)) for value in cert.overlap(k, RADII).share[:, 0]]
        assert half == rounding.radius(float(cert.radius(k, 0.5)))


def test_what_a_radius_means_for_the_image(html):
    grey = re.findall(
        r">values that may change by one grey level of 255</th><td>(\d+)</td><td>(\d+)</td><td>(\d+)<", html
    )
    assert grey == [("6", "58", "234")] * 3
    (decibels,) = re.findall(r">PSNR</th><td>(.*?)</td><td>(.*?)</td><td>(.*?)</td>", html)  # of the one with an image
    assert decibels == tuple(f"{math.floor(100 * math.log10(240 / at**2)) / 10:.1f} dB" for at in RADII)


def test_nothing_but_the_page_itself(html):
    assert not re.search(r'(?i)https?:|(src|href)\s*=\s*(?!"data:image/png;base64,)|@import|url\(', html)
    assert "default-src 'none'" in html
    assert "with &lt;b&gt;image&lt;/b&gt;" in html
    assert "<b>image" not in html


def test_what_is_to_be_known_of_a_certificate(certs):
    explored = certs[0].with_bounds(alpha=0.2)
    html = page([Entry("x", explored, remarks=["a remark"], class_name="tabby <cat>")])
    assert "a remark" in html
    assert "were chosen after the fact" in html
    assert "confidence 80 %" in html
    assert "class tabby &lt;cat&gt; (0), certified to radius " in html


def test_a_certificate_that_proves_nothing(certs):
    empty = Certificate.from_counts(torch.full((1, 80, 1), 8, dtype=torch.int32), 16, sigma=0.2, shape=(8, 10))
    (one,) = data(page([Entry("x", empty)]))["certificates"]
    assert not any(base64.b64decode(one["sets"][0]["steps"]))
    assert set(one["sets"][0]["counts"][0]) == {0}


@pytest.mark.parametrize(("end", "step"), [(0.0953, 0.002), (0.3, 0.005), (0.0007, 1e-5), (30, 0.5)])
def test_radii_are_round_numbers(certs, end, step):
    grid = entry.radius_steps([certs[0].with_bounds(alpha=1e-9)], [0.2], [end])
    fade = float(certs[0].with_bounds(alpha=1e-9).radius(48, 0.02))
    if end > fade:
        assert grid[1] == step
    assert grid[-1] >= max(end, fade)
    assert len(grid) <= entry._STEPS + 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cert": Certificate.from_counts(torch.zeros(2, 80, 1, dtype=torch.int32), 5, sigma=1)}, "cert: got 2 maps"),
        ({"cert": synthetic((2, 2, 4, 5))}, "takes one of up to 3 dimensions"),
        ({"image": torch.rand(3, 8, 9)}, "image: got"),
    ],
)
def test_entries_that_cannot_be_shown(certs, change, message):
    with pytest.raises(ValueError, match=message):
        Entry(**{"name": "x", "cert": certs[0], **change})


@pytest.mark.parametrize("empty", ["entries", "shares", "radii"])
def test_a_page_of_nothing(certs, empty):
    arguments = {"entries": [Entry("x", certs[0])], "shares": (0.2,), "radii": (0.1,), empty: ()}
    with pytest.raises(ValueError, match="expected some of each"):
        page(arguments.pop("entries"), **arguments)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder that `certify` wrote, and the photographs."""
    folder = tmp_path_factory.mktemp("run")
    write_photos(folder / "photos", 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        fixed = ["--model", "_cli_models:tiny", "--samples", "512", "--batch-size", "8"]
        done = CliRunner().invoke(app, ["certify", "photos", *fixed])
        assert done.exit_code == 0, done.output
    return folder


@pytest.fixture
def folder(run, tmp_path, monkeypatch):
    shutil.copytree(run, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def report(*arguments):
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


MISSING = "The image was not found"


def test_command(folder):
    assert report("out", "--title", "Two", "--k", 0.1, "--k", 0.2, "--radius", 0.02).exit_code == 0
    html = Path("report.html").read_text()
    assert MISSING not in html
    assert html.count('<img src="data:image/png;base64,') == 4
    assert "<title>Two</title>" in html
    cert = Certificate.load("out/photo0.safetensors")
    held = data(html)
    assert held["shares"] == [0.1, 0.2]
    assert 0.02 in held["radii"]
    cosines = cert.cosine(held["radii"])[:, 0].tolist()
    assert held["certificates"][0]["cosines"] == cosines
    assert f"<td>{rounding.rounded_cosine(float(cert.cosine(0.02)))}</td>" in html


def test_images_are_shown_only_if_they_are_the_certified_ones(folder):
    shutil.copy("photos/photo1.png", "photos/photo0.png")
    assert report("out").exit_code == 0
    html = Path("report.html").read_text()
    assert html.count(MISSING) == 1
    assert html.count('<img src="data:image/png;base64,') == 3
    # Beside the certificate will do; so will a model that brings the preprocess.
    shutil.move("photos/photo1.png", "out/photo1.copy")
    shutil.rmtree("photos")
    assert report("out").exit_code == 0
    assert Path("report.html").read_text().count(MISSING) == 2
    Path("nested").mkdir()
    for name in ("manifest.json", "photo1.safetensors"):
        shutil.copy(f"out/{name}", "nested")
    shutil.move("out/photo1.copy", "nested/photo1.png")
    assert report("nested", "--model", "_cli_models:tiny").exit_code == 0
    assert MISSING not in Path("report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "nothing: no such file"),
        (["out", "--k", 0], "k: got 0"),
        (["out", "--size", 8], "size: got one without --model"),
        (["out", "--out", "no/such.html"], "no/"),
        (["damaged.safetensors"], "damaged.safetensors"),
    ],
)
def test_bad_usage(folder, arguments, message):
    Path("damaged.safetensors").write_bytes(Path("out/photo0.safetensors").read_bytes()[:-1])
    result = report(*arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert not Path("report.html").exists()


def test_what_cannot_be_shown_is_named_and_the_rest_is_shown(folder):
    """A damaged file, one that its table contradicts, one with settings that no reader expects, and a good one."""
    table = Path("out/certificates.tsv")
    lines = [line.split("\t") for line in table.read_text().splitlines()]
    lines[1][lines[0].index("overlap@0.01")] = "1.0"
    table.write_text("\n".join(map("\t".join, lines)) + "\n")
    Path("out/damaged.safetensors").write_bytes(Path("out/photo0.safetensors").read_bytes()[:-1])
    tensors, settings = files.load("out/photo1.safetensors")
    files.save("out/strange.safetensors", tensors, {**settings, "tau": "x"})
    result = report("out")
    assert result.exit_code == 1, result.output
    html = Path("report.html").read_text()
    assert len(re.findall("<article", html)) == 1
    for name, reason in (
        ("photo0", "certificates.tsv says overlap@0.01 1.0"),
        ("damaged", "damaged"),
        ("strange", "tau"),
    ):
        (line,) = (line for line in result.stderr.splitlines() if f"{name}.safetensors" in line)
        assert reason in line
        assert f"Left out: out/{name}.safetensors" in html


def test_sizes_as_numbers_of_elements(folder):
    assert report("out", "--k", 50, "--k", 0.1).exit_code == 0
    html = Path("report.html").read_text()
    held = data(html)
    assert held["labels"] == ["10 %", "50"]
    assert [one["k"] for one in held["certificates"][0]["sets"]] == [36, 50]
    assert ">50 elements<" in html
    result = report("out", "--k", 181)
    assert result.exit_code == 2
    assert "k: got 181 of the 360 elements" in result.stderr


@pytest.fixture(scope="module")
def browser():
    if _chromium.EXECUTABLE is None:
        pytest.skip("no chromium, chromium-browser or google-chrome is installed to open the report with")
    with _chromium.Browser() as opened:
        yield opened


@pytest.fixture
def shown(browser, html, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(html)
    browser.requests.clear()
    browser.errors.clear()
    browser.open(path)
    return browser, path, data(html)


def state(browser, index=0):
    return json.loads(browser.run(f"JSON.stringify(document.getElementById('c{index}').dataset)"))


def expected(held, index, step, choice):
    of_share = held["certificates"][index]["sets"][choice]
    codes = np.frombuffer(base64.b64decode(of_share["steps"]), np.uint8).astype(int)
    count, k = of_share["counts"][0][step], of_share["k"]
    return {
        "overlap": str(count),
        "size": str(k),
        "share": rounding.percent(count / k),
        "inside": str(of_share["inside"][step]),
        "outside": str(of_share["outside"][step]),
        "shownIn": str(((codes < 128) & (step < codes)).sum()),
        "shownOut": str(((codes > 128) & (step < codes - 128)).sum()),
    }


def test_opens_without_network_or_error(shown):
    browser, path, _ = shown
    assert browser.run("document.querySelectorAll('article').length") == 3
    assert browser.errors == []
    assert {request.partition(",")[0] for request in browser.requests} <= {path.as_uri(), "data:image/png;base64"}
    images = "[...document.images].map((image) => image.naturalWidth)"
    assert browser.run(images) == [10, 10, 10, 80]
    blocked = "fetch('http://127.0.0.1:9/').then(() => 'reached', () => 'blocked')"
    answer = browser.call("Runtime.evaluate", expression=blocked, awaitPromise=True)
    assert answer["result"]["value"] == "blocked"
    assert any("Content Security Policy" in error for error in browser.errors)


@pytest.mark.parametrize("choice", range(len(SHARES)))
@pytest.mark.parametrize("radius", RADII)
def test_address(shown, radius, choice):
    browser, path, held = shown
    browser.open(path, f"#radius={radius}&k={SHARES[choice]}")
    step = held["radii"].index(radius)
    assert browser.run("document.documentElement.dataset.radius") == f"{radius:g}"
    for index in range(3):
        assert state(browser, index) == expected(held, index, step, choice)
    found = state(browser)
    reading = browser.run("document.querySelector('#c0 [data-role=reading]').textContent")
    assert f"at least {found['share']} of the top" in reading
    assert f"({found['overlap']} of {found['size']} elements)" in reading


def test_keyboard_moves_the_sliders_and_the_set_shrinks(shown):
    browser, path, held = shown
    browser.open(path, "#radius=0&k=0.5")
    seen = [state(browser)]
    assert int(seen[0]["shownIn"]) > 0
    assert int(seen[0]["shownOut"]) > 0
    browser.run("document.getElementById('radius').focus()")
    for step in range(1, 6):
        browser.press("ArrowRight", 39)
        seen.append(state(browser))
        assert seen[-1] == expected(held, 0, step, 3)
    for name in ("overlap", "shownIn", "shownOut", "inside", "outside"):
        values = [int(found[name]) for found in seen]
        assert values == sorted(values, reverse=True)
        assert values[-1] < values[0]
    browser.run("document.getElementById('k').focus()")
    browser.press("ArrowLeft", 37)
    assert state(browser) == expected(held, 0, 5, 2)
    assert browser.run("document.getElementById('k').getAttribute('aria-valuetext')") == "20 %"


def test_canvas_shows_the_set(shown):
    """Pixels are counted by their colour, from what the canvas holds."""
    browser, path, held = shown
    browser.open(path, "#radius=0.01&k=0.2")
    pixels = np.array(
        browser.run("[...document.querySelector('#c0 canvas').getContext('2d').getImageData(0, 0, 10, 8).data]")
    ).reshape(80, 4)
    red, green, blue = pixels[:, :3].T
    step = held["radii"].index(0.01)
    wanted = expected(held, 0, step, 2)
    assert (red > blue + 20).sum() == int(wanted["shownIn"]) > 0
    assert (blue > green + 20).sum() == int(wanted["shownOut"]) > 0


def test_curves_never_exceed_what_is_certified(shown):
    browser, path, held = shown
    browser.open(path, "#radius=0&k=0.2")
    drawn = browser.run("document.querySelector('#c0 path[data-method=\"0\"]').getAttribute('d')")
    of_share = held["certificates"][0]["sets"][2]
    last = len(held["radii"]) - 1
    xs, ys = [], []
    for letter, values in re.findall(r"([MVH])([\d. ]+)", drawn):
        numbers = [float(value) for value in values.split()]
        xs.append(numbers[0] if letter != "V" else xs[-1])
        ys.append(numbers[-1] if letter != "H" else ys[-1])
    steps = (np.array(xs) - 44) / (452 - 44) * last
    shares = (256 - np.array(ys)) / (256 - 12)
    certified = np.array(of_share["counts"][0]) / of_share["k"]
    # Between two steps the certified value is at least that of the next.
    for step, share in zip(steps, shares, strict=True):
        assert share <= certified[min(last, math.floor(step + 1e-2))] + 1e-4
    assert len(steps) == 2 * last + 1
