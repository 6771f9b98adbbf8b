"""The Video tab in headless Chromium: clips that are seen while they are made, stories, smoother clips."""

from __future__ import annotations

import httpx
import pytest

from tessera.tests.app_server import paused

expect = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed").expect


@pytest.fixture
def page(open_page):
    """The Video tab of a new visitor."""
    page = open_page()
    page.get_by_role("tab", name="Video", exact=True).click()
    return page


@pytest.fixture
def held(server):
    """The model of clips waits after the step of its second block until this event is set."""
    clips = server.studio.videos.clips("tiny-blocks")
    with paused(server, clips, lambda _, partial: partial.frames().shape[2] == 5) as release:
        yield release


def test_a_clip_is_seen_before_it_is_finished_and_becomes_smoother(page, held):
    page.locator("#clip-prompt textarea").fill("red ring")
    page.locator("#make-clip").click()
    job = page.locator("#clips .ts-job").first
    clip = job.locator(".ts-clip")
    expect(clip).to_have_attribute("data-frames", "5")
    assert job.get_attribute("data-state") == "running"
    assert job.locator("canvas").evaluate("canvas => canvas.width") == 16
    held.set()
    expect(job).to_have_attribute("data-state", "done")
    links = job.locator(".ts-download")
    expect(links).to_have_text(["WebP", "GIF", "APNG", "MP4", "WebM"])
    for link in links.all():
        assert httpx.get(link.evaluate("link => link.href"), timeout=60).status_code == 200
    # The player can be held at any frame.
    clip.get_by_role("slider").fill("3")
    expect(clip.get_by_role("button")).to_have_text("Play")
    expect(clip.get_by_role("slider")).to_have_attribute(
        "aria-valuetext", f"frame 4 of {clip.get_attribute('data-frames')}"
    )
    job.get_by_role("button", name="Smoother").click()
    expect(page.locator("#smooth-file")).to_contain_text(".webp")
    page.locator("#make-smooth").click()
    smooth = page.locator("#smoothed .ts-job").first
    expect(smooth).to_have_attribute("data-state", "done")
    expect(smooth.locator(".ts-download")).to_have_text(["WebP", "MP4"])
    expect(smooth.locator(".ts-side img")).to_have_count(2)
    for image in smooth.locator(".ts-side img").all():
        assert image.evaluate("image => image.decode().then(() => image.naturalWidth)") > 0


def test_stop_keeps_the_finished_frames(page, held):
    page.locator("#clip-prompt textarea").fill("red ring")
    page.locator("#make-clip").click()
    job = page.locator("#clips .ts-job").first
    expect(job.locator(".ts-clip")).to_have_attribute("data-frames", "5")
    job.locator(".ts-stop").click()
    expect(job).to_have_attribute("data-state", "stopped")
    expect(job.locator(".ts-meta")).to_contain_text("stopped at step")
    expect(job.locator(".ts-download").first).to_have_text("WebP")


def test_stories_show_their_scenes(page):
    page.get_by_role("tab", name="Story").click()
    text = page.locator("#story-text textarea")
    text.fill("a seed falls")
    expect(page.locator("#video-tabs .ts-warning:visible")).to_contain_text("is no scene")
    text.fill("1: a red ring\n0.5: a <b>dot</b>")
    expect(page.locator(".ts-settings .ts-timeline:visible li")).to_have_count(2)
    page.locator("#tell").click()
    job = page.locator("#stories .ts-job").first
    expect(job).to_have_attribute("data-state", "done")
    expect(job.locator(".ts-timeline li")).to_have_text(["1 sa red ring", "0.5 sa <b>dot</b>"])
    job.get_by_role("slider").fill("11")
    expect(job.locator(".ts-timeline .seen")).to_have_text("0.5 sa <b>dot</b>")
    job.get_by_role("button", name="Go on from it").click()
    expect(page.locator("#begin-file")).to_contain_text(".webp")


def test_a_phone_shows_it_without_sideways_scrolling(page):
    page.set_viewport_size({"width": 390, "height": 844})
    page.locator("#make-clip").click()
    expect(page.locator("#clips .ts-job canvas").first).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
