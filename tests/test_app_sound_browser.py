"""The Sound tab in headless Chromium: speech that is heard while it is made, effects, codecs."""

from __future__ import annotations

import httpx
import pytest
import torch

from tessera.modalities.audio import save_audio
from tessera.tests.app_server import paused

expect = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed").expect


@pytest.fixture
def page(open_page):
    """The Sound tab of a new visitor."""
    page = open_page()
    page.get_by_role("tab", name="Sound", exact=True).click()
    return page


@pytest.fixture
def held(server):
    """The voice waits after the second piece until this event is set."""
    with paused(server, server.studio.sounds.voice(), lambda number, _: number == 1) as release:
        yield release


def test_speech_is_heard_before_it_is_finished(page, held):
    page.locator("#speech-text textarea").fill("It rains. The kettle is boiling. Pour it!")
    page.locator("#speak").click()
    job = page.locator("#speech .ts-job").first
    expect(job).to_have_attribute("data-heard-while", "running")
    assert job.get_attribute("data-state") == "running"
    early = float(job.get_attribute("data-scheduled"))
    held.set()
    expect(job).to_have_attribute("data-state", "done")
    links = job.locator(".ts-download")
    expect(links).to_have_text(["WAV", "FLAC", "OGG"])
    rate_and_bytes = httpx.get(links.first.evaluate("link => link.href")).content
    seconds = (len(rate_and_bytes) - 44) / 2 / 8000
    # Each piece was put on the clock once, right behind the one before.
    page.wait_for_function("() => !document.querySelector('#speech .ts-stop:not([hidden])')")
    assert 0 < early < seconds
    assert float(job.get_attribute("data-scheduled")) <= seconds
    assert float(job.get_attribute("data-scheduled")) > seconds - 0.5
    expect(job.locator(".ts-words span")).to_have_count(8)
    assert job.locator("img").first.evaluate("image => image.naturalWidth") == 800
    assert "s of sound" in job.locator(".ts-meta").inner_text()


def test_stop_keeps_what_was_spoken(page, held):
    page.locator("#speech-text textarea").fill("It rains. It pours. It snows.")
    page.locator("#speak").click()
    job = page.locator("#speech .ts-job").first
    expect(job).to_have_attribute("data-heard-while", "running")
    job.locator(".ts-stop").click()
    expect(job).to_have_attribute("data-state", "stopped")
    expect(job.locator(".ts-meta")).to_contain_text("stopped at sentence")
    expect(job.locator(".ts-download").first).to_have_text("WAV")


def test_effects_and_errors(page):
    page.get_by_role("tab", name="Sounds").click()
    page.locator("#caption textarea").fill("a bell")
    page.locator("#variants").get_by_label("2", exact=True).check()
    page.locator("#make-sound").click()
    job = page.locator("#sounds .ts-job").first
    expect(job.locator(".ts-download")).to_have_count(6)
    expect(job.locator(".ts-seed")).to_have_count(2)
    page.get_by_role("tab", name="Speech", exact=True).click()
    page.locator("#speech-text textarea").fill("...")
    page.locator("#speak").click()
    expect(page.get_by_test_id("toast-body")).to_contain_text("nothing to speak")


def test_codecs_on_a_recording_of_ones_own(page, tmp_path):
    noise = 0.3 * torch.rand(1, 8000, generator=torch.Generator().manual_seed(0))
    save_audio(noise, 8000, tmp_path / "mine.wav")
    page.get_by_role("tab", name="Codecs").click()
    page.locator("#recording input[type=file]").set_input_files(tmp_path / "mine.wav")
    expect(page.locator("#recording audio, #recording #waveform").first).to_be_attached()
    page.locator("#compare-codecs").click()
    rows = page.locator("#codecs .ts-codec")
    expect(rows).to_have_count(3)
    expect(rows.nth(1).locator(".ts-meta")).to_contain_text("0.50 kbit/s")
    expect(rows.nth(2).locator(".ts-meta")).to_contain_text("real-time factor")
    expect(page.locator("#codecs [role=status]")).to_have_text("mine.wav: 2 of 2 codecs done")


def test_a_phone_shows_it_without_sideways_scrolling(page):
    page.set_viewport_size({"width": 390, "height": 844})
    page.locator("#speak").click()
    expect(page.locator("#speech .ts-job audio").first).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
