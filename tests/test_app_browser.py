"""The app as people use it, in headless Chromium."""

from __future__ import annotations

import re
import time

import httpx
import pytest
from PIL import Image

from tessera.modalities.image import read_record, save_image
from tessera.modalities.metadata import make_record

expect = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed").expect


@pytest.fixture
def page(open_page):
    return open_page()


def prompt(page):
    return page.get_by_label("Prompt", exact=True)


def job(page, number=0):
    return page.locator("#stage .ts-job").nth(number)


def create(page, text, pictures=None):
    if pictures:
        page.locator("#count").get_by_label(str(pictures), exact=True).check()
    prompt(page).fill(text)
    prompt(page).press("Enter")


def toast(page):
    return page.get_by_test_id("toast-body")


def test_type_create_see_and_move_the_token_slider(page, server):
    create(page, "red ring")
    tiles = job(page).locator(".ts-tile")
    expect(tiles).to_have_count(4)
    view = job(page).locator(".ts-view")
    expect(view).to_be_visible()
    assert job(page).locator(".ts-tile img").first.get_attribute("alt") == "red ring, picture 1"
    expect(page.locator("#stage [role=status]")).to_have_text("Done: red ring")

    link = tiles.nth(1).locator("a")
    file = httpx.get(link.evaluate("link => link.href"))
    assert file.status_code == 200 and file.content[:4] == b"\x89PNG"
    assert link.get_attribute("download").endswith(".png")

    requests = []
    page.on("request", lambda request: requests.append(request.url))
    slider, picture = view.get_by_role("slider"), view.get_by_role("img")
    expect(slider).to_have_value("8")
    for length, shown in (("1", "1"), ("5", "4"), ("8", "8")):
        slider.fill(length)
        expect(picture).to_have_attribute("aria-label", f"red ring, from {shown} of 8 tokens")
        expect(view.locator(".ts-strip .off")).to_have_count(8 - int(length))
    view.get_by_role("button", name="Play").click()
    expect(picture).to_have_attribute("data-length", "3")
    view.get_by_role("button", name="Pause").click()
    assert requests == []


def test_an_empty_prompt_runs_the_example(page):
    page.get_by_role("button", name="Create").click()
    expect(prompt(page)).to_have_value("a red heart with an arrow")
    expect(job(page).locator(".ts-view")).to_be_visible()


def test_stop_keeps_the_partial_picture(page, server):
    server.hold_at = 3
    before = set(server.pictures)
    create(page, "blue square", pictures=1)
    expect(job(page).locator(".ts-meta")).to_have_text("Token 3 of 8")
    page.locator("#stop").click()
    expect(job(page).locator(".ts-meta")).to_have_text("Stopped at 4 of 8 tokens")
    expect(job(page).get_by_role("link")).to_be_visible()
    (path,) = set(server.pictures) - before
    assert read_record(path)["settings"]["num_tokens"] == 4
    expect(page.locator("#stop")).to_be_hidden()


def test_a_reload_finds_the_running_job_and_the_prompt(page, server):
    server.hold_at = 3
    create(page, "green triangle", pictures=1)
    expect(job(page).locator(".ts-meta")).to_have_text("Token 3 of 8")
    page.reload()
    expect(job(page).locator(".ts-meta")).to_have_text("Token 3 of 8")
    expect(prompt(page)).to_have_value("green triangle")
    server.hold_at = None
    expect(job(page).locator(".ts-view")).to_be_visible()


def test_three_jobs_wait_in_order_and_each_can_be_stopped(page, server):
    server.hold_at = 2
    for text in ("red ring", "blue ring", "green ring"):
        create(page, text, pictures=1)
        expect(page.locator("#stage .ts-prompt", has_text=text)).to_be_visible()
    expect(job(page, 0).locator(".ts-meta")).to_contain_text("2 before this")
    job(page, 1).get_by_role("button", name="Stop").click()
    expect(job(page, 1).locator(".ts-meta")).to_have_text("Stopped before it began")
    server.hold_at = None
    expect(job(page, 0).locator(".ts-view")).to_be_visible()
    expect(job(page, 2).locator(".ts-view")).to_be_visible()


def test_another_visitor_sees_none_of_it(open_page):
    create(open_page(), "red ring", pictures=1)
    other = open_page()
    expect(other.locator("#stage .ts-empty")).to_be_visible()


def test_a_dropped_picture_restores_its_settings(page, tmp_path):
    settings = {"style": "flat", "num_tokens": 6, "guidance_scale": 2.5}
    record = make_record("TextToImagePipeline", "tiny", "yellow ring", 1234, settings=settings)
    save_image(Image.new("RGB", (32, 32)), tmp_path / "ring.png", record)
    page.get_by_role("button", name="Settings from a picture").click()
    page.locator("#restore-picture input[type=file]").set_input_files(tmp_path / "ring.png")
    page.locator("#restore").get_by_role("button", name="Use all").click()
    expect(prompt(page)).to_have_value("yellow ring")
    expect(page.get_by_label("Seed")).to_have_value("1234")
    expect(page.locator("#style").get_by_label("flat")).to_be_checked()
    create(page, "yellow ring")
    expect(job(page).locator(".ts-seed")).to_have_text("seed 1234")
    expect(job(page).locator(".ts-meta")).to_contain_text("6 tokens")


