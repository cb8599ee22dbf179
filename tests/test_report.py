"""The report in a real headless Chromium: it works from disk, without a network, for all names, widths and themes."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from batchjob.errors import UserError
from batchjob.figures import Look, write_figures
from batchjob.figures.photos import open_run, photo_of
from batchjob.report import browser as packing
from batchjob.report import codebook, facts, write_report
from batchjob.report import page as report_page
from batchjob.store.run import Run
from tests.conftest import ROOT, TINY
from tests.runs import plan_what_is_there

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
DRIVER = shutil.which("chromedriver") or ""
EVIL = "<script>alert(1)</script>.jpg"
OPENS_WITHIN_S = 2.0
# fmt: off
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]
# fmt: on


def make_data(root: Path) -> Path:
    """A COCO root of nine photos: two squares of one category each, one with an evil name, one cut off."""
    rng = np.random.default_rng(3)
    images, annotations = [], []
    folder = root / "val2017"
    for i in range(9):
        path = folder / (EVIL if i == 4 else f"photo-{i}.jpg")
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 90, (96, 128, 3), np.uint8)
        images.append({"id": i, "file_name": str(path.relative_to(folder)), "height": 96, "width": 128})
        for x in (8, 72):
            pixels[30:70, x : x + 44] = rng.integers(150, 255, 3)
            box = [x, 30, 44, 40]
            outline = [x, 30, x + 44, 30, x + 44, 70, x, 70]
            annotations.append({"id": len(annotations), "image_id": i, "category_id": 1, "iscrowd": 0, "bbox": box})
            annotations[-1] |= {"segmentation": [outline], "area": 44 * 40}
        Image.fromarray(pixels).save(path, quality=90)
    (folder / "cut.jpg").write_bytes((folder / "photo-0.jpg").read_bytes()[:900])
    (root / "annotations").mkdir()
    known = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "square"}]}
    (root / "annotations" / "instances_val2017.json").write_text(json.dumps(known))
    return root


def command(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "batchjob", *map(str, words)], cwd=ROOT, check=True, timeout=300)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two small runs of the same photos with their statistics: two layers with kept maps, and an untrained one."""
    home = tmp_path_factory.mktemp("report")
    data = make_data(home / "data")
    made = [home / "first", home / "second"]
    often = ["--max-failures", "0.5", "--workers", "0"]
    command("run", data, made[0], *TINY, "--layers", "10,11", "--keep-maps", "3", "--scores", "attention,pairs", *often)
    command("run", data, made[1], *TINY, "--seed", "1", *often)
    command("stats", *made)
    return made


