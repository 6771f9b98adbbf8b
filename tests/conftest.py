"""What the tests share. Where there is no GPU, Triton's kernels run in its interpreter."""

import importlib.util
import shutil

import pytest
import torch

if importlib.util.find_spec("triton") and not torch.cuda.is_available():
    from tessera.kernels.interpreter import enable_interpreter

    enable_interpreter()

# Milliseconds to wait for a page at most: machines that run tests can be busy.
PATIENCE = 180_000


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The app over tiny models, served."""
    from tessera.tests.app_server import running_app

    with running_app(tmp_path_factory.mktemp("app")) as running:
        yield running


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium; sounds play without a click."""
    api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("there is no Chromium on the path")
    api.expect.set_options(timeout=PATIENCE)
    arguments = ["--no-sandbox", "--autoplay-policy=no-user-gesture-required"]
    with api.sync_playwright() as runner:
        browser = runner.chromium.launch(executable_path=chromium, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def open_page(server, browser):
    """Opens the app as a new visitor; at the end, no script failed and nothing left the machine."""
    contexts, faults = [], []

    def check(request):
        if not request.url.startswith((server.url, "data:", "blob:")):
            faults.append(request.url)

    def open_page(width=1280, height=900):
        context = browser.new_context(viewport={"width": width, "height": height})
        context.set_default_timeout(PATIENCE)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", check)
        page.goto(server.url)
        # The start handler has given the page its owner key when the watcher has delivered.
        page.wait_for_function("localStorage.getItem('tessera.owner')")
        return page

    server.hold_at = None
    yield open_page
    server.hold_at = None
    for context in contexts:
        context.close()
    assert faults == []