def test_a_made_picture_gives_its_seed_back(page):
    create(page, "black square", pictures=4)
    expect(job(page).locator(".ts-view")).to_be_visible()
    job(page).get_by_label("Picture 3: black square").click()
    seed = job(page).locator(".ts-seed").nth(2).inner_text().removeprefix("seed ")
    job(page).get_by_role("button", name="Keep this seed").click()
    expect(page.get_by_label("Seed")).to_have_value(seed)


def test_bad_input_is_answered_in_one_sentence(page, tmp_path):
    page.get_by_label("Seed").fill("-5")
    create(page, "red ring")
    expect(toast(page)).to_contain_text("Seed must be a whole number from 0 to 4294967295, got -5.")
    expect(prompt(page)).to_have_value("red ring")
    page.get_by_label("Seed").fill("")
    create(page, "x" * 2001)
    expect(toast(page).last).to_contain_text("2,001 characters; at most 2,000 are read")
    expect(page.locator("#stage .ts-job")).to_have_count(0)

    (tmp_path / "text.png").write_text("not a picture")
    page.get_by_role("tab", name="Tokens").click()
    page.locator("#reconstruct-picture input[type=file]").set_input_files(tmp_path / "text.png")
    expect(toast(page).last).to_contain_text('Could not open "text.png"')
    (tmp_path / "large.png").write_bytes(bytes(1_200_000))
    page.locator("#reconstruct-picture input[type=file]").set_input_files(tmp_path / "large.png")
    expect(toast(page).last).to_contain_text(re.compile("size", re.IGNORECASE))
    assert "Traceback" not in page.locator("body").inner_text()


def test_a_long_prompt_is_marked(page):
    create(page, "red ring " * 40, pictures=1)
    expect(page.locator("#note")).to_contain_text("Prompt has 80 words; this model reads the first")
    expect(job(page).locator(".ts-warning")).to_contain_text("Not read:")


def test_reconstructions_of_a_dropped_picture(page, tmp_path):
    Image.new("RGB", (60, 40), "teal").save(tmp_path / "teal.png")
    page.get_by_role("tab", name="Tokens").click()
    page.locator("#reconstruct-picture input[type=file]").set_input_files(tmp_path / "teal.png")
    frames = page.locator("#reconstructions .ts-frame")
    expect(frames).to_have_count(6)
    expect(frames.nth(5)).to_contain_text(re.compile(r"16 tokens.* dB · 0\.1406 bpp", re.DOTALL))
    view = page.locator("#reconstructions .ts-view")
    view.get_by_role("slider").fill("4")
    expect(view.locator("output")).to_contain_text(re.compile(r"^4 of 16 tokens · [\d.-]+ dB$"))


def test_library_filters_deletes_and_takes_back(page, server):
    create(page, "yellow triangle", pictures=1)
    expect(job(page).locator(".ts-view")).to_be_visible()
    page.get_by_role("tab", name="Library").click()
    shelf = page.locator("#shelf .ts-thumb")
    expect(shelf.first).to_be_visible()
    page.locator("#filter").locator("textarea, input").fill("yellow triangle")
    expect(shelf).to_have_count(1)
    name = shelf.first.get_attribute("title")
    shelf.first.click()
    expect(page.locator("#details-table")).to_contain_text("yellow triangle")
    page.locator("#details").get_by_role("button", name="Delete").click()
    expect(shelf).to_have_count(0)
    expect(page.locator("#shelf")).to_contain_text("Nothing matches")
    assert (server.studio.folder / "trash" / name).is_file()
    page.get_by_role("button", name="Undo delete").click()
    expect(shelf).to_have_count(1)
    assert (server.studio.folder / name).is_file()


def test_models_are_listed(page):
    page.get_by_role("tab", name="Models").click()
    row = page.locator("#models tr", has_text="flextok-d12-d12")
    expect(row).to_contain_text("not for commercial use")


def open_tab(page, name):
    """Tabs that do not fit lie in a menu behind the last one."""
    tab = page.get_by_role("tab", name=name, exact=True).first
    if tab.is_visible():
        tab.click()
    else:
        page.locator(".overflow-menu > button").first.click()
        page.locator(".overflow-dropdown button", has_text=name).first.click()


def test_a_phone_shows_the_result_above_the_settings_without_sideways_scroll(open_page):
    page = open_page(390, 844)
    create(page, "red ring")
    expect(job(page).locator(".ts-view")).to_be_visible()
    result, settings = page.locator("#results"), page.locator("#settings")
    assert result.bounding_box()["y"] < settings.bounding_box()["y"]
    for tab in ("Picture", "Tokens", "Library", "Models"):
        open_tab(page, tab)
        time.sleep(0.3)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, tab
