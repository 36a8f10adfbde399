"""What the reports of `plait invert` and `plait forward` look like: a page, its pictures."""

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from plait.magnetotellurics.run_files import write_whole

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
       color: #1a1a1a; background: #fff; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
img { max-width: 100%; height: auto; display: block; }
table { border-collapse: collapse; } td, th { padding: .25rem .8rem; text-align: right;
       border-bottom: 1px solid #ddd; } td:first-child, th:first-child { text-align: left; }
pre { background: #f5f5f5; padding: .6rem; overflow-x: auto; font-size: .85rem; }
figure { margin: 1rem 0; } figcaption { color: #555; font-size: .9rem; }
"""


def write_page(path: Path, *, title: str, parts: Sequence[str]) -> None:
    """Write a page of a title (text) and parts (HTML)."""
    title = html.escape(title)
    body = "\n".join(parts)
    write_whole(
        path,
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style></head><body>\n<h1>{title}</h1>\n{body}\n</body></html>\n",
    )


def picture(figure: Any, path: Path, caption: str) -> str:
    """Save a figure beside the page and give the HTML that shows it over its caption (text)."""
    figure.savefig(path, dpi=110)
    text = html.escape(caption)
    return (
        f'<figure><img src="{path.name}" alt="{text or path.stem}">'
        f"<figcaption>{text}</figcaption></figure>"
    )
