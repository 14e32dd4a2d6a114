"""A page in headless Chromium: what it says, asks for and looks like.

for width, scheme, seen in opened(Path("report.html"), (360, 1280), ("light", "dark")):
    assert seen.messages == []
"""

import io
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

CHROMIUM = shutil.which("chromium") if find_spec("playwright") and find_spec("PIL") else None
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync")
# Of what is painted: the least size of a text, a drawing's scale counted.
SMALLEST = """() => {
  let least = Infinity;
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode, parent = node.parentElement;
    const hidden = "script, style, title, details:not([open]) > :not(summary)";
    if (!node.textContent.trim() || parent.closest(hidden)) continue;
    let size = parseFloat(getComputedStyle(parent).fontSize);
    const drawing = parent.closest("svg");
    if (drawing && drawing.viewBox.baseVal.width)
      size *= drawing.getBoundingClientRect().width / drawing.viewBox.baseVal.width;
    least = Math.min(least, size);
  }
  return least;
}"""


@dataclass
class Seen:
    """What a browser made of a page."""

    messages: list[str]
    requests: list[str]
    scroll_width: int
    smallest_text: float  # px
    colours: int  # different ones, of those that the picture holds
    background: tuple[int, int, int]


def opened(
    page: Path, widths: Sequence[int], schemes: Sequence[str], pictures: Path | None = None
) -> Iterator[tuple[int, str, Seen]]:
    """A file at each width and in each scheme, `light` or `dark`; `pictures`: a folder for them."""
    from PIL import Image
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        for width in widths:
            for scheme in schemes:
                messages: list[str] = []
                requests: list[str] = []
                tab = browser.new_page(
                    viewport={"width": width, "height": 900}, color_scheme=scheme
                )
                tab.on("console", lambda message, kept=messages: kept.append(message.text))
                tab.on("pageerror", lambda error, kept=messages: kept.append(str(error)))
                tab.on("request", lambda request, kept=requests: kept.append(request.url))
                tab.goto(page.as_uri())
                scroll = tab.evaluate("document.documentElement.scrollWidth")
                smallest = tab.evaluate(SMALLEST)
                shot = tab.screenshot(full_page=pictures is not None)
                tab.close()
                if pictures is not None:
                    (pictures / f"{page.stem}-{width}-{scheme}.png").write_bytes(shot)
                image = Image.open(io.BytesIO(shot)).convert("RGB")
                colours = len(image.getcolors(1 << 24) or [])
                corner = image.getpixel((2, 2))
                yield width, scheme, Seen(messages, requests, scroll, smallest, colours, corner)
        browser.close()
