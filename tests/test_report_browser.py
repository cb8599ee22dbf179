"""The report in a real headless Chromium: it works from disk, without a network, for all names, widths and themes."""

from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest

from batchjob.figures.canvas import decimals
from batchjob.figures.look import scores_of_head
from batchjob.store.run import Run
from tests.pages import EVIL, browse, open_page, pixels_of, requests_of, until

OPENS_WITHIN_S = 15.0  # on a busy machine; an idle one takes less than a second


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
def test_a_page_of_nearly_20_mb_opens_soon_and_decodes_nothing_before_it_is_seen(
    chromium: Any, page: Path, tmp_path: Path
) -> None:
    text = page.read_text()
    blobs = "".join(f'<script type="text/plain" id="more-{i}">{"A" * 300_000}</script>' for i in range(60))
    large = tmp_path / "large.html"
    text = text.replace("<main", '<div style="height: 5000px"></div><main', 1)  # so that the browser is far below
    large.write_text(text.replace('<script type="text/plain"', blobs + '<script type="text/plain"', 1))
    assert large.stat().st_size > 18e6
    assert min(open_page(chromium, large) for _ in range(3)) < OPENS_WITHIN_S
    assert chromium.execute_script("return page === null")
    browse(chromium)
    assert not chromium.execute_script("return page === null")


@pytest.mark.browser
def test_the_theme_button_overrides_the_systems_scheme(chromium: Any, page: Path) -> None:
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
def test_images_that_chose_the_head_are_not_its_best_or_worst(chromium: Any, page: Path, runs: list[Path]) -> None:
    run = Run(runs[0])
    assert run.best is not None
    other = (run.best[0], next(head for head in run.heads if head != run.best[1]))
    extremes = "return [...document.querySelectorAll('#extremes button')].map(b => b.title)"
    note = "return [...document.querySelectorAll('#extremes p')].map(p => p.textContent)"
    order = "const s = document.getElementById('order'); s.value = arguments[0]; s.dispatchEvent(new Event('change'))"
    sequence = "return browser.sequence.map(i => page.images[i].id)"
    for layer, head in (run.best, other):
        known = scores_of_head(run, layer, head)
        scores, said = known.values, known.note
        assert scores is not None
        assert bool(said) == ((layer, head) == run.best)
        allowed = {run.ids[row] for row in run.ok_rows if np.isfinite(scores[row])}
        open_page(chromium, page, part=f"layer={layer}&head={head}")
        browse(chromium)
        found = chromium.execute_script(extremes)
        assert 2 <= len(found) <= len(allowed)
        assert set(found) <= allowed
        assert chromium.execute_script(note) == ([said] if said else [])
        told = "return document.getElementById('ordered').hidden ? '' : document.getElementById('ordered').textContent"
        assert chromium.execute_script(told) == ""
        chromium.execute_script(order, "best")
        assert set(chromium.execute_script(sequence)) == allowed
        assert chromium.execute_script(told) == said


@pytest.mark.browser
def test_an_image_of_the_address_is_shown_although_it_chose_the_head(
    chromium: Any, page: Path, runs: list[Path]
) -> None:
    run = Run(runs[0])
    assert run.best is not None
    scores = scores_of_head(run, *run.best).values
    assert scores is not None
    name = next(run.ids[row] for row in run.ok_rows if np.isnan(scores[row]) and run.ids[row].startswith("val2017/p"))
    layer, head = run.best
    open_page(chromium, page, part=f"layer={layer}&head={head}&order=best&image={quote(name, safe='')}")
    until(lambda: chromium.execute_script("return document.body.dataset.shown") == name, "the image of the address")
    assert chromium.execute_script("return document.getElementById('order').value") == "row"


@pytest.mark.browser
def test_the_page_rounds_as_the_figures_do(chromium: Any, page: Path) -> None:
    values = [-0.0045, -0.005, 0.00499, 0.005, 0.125, -0.125, 0.375, 0.625, 0.875, -0.004, 0.285, 1.0, 0.0]
    open_page(chromium, page)
    assert chromium.execute_script("return arguments[0].map(two)", values) == [decimals(value) for value in values]


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1000, 1400])
def test_no_card_of_a_best_or_worst_image_is_cut(chromium: Any, page: Path, width: int) -> None:
    open_page(chromium, page, width=width, part="layer=10&head=1")
    browse(chromium)
    boxes = """
      const strips = [...document.querySelectorAll('#extremes .strip, .panel .strip')];
      const edge = node => node.getBoundingClientRect();
      const whole = strips.filter(s => getComputedStyle(s).overflowX !== 'auto');
      return whole.map(s => [edge(s).right, ...[...s.children].map(c => edge(c).right)]);"""
    found = chromium.execute_script(boxes)
    assert len(found) >= 2
    for right, *cards in found:
        assert cards
        assert max(cards) <= right
    heights = "return [...document.querySelectorAll('#extremes canvas')].map(c => c.getBoundingClientRect().height)"
    until(lambda: chromium.execute_script(heights), "the pictures of the cards")
    assert set(chromium.execute_script(heights)) == {80 if width == 390 else 108}


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
def test_two_runs_have_a_view_each_and_their_paired_differences(chromium: Any, both_runs: Path) -> None:
    open_page(chromium, both_runs, width=390)
    browse(chromium)
    assert chromium.execute_script("return document.querySelectorAll('.panel').length") == 2
    assert "Paired differences" in both_runs.read_text()


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_codebooks_tables_sort_and_fit_the_page(
    chromium: Any, codebook_page: Path, width: int, scheme: str
) -> None:
    open_page(chromium, codebook_page, width=width, scheme=scheme)
    chromium.execute_script("document.querySelector('#codebook details').open = true")
    chromium.execute_script("document.getElementById('codebook').scrollIntoView()")
    assert chromium.execute_script("return document.documentElement.scrollWidth") <= width
    rows = "[...document.querySelectorAll('#codebook details.book[open] tbody tr')]"
    read = f"return {rows}.map(r => r.cells[%d].textContent.trim())"
    click = "document.querySelectorAll('#codebook details.book[open] th button')[%d].click()"
    common = chromium.execute_script(read % 1)
    assert len(common) == 6
    assert common == sorted(common, key=lambda text: -float(text.removesuffix(" %")))
    chromium.execute_script(click % 0)
    assert chromium.execute_script(read % 0) == list("543210")
    chromium.execute_script(click % 0)
    assert chromium.execute_script(read % 0) == list("012345")
    assert chromium.get_log("browser") == []
