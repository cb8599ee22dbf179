"""Makes two small runs with their statistics and pages, and starts a real headless Chromium to open them in."""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from batchjob.__main__ import main
from batchjob.report import write_report

TINY = ["--model", "vit_tiny_patch16_224", "--weights", "random", "--image-size", "64", "--k", "3"]
CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
DRIVER = shutil.which("chromedriver") or ""
EVIL = "<script>alert(1)</script>.jpg"
# fmt: off
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]
# fmt: on


def make_data(root: Path) -> Path:
    """Makes a COCO root of nine photos, each with two squares of one category; one has a hostile name, one is cut off.

    photo-0.jpg also has a crowd and an object too small for any patch.
    """
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
    small, crowd = ([110, 80, 112, 80, 112, 82, 110, 82], [0, 0, 120, 0, 120, 20, 0, 20])
    for is_crowd, outline in enumerate((small, crowd)):
        one = {"id": len(annotations), "image_id": 0, "category_id": 1, "iscrowd": is_crowd, "segmentation": [outline]}
        annotations.append(one | {"area": 4, "bbox": [0, 0, 4, 4]})
    (folder / "cut.jpg").write_bytes((folder / "photo-0.jpg").read_bytes()[:900])
    (root / "annotations").mkdir()
    known = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "square"}]}
    (root / "annotations" / "instances_val2017.json").write_text(json.dumps(known))
    return root


def command(*words: object) -> None:
    """Runs a command in this process, which has imported torch."""
    assert main([str(word) for word in words]) == 0


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Makes two runs of the same photos with statistics: one of two layers with kept maps, and an untrained one."""
    home = tmp_path_factory.mktemp("report")
    data = make_data(home / "data")
    made = [home / "first", home / "second"]
    often = ["--max-failures", "0.5", "--workers", "0"]
    command("run", data, made[0], *TINY, "--layers", "10,11", "--keep-maps", "3", "--scores", "attention,pairs", *often)
    command("run", data, made[1], *TINY, "--seed", "1", *often)
    command("stats", *made)
    return made


@pytest.fixture(scope="session")
def page(runs: list[Path]) -> Path:
    """Writes the page of the first run."""
    return write_report(runs[:1]).rename(runs[0] / "page.html")


@pytest.fixture(scope="session")
def both_runs(runs: list[Path]) -> Path:
    """Writes the page of both runs."""
    return write_report(runs).rename(runs[0] / "both.html")


@pytest.fixture(scope="session")
def codebook_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes the page of a small run in dataset scope, with its statistics."""
    home = tmp_path_factory.mktemp("codebook")
    flags = ["--scope", "dataset", "--k", "6", "--max-failures", "0.5", "--workers", "0"]
    command("run", make_data(home / "data"), home / "run", *TINY, *flags)
    command("stats", home / "run")
    return write_report([home / "run"])


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Starts a browser. Without Debian's Chromium, the tests that need it are counted as not run."""
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


def until(test: Callable[[], Any], what: str, *, seconds: float = 120) -> Any:
    """Returns the result of `test` as soon as it is true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := test():
            return found
        time.sleep(0.05)
    raise AssertionError(f"after {seconds} s still not: {what}")


def open_page(driver: Any, path: Path, *, width: int = 1440, scheme: str = "light", part: str = "") -> float:
    """Opens the page at `part` of its address, at a width and in a colour scheme; returns the seconds it took."""
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    for kind in ("browser", "performance"):
        driver.get_log(kind)  # messages of earlier pages
    start = time.monotonic()
    driver.get("about:blank")  # a page that is open already would not be loaded again
    driver.get(path.as_uri() + (f"#{part}" if part else ""))
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
