"""A page as headless Chromium lays it out."""

import re
import shutil
import subprocess

import pytest


def laid_out(page, folder):
    """The DOM after layout, and how wide the page has become; skips where there is no Chromium.

    A page that scrolls sideways is wider than the window of 1,100 pixels.
    """
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("there is no Chromium")
    path = folder / "page.html"
    measure = "<script>document.title = document.documentElement.scrollWidth</script></body>"
    path.write_text(page.replace("</body>", measure), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1100,800"]
    done = subprocess.run(
        [chromium, *options, "--dump-dom", path.as_uri()],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return done.stdout, int(re.search(r"<title>(\d+)</title>", done.stdout)[1])
