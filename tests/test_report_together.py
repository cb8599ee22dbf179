"""The report's views together, in a real Chromium: objects, address, table, map and browser, and two runs."""

import csv
import io
from pathlib import Path
from typing import Any

import pytest

from tests.pages import browse, open_page, pixels_of, until

pytestmark = pytest.mark.browser
LOOKS = [(390, "light"), (390, "dark"), (1400, "light"), (1400, "dark")]
SHOWN = """
  const value = key => Number(document.querySelector(`.panel select[data-key=${key}]`).value);
  const panel = page.runs[0];
  return [panel.layers[value('layer')], panel.heads[value('head')], document.body.dataset.shown];"""
CAPTION = "return document.querySelector('canvas[data-view=row]').parentElement.querySelector('figcaption').textContent"
CLICK = "document.querySelector(arguments[0]).click()"


def shown(driver: Any) -> list[Any]:
    return list(driver.execute_script(SHOWN))


def address(driver: Any) -> str:
    return str(driver.execute_script("return location.hash"))


@pytest.mark.parametrize(("width", "scheme"), LOOKS)
def test_the_page_opens_on_the_chosen_head_with_its_attention_rows(
    chromium: Any, page: Path, width: int, scheme: str
) -> None:
    open_page(chromium, page, width=width, scheme=scheme)
    browse(chromium)
    until(lambda: "Attention of the patch" in chromium.execute_script(CAPTION), "the first view's attention row")
    starts = chromium.execute_script("return page.start.places[0]")
    layers, heads = chromium.execute_script("return [page.runs[0].layers, page.runs[0].heads]")
    assert shown(chromium)[:2] == [layers[starts[0]], heads[starts[1]]]


@pytest.mark.parametrize(("width", "scheme"), LOOKS)
def test_the_address_holds_what_is_shown_and_shows_it_again(chromium: Any, page: Path, width: int, scheme: str) -> None:
    open_page(chromium, page, width=width, scheme=scheme, part="layer=10&head=2&image=val2017%2Fphoto-3.jpg&patch=1,2")
    until(lambda: chromium.execute_script("return document.body.dataset.shown"), "an image")
    assert shown(chromium) == [10, 2, "val2017/photo-3.jpg"]
    until(lambda: "row 1, column 2" in pixels_label(chromium), "the patch of the address")
    chromium.execute_script(CLICK, "#next")
    until(lambda: shown(chromium)[2] == "val2017/photo-5.jpg", "the next image")
    before, label = shown(chromium), address(chromium)
    assert "photo-5" in label
    open_page(chromium, page, width=width, scheme=scheme, part=label.removeprefix("#"))
    until(lambda: chromium.execute_script("return document.body.dataset.shown"), "an image")
    assert shown(chromium) == before
    assert chromium.get_log("browser") == []


def pixels_label(driver: Any) -> str:
    return str(
        driver.execute_script("return document.querySelector('canvas[data-view=row]').getAttribute('aria-label')")
    )


@pytest.mark.parametrize(("width", "scheme"), LOOKS)
def test_a_row_of_the_table_leads_to_its_head_and_back(chromium: Any, page: Path, width: int, scheme: str) -> None:
    open_page(chromium, page, width=width, scheme=scheme)
    browse(chromium)
    wanted = "#table tr[data-find='kmeans layer 10 head 1'] a"
    chromium.execute_script(f'document.querySelector("{wanted}").click()')
    until(lambda: shown(chromium)[:2] == [10, 1], "the row's head")
    box = "document.getElementById(arguments[0]).getBoundingClientRect()"
    at = f"const box = {box}; return box.top < 300 && box.bottom > 0"
    until(lambda: chromium.execute_script(at, "images"), "the browser in view")
    chromium.execute_script(CLICK, ".row-of")
    assert chromium.execute_script("return document.querySelector('tr.flash').dataset.find") == "kmeans layer 10 head 1"
    chromium.back()
    until(lambda: "layer=10" not in address(chromium), "the address before")