@pytest.fixture(scope="module")
def page(runs: list[Path]) -> Path:
    return write_report(runs[:1])


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A browser of its own; the tests that need it are counted as not run where Debian's Chromium is missing."""
    if not (CHROMIUM and DRIVER):
        pytest.skip("not run: no Chromium here; Debian has it: apt-get install chromium chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def until(test: Callable[[], Any], what: str, *, seconds: float = 15) -> Any:
    """What `test` gives as soon as it is true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := test():
            return found
        time.sleep(0.05)
    raise AssertionError(f"after {seconds} s still not: {what}")


def open_page(driver: Any, path: Path, *, width: int = 1440, scheme: str = "light") -> float:
    """Opens the page at a width and in a colour scheme; the seconds it took to load."""
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    for kind in ("browser", "performance"):
        driver.get_log(kind)  # what came before
    start = time.monotonic()
    driver.get(path.as_uri())
    return time.monotonic() - start


def browse(driver: Any) -> None:
    """Scrolls to the image browser and waits for its first picture."""
    driver.execute_script("document.getElementById('images').scrollIntoView()")
    until(lambda: driver.execute_script("return document.body.dataset.shown"), "an image shown")


def pixels_of(driver: Any, view: str) -> str:
    return str(driver.execute_script(f"return document.querySelector('canvas[data-view={view}]').toDataURL()"))


def requests_of(driver: Any) -> list[str]:
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    sent = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    return [url for url in sent if not url.startswith("data:")]


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_opens_from_disk_without_network_errors_or_sideways_scrolling(
    chromium: Any, page: Path, width: int, scheme: str
) -> None:
    open_page(chromium, page, width=width, scheme=scheme)
    browse(chromium)
    assert chromium.execute_script("return document.documentElement.scrollWidth") <= width
    assert requests_of(chromium) == [page.as_uri()]
    assert chromium.get_log("browser") == []
    ground = chromium.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (int(ground.split("(")[1].split(",")[0]) < 100) == (scheme == "dark")


@pytest.mark.browser
def test_a_page_of_nearly_20_mb_opens_in_under_two_seconds(chromium: Any, page: Path, tmp_path: Path) -> None:
    text = page.read_text()
    blobs = "".join(f'<script type="text/plain" id="more-{i}">{"A" * 300_000}</script>' for i in range(60))
    large = tmp_path / "large.html"
    large.write_text(text.replace('<script type="text/plain"', blobs + '<script type="text/plain"', 1))
    assert large.stat().st_size > 18e6
    assert min(open_page(chromium, large) for _ in range(3)) < OPENS_WITHIN_S  # the least: others may use the machine


@pytest.mark.browser
def test_the_theme_button_goes_against_the_systems_scheme(chromium: Any, page: Path) -> None:
    open_page(chromium, page, scheme="light")
    chromium.execute_script("document.getElementById('theme').click()")
    assert chromium.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(16, 18, 22)"


@pytest.mark.browser
def test_the_table_sorts_by_a_click_and_filters_by_words_and_layers(chromium: Any, page: Path) -> None:
    open_page(chromium, page)
    column = "const c = [...document.querySelectorAll('#table th')].findIndex(h => h.textContent.trim() === 'Head');"
    click = f"{column} document.querySelectorAll('#table th button')[c].click();"
    read = (
        "return [...document.querySelectorAll('#table tbody tr:not([hidden])')].map(r => r.cells[c].textContent.trim())"
    )
    down = chromium.execute_script(f"{click} {read}")
    up = chromium.execute_script(f"{click} {read}")
    assert down == ["2", "2", "1", "1", "0", "0"]
    assert up == down[::-1]
    field = chromium.find_element("id", "find")
    field.send_keys("head 1")
    assert chromium.execute_script(f"{column} {read}") == ["1", "1"]
    assert "2 of 6" in chromium.find_element("id", "count").text
    chromium.execute_script(
        "const s = document.querySelector('#filters select[data-key=layer]'); s.value = '11';"
        "s.dispatchEvent(new Event('input', {bubbles: true}))"
    )
    assert chromium.execute_script(f"{column} {read}") == ["1"]


@pytest.mark.browser
def test_hovering_a_patch_shows_its_attention_row_over_the_photo(chromium: Any, page: Path) -> None:
    open_page(chromium, page)
    browse(chromium)
    caption = (
        "return document.querySelector('canvas[data-view=row]').parentElement.querySelector('figcaption').textContent"
    )
    until(lambda: "Attention of the patch" in chromium.execute_script(caption), "a kept image's row")
    point = """
      const canvas = document.querySelector('canvas[data-view=clusters]'), box = canvas.getBoundingClientRect();
      canvas.dispatchEvent(new PointerEvent('pointermove', {clientX: box.left + box.width * arguments[0],
        clientY: box.top + box.height * arguments[1], bubbles: true}));"""
    chromium.execute_script(point, 0.05, 0.05)
    first = pixels_of(chromium, "row")
    assert "row 0, column 0" in chromium.execute_script(caption)
    chromium.execute_script(point, 0.95, 0.95)
    assert "row 3, column 3" in chromium.execute_script(caption)
    assert pixels_of(chromium, "row") != first


@pytest.mark.browser
def test_the_browser_goes_through_images_layers_heads_and_orders_by_keyboard_too(chromium: Any, page: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    open_page(chromium, page)
    browse(chromium)
    shown = "return document.body.dataset.shown"
    first, before = chromium.execute_script(shown), pixels_of(chromium, "clusters")
    canvas = chromium.find_element("css selector", "canvas[data-view=clusters]")
    canvas.send_keys("n")
    until(lambda: chromium.execute_script(shown) != first, "the next image")
    canvas.send_keys("p")
    until(lambda: pixels_of(chromium, "clusters") == before, "the first image again")
    canvas.send_keys(Keys.ARROW_UP * 4 + Keys.ARROW_LEFT * 4)
    before = pixels_of(chromium, "clusters")
    canvas.send_keys(Keys.ARROW_DOWN)
    assert pixels_of(chromium, "clusters") != before
    caption = "return document.querySelector('canvas[data-view=heat]').parentElement.textContent"
    for key in ("head", "layer"):
        told = chromium.execute_script(caption)
        select = f"const s = document.querySelector('.panel select[data-key={key}]');"
        chromium.execute_script(f"{select} s.value = s.value === '0' ? '1' : '0'; s.dispatchEvent(new Event('change'))")
        until(lambda told=told: chromium.execute_script(caption) != told, f"another {key}")
    tops = []
    top = "return document.querySelector('#image option').textContent.split(' · ')[1].replace('−', '-')"
    for order in ("best", "worst"):
        chromium.execute_script(
            f"const s = document.getElementById('order'); s.value = '{order}'; s.dispatchEvent(new Event('change'))"
        )
        tops.append(float(chromium.execute_script(top)))
    assert tops[0] > tops[1]
    assert chromium.get_log("browser") == []


@pytest.mark.browser
def test_names_from_the_data_are_text_and_run_nothing(chromium: Any, page: Path) -> None:
    open_page(chromium, page)
    browse(chromium)
    options = chromium.execute_script("return [...document.querySelectorAll('#image option')].map(o => o.textContent)")
    assert any(EVIL in text for text in options)
    assert f"val2017/{EVIL}" in chromium.execute_script(
        "return JSON.parse(document.getElementById('data').textContent).images.map(i => i.id)"
    )
    assert (
        chromium.execute_script("return [...document.scripts].filter(s => s.textContent.startsWith('alert')).length")
        == 0
    )


@pytest.mark.browser
def test_everything_that_can_be_used_has_a_name_and_pictures_have_texts(chromium: Any, page: Path) -> None:
    open_page(chromium, page)
    browse(chromium)
    nameless = """
      const nodes = [...document.querySelectorAll('button, select, input, canvas[tabindex]')];
      const named = n => n.textContent.trim() || n.getAttribute('aria-label')
        || n.closest('label')?.textContent.trim() || n.querySelector('img[alt]');
      return nodes.filter(n => !named(n)).map(n => n.outerHTML.slice(0, 80));"""
    assert chromium.execute_script(nameless) == []
    assert chromium.execute_script("return [...document.images].filter(i => !i.alt).length") == 0


@pytest.mark.browser
def test_two_runs_stand_side_by_side_with_their_paired_differences(chromium: Any, runs: list[Path]) -> None:
    page = write_report(runs)
    open_page(chromium, page, width=390)
    browse(chromium)
    assert chromium.execute_script("return document.querySelectorAll('.panel').length") == 2
    assert chromium.execute_script("return document.documentElement.scrollWidth") <= 390
    assert chromium.get_log("browser") == []
    assert "Paired differences" in page.read_text()


@pytest.fixture(scope="module")
def codebook_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a small run in dataset scope, with its statistics."""
    home = tmp_path_factory.mktemp("codebook")
    flags = ["--scope", "dataset", "--k", "6", "--max-failures", "0.5", "--workers", "0"]
    command("run", make_data(home / "data"), home / "run", *TINY, *flags)
    command("stats", home / "run")
    return write_report([home / "run"])


def test_a_codebook_has_a_section_of_its_own_with_a_line_for_every_cluster(codebook_page: Path, page: Path) -> None:
    text, run = codebook_page.read_text(), codebook_page.parent
    section = text.split('<section id="codebook">')[1].split("</section>")[0]
    assert section.count("data:image/webp") == section.count("<details") == 3  # heads
    assert section.count("<tr data-find") == 3 * 6
    for column in ("Prevalence", "Images", "Best category", "Lift", "Mean x", "Mean y"):
        assert section.count(f">{column}</button>") == 3
    assert '<section id="codebook">' not in page.read_text()
    assert 'href="#codebook"' not in page.read_text()
    view = open_run(run)
    clusters = codebook.clusters_of(view, 11, 1).set_index("cluster")
    labels = view.data["labels"].values[view.ok_rows, 0, 0, 1]
    for number in range(6):
        assert clusters.loc[number, "share"] == pytest.approx((labels == number).mean())
        y, x = np.nonzero((labels == number).any(0))
        counts = (labels == number).sum(0)[y, x]
        assert clusters.loc[number, "x"] == pytest.approx(np.average((x + 0.5) / 4, weights=counts))
        assert clusters.loc[number, "y"] == pytest.approx(np.average((y + 0.5) / 4, weights=counts))


def test_what_was_left_out_of_the_annotations_stands_on_the_page(codebook_page: Path, tmp_path: Path) -> None:
    shutil.copytree(codebook_page.parent, tmp_path / "run")
    counts = tmp_path / "run" / "stats" / "counts.json"
    counts.write_text(json.dumps({"images": 3, "left out: a size of 4x4": 2}))
    rows = facts.gather(Run.checked(tmp_path / "run", stats=False)).rows
    assert ("Left out", "2 annotations left out: a size of 4x4") in rows


def test_a_codebook_without_statistics_shows_how_common_clusters_are_and_how_to_get_the_rest(
    codebook_page: Path, tmp_path: Path
) -> None:
    shutil.copytree(codebook_page.parent, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "stats")
    (tmp_path / "run" / "done" / "stats.json").unlink()
    view = open_run(tmp_path / "run")
    clusters = codebook.clusters_of(view, 11, 1)
    assert clusters["share"].sum() == pytest.approx(1)
    assert [c.name for c in codebook.table_of(clusters, "").columns] == ["Cluster", "Prevalence"]
    assert f"batchjob stats {tmp_path / 'run'}" in codebook.note(view, 11)


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_codebooks_tables_sort_and_fit_the_page(
    chromium: Any, codebook_page: Path, width: int, scheme: str
) -> None:
    open_page(chromium, codebook_page, width=width, scheme=scheme)
    chromium.execute_script("document.getElementById('codebook').scrollIntoView()")
    assert chromium.execute_script("return document.documentElement.scrollWidth") <= width
    rows = "[...document.querySelectorAll('#codebook details[open] tbody tr')]"
    read = f"return {rows}.map(r => r.cells[%d].textContent.trim())"
    click = "document.querySelectorAll('#codebook details[open] th button')[%d].click()"
    common = chromium.execute_script(read % 1)
    assert len(common) == 6
    assert common == sorted(common, key=lambda text: -float(text.removesuffix(" %")))
    chromium.execute_script(click % 0)
    assert chromium.execute_script(read % 0) == list("543210")
    chromium.execute_script(click % 0)
    assert chromium.execute_script(read % 0) == list("012345")
    assert chromium.get_log("browser") == []


def test_every_kind_of_figure_is_written_for_runs_that_hold_it(runs: list[Path]) -> None:
    look = Look(images="best", count=2, heads_across=2, query=(1, 2), formats=("svg",))
    names = {path.name.split("-layer")[0] for path in write_figures(runs, look)}
    assert {"grid", "masks", "layers-cls.svg", "layers-query.svg", "models.svg"} <= names
    assert {f"stats-{kind}.svg" for kind in ("forest", "gain", "corners", "distance", "instances")} <= names
    assert len(list((runs[0] / "figures").glob("grid-layer-*-heads-*.svg"))) == 2


@pytest.mark.parametrize(
    ("look", "told"),
    [
        (Look(head=9), "--head 9 is not in"),
        (Look(layer=3), "--layer 3 is not in"),
        (Look(images="nothing.jpg"), "image 'nothing.jpg' is not in"),
        (Look(query=(40, 0)), "outside the grid of 4×4"),
    ],
)
def test_what_a_run_does_not_have_is_refused_in_a_line(runs: list[Path], look: Look, told: str) -> None:
    with pytest.raises(UserError, match=told):
        write_figures(runs[0], look)


def test_a_photo_that_is_gone_is_grey_and_the_rest_of_the_page_stays(runs: list[Path], tmp_path: Path) -> None:
    shutil.copytree(runs[0], tmp_path / "run")
    index = json.loads((tmp_path / "run" / "index" / "index.json").read_text())
    (tmp_path / "run" / "index" / "index.json").write_text(json.dumps(index | {"root": str(tmp_path / "gone")}))
    plan_what_is_there(tmp_path / "run")
    view = open_run(tmp_path / "run")
    photo = photo_of(view, int(view.ok_rows[0]))
    assert not photo.found
    assert len(np.unique(photo.pixels)) == 1


def test_a_failed_image_is_told_by_its_cause(page: Path) -> None:
    text = page.read_text()
    assert "val2017/cut.jpg" in text
    assert "truncated" in text


def test_a_page_of_very_many_images_carries_a_sample_and_says_so(
    runs: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "MAX_IMAGES", 4)
    monkeypatch.setattr(report_page, "pictures", lambda views: [])
    assert "A sample of 4 of 9 labelled images" in report_page.render([open_run(runs[0])])


def test_the_browsers_data_stop_at_their_limits_whatever_the_run_holds(
    runs: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    view = open_run(runs[0])
    everything = packing.pack([view], view.ok_rows.tolist(), [None])
    assert len(everything.json["images"]) == 9
    assert sum(len(image["runs"][0]["rows"]) for image in everything.json["images"]) == 3 * 2 * 3
    monkeypatch.setattr(packing, "IMAGES_BYTES", everything.size // 3)
    monkeypatch.setattr(packing, "ROWS_BYTES", everything.rows_size // 3)
    less = packing.pack([view], view.ok_rows.tolist(), [None])
    assert 3 <= len(less.json["images"]) < 9
    assert 0 < sum(len(image["runs"][0]["rows"]) for image in less.json["images"]) < 18


def test_attention_of_fine_grids_is_averaged_over_cells() -> None:
    rows = np.arange(16 * 16, dtype=np.float32).reshape(16, 16)
    pooled = packing.pool(rows, (4, 4), 2)
    assert pooled.shape == (4, 4)
    corner = [0, 1, 4, 5]  # the patches of the upper left cell
    assert pooled[0, 0] == pytest.approx(rows[np.ix_(corner, corner)].mean())
    assert packing.pool(rows, (4, 4), 3).shape == (4, 4)  # two rows of two cells, the last ones smaller
