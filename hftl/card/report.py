"""The report: a card as one HTML file."""

import base64
import re
from pathlib import Path

PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body{{font:16px/1.55 system-ui,sans-serif;max-width:50rem;margin:2rem auto;padding:0 1rem;
color:#24292f}}
table{{border-collapse:collapse}}td,th{{border:1px solid #d0d7de;padding:.3rem .7rem;
text-align:left}}
pre{{background:#f6f8fa;padding:1rem;overflow-x:auto}}img{{max-width:100%}}
</style></head><body>
{body}
</body></html>
"""


def render_report(card: str, folder: Path) -> str:
    """The card as one HTML file, its pictures inside."""
    from markdown_it import MarkdownIt

    body = card.split("\n---\n", 1)[1]
    html = MarkdownIt("commonmark", {"html": False}).enable("table").render(_plain_details(body))

    def inline(match: re.Match[str]) -> str:
        picture = base64.b64encode((folder / match[1]).read_bytes()).decode()
        return f'src="data:image/png;base64,{picture}"'

    html = re.sub(r'src="(assets/[\w-]+\.png)"', inline, html)
    title = next(line[2:] for line in body.splitlines() if line.startswith("# "))
    return PAGE.format(title=_escaped(title), body=html)


def _plain_details(body: str) -> str:
    """Folded parts as headings: HTML in the card is escaped in the report."""
    body = re.sub(r"<details><summary>(.*?)</summary>", r"## \1", body)
    return body.replace("</details>", "")


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")