@pytest.mark.parametrize(("width", "scheme"), LOOKS)
def test_a_tile_of_layers_by_heads_leads_to_its_head(chromium: Any, page: Path, width: int, scheme: str) -> None:
    open_page(chromium, page, width=width, scheme=scheme)
    browse(chromium)
    rows = "return [...document.querySelectorAll('.headmap tbody tr')].map(r => r.cells[0].textContent)"
    assert chromium.execute_script(rows) == ["10", "11"]  # the first layer on top
    chromium.execute_script(CLICK, ".headmap tbody tr:nth-child(2) td:nth-child(4) a")
    until(lambda: shown(chromium)[:2] == [11, 2], "the tile's head")
    assert chromium.execute_script("return document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize(("width", "scheme"), LOOKS)
def test_objects_are_outlined_in_the_browser_until_they_are_switched_off(
    chromium: Any, page: Path, width: int, scheme: str
) -> None:
    open_page(chromium, page, width=width, scheme=scheme, part="image=val2017%2Fphoto-2.jpg&patch=3,3")
    until(lambda: chromium.execute_script("return document.body.dataset.shown"), "an image")
    key = "return document.querySelector('.key').textContent"
    assert chromium.execute_script(key) == "square 2"
    edge = """
      const canvas = document.querySelector('canvas[data-view=photo]'), x = 8 / 128 * canvas.width;
      const y = Math.round(50 / 96 * canvas.height);
      const data = canvas.getContext('2d').getImageData(Math.round(x) - 1, y, 3, 1).data;
      const colour = page.categories.square.match(/[0-9a-f]{2}/g).map(v => parseInt(v, 16));
      return Math.min(...[0, 1, 2].map(i => Math.max(...colour.map((v, c) => Math.abs(v - data[4 * i + c])))));"""
    assert chromium.execute_script(edge) < 40
    with_objects = [pixels_of(chromium, view) for view in ("photo", "clusters", "heat")]
    chromium.execute_script(CLICK, "#objects")
    until(lambda: pixels_of(chromium, "photo") != with_objects[0], "the photo without objects")
    assert chromium.execute_script(edge) > 40
    without = [pixels_of(chromium, view) for view in ("photo", "clusters", "heat")]
    assert all(a != b for a, b in zip(with_objects, without, strict=True))
    assert "objects=0" in address(chromium)


@pytest.mark.parametrize(("width", "scheme"), LOOKS)
def test_the_table_shows_chosen_columns_and_is_copied_as_csv(
    chromium: Any, page: Path, width: int, scheme: str
) -> None:
    open_page(chromium, page, width=width, scheme=scheme)
    if width == 1400:
        fits = "const t = document.getElementById('table'); return [t.scrollWidth, t.parentElement.clientWidth]"
        wide, room = chromium.execute_script(fits)
        assert wide <= room
    names = "return [...document.querySelectorAll('#table th:not([hidden])')].map(h => h.textContent.trim())"
    few = chromium.execute_script(names)
    assert "Gain" in few
    assert "Over position" in few
    assert "Algorithm" not in few  # there is one
    chromium.execute_script(CLICK, "#filters [data-column='0']")
    assert chromium.execute_script(names) == ["Algorithm", *few]
    text = chromium.execute_script("document.getElementById('find').value = 'head 1';"
                                   "document.getElementById('find').dispatchEvent(new Event('input', {bubbles: true}));"
                                   "return csvOf(document.getElementById('table'))")  # fmt: skip
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [(row["Algorithm"], row["Head"]) for row in rows] == [("kmeans", "1")] * 2
    assert all(-1 <= float(row["Gain"]) <= 1 for row in rows)
    assert all(row["Gain interval"].startswith("[") for row in rows)
    # in one script, since the button says so for only 1.5 s
    read = "return document.getElementById('csv').textContent"
    assert chromium.execute_script(f"{CLICK}; {read}", "#csv") == "Copied"


def test_the_smallest_p_value_comes_first_at_the_first_click(chromium: Any, page: Path) -> None:
    open_page(chromium, page)
    read = """
      const c = [...document.querySelectorAll('#table th')].findIndex(h => h.textContent.trim() === 'p');
      document.querySelectorAll('#table th button')[c].click();
      return [...document.querySelectorAll('#table tbody tr')].map(r => Number(r.cells[c].dataset.sort));"""
    values = chromium.execute_script(read)
    assert values == sorted(values)
    assert chromium.execute_script(read) == sorted(values, reverse=True)


@pytest.mark.parametrize(("width", "scheme"), LOOKS)
def test_sections_are_folded_until_they_are_asked_for_or_printed(
    chromium: Any, page: Path, width: int, scheme: str
) -> None:
    open_page(chromium, page, width=width, scheme=scheme)
    opened = "return [...document.querySelectorAll('details.fold')].filter(d => d.open).map(d => d.parentElement.id)"
    assert chromium.execute_script(opened) == []
    chromium.execute_script(CLICK, "nav a[href='#timing']")
    until(lambda: chromium.execute_script(opened) == ["timing"], "the section of the link")
    chromium.execute_script("dispatchEvent(new Event('beforeprint'))")
    assert chromium.execute_script(opened) == ["figures", "failures", "timing", "plan"]
    pdf = chromium.execute_cdp_cmd("Page.printToPDF", {})["data"]
    assert len(pdf) > 10_000


@pytest.mark.parametrize(("width", "scheme"), LOOKS)
def test_two_runs_are_shown_side_by_side_image_by_image(
    chromium: Any, both_runs: Path, width: int, scheme: str
) -> None:
    open_page(chromium, both_runs, width=width, scheme=scheme)
    browse(chromium)
    tops = "return [...document.querySelectorAll('.panel')].map(p => Math.round(p.getBoundingClientRect().top))"
    first, second = chromium.execute_script(tops)
    assert (first == second) == (width == 1400)
    assert chromium.execute_script("return document.documentElement.scrollWidth") <= width
    told = until(lambda: chromium.execute_script("return document.getElementById('paired').textContent"), "both scores")
    a, b, gap = (float(word.replace("−", "-")) for word in told.replace(",", "").split() if word[-1].isdigit())
    assert gap == pytest.approx(a - b, abs=0.011)
    order = "const s = document.getElementById('order'); s.value = arguments[0]; s.dispatchEvent(new Event('change'))"
    gaps = []
    for name in ("ahead", "behind"):
        chromium.execute_script(order, name)
        gaps.append(chromium.execute_script("return browser.gapOf(page.images[browser.sequence[0]])"))
    assert gaps[0] > gaps[1]
    until(lambda: "order=behind" in address(chromium), "the order in the address")
    assert "layer2=11" in address(chromium)
    assert chromium.get_log("browser") == []


def test_the_patch_is_the_same_in_both_runs(chromium: Any, both_runs: Path) -> None:
    open_page(chromium, both_runs)
    browse(chromium)
    first, second = chromium.execute_script("return browser.panels.map(p => p.at)")
    assert first == second  # before any patch is pointed at
    chromium.execute_script("browser.panels[0].moveTo(2, 1)")
    assert chromium.execute_script("return browser.panels.map(p => p.at)") == [[2, 1], [2, 1]]
