"""A page of samples as one HTML file: pictures and sounds inline, no script, nothing fetched."""

import base64
import html
import io
import mimetypes
from pathlib import Path
from typing import Final

import PIL.Image

from mm.data.check_result import Check
from mm.data.check_text import check_table
from mm.data.index import Row, inside, rows_by_split, targets, value
from mm.data.readers import image_name
from mm.data.spec import SPLITS, Split, TableSpec

SAMPLES: Final = 24
"""Samples a split."""
MOST_BYTES: Final = 1 << 18
"""Of a sound that the page holds."""
SIDE: Final = 256
"""Pixels of a picture's longer side."""
_POLICY: Final = (
    """<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; media-src data:; """
    """style-src 'unsafe-inline'">"""
)
_STYLE: Final = (
    "body{font:14px/1.4 sans-serif;margin:2em;max-width:70em}"
    "main{display:grid;grid-template-columns:repeat(auto-fill,minmax(16em,1fr));gap:1em}"
    "main{align-items:start}article{border:1px solid #ccc;padding:.6em;overflow-wrap:anywhere}pre{white-space:pre-wrap}"
    "p{margin:.4em 0 0;max-height:20em;overflow:auto}img,audio{display:block;max-width:100%}.bad{color:#a00}"
)


def sample_page(spec: TableSpec, found: Check) -> str:
    """The table of a check and the same few samples each time, spread evenly over each split.

    Args:
        spec: From `mm.data.spec.load_spec`.
        found: From `mm.data.check.check` of the same spec.
    """
    parts = [
        f"<!doctype html><html lang='{spec.language}'><meta charset='utf-8'>",
        _POLICY,
        f"<title>{html.escape(spec.name)}</title><style>{_STYLE}</style>",
        f"<h1>{html.escape(spec.name)}</h1><pre>{html.escape(check_table(found))}</pre>",
    ]
    for split, rows in rows_by_split(spec).items():
        step = max(1, -(-len(rows) // SAMPLES))
        cards = [_card(row, spec, split) for row in rows[::step]]
        parts.append(f"<h2>{split}: {len(cards):,} of {len(rows):,}</h2><main>{''.join(cards)}</main>")
    assert len(parts) == 4 + len(SPLITS)
    return "\n".join(parts)


def _card(row: Row, spec: TableSpec, split: Split) -> str:
    lines = [f"<b>{split}, row {row['__row__'] + 1}</b>"]
    try:
        name = image_name(row, spec)
        if name is not None:
            pixels = _inline(inside(spec.root, name))
            lines.append(f'<img alt="{html.escape(name)}" src="data:image/jpeg;base64,{pixels}">')
        if spec.audio is not None:
            lines.append(_sound(spec, value(row, spec.audio.column)))
        if spec.prompt is not None:
            lines.append(f"<p><i>{html.escape(value(row, spec.prompt.column))}</i></p>")
        lines += [f"<p>{html.escape(text)}</p>" for text in targets(row, spec)]
    except (ValueError, OSError, SyntaxError, PIL.Image.DecompressionBombError) as error:
        lines.append(f"<span class=bad>can't be shown: {html.escape(type(error).__name__)}</span>")
    return f"<article>{''.join(lines)}</article>"


def _sound(spec: TableSpec, name: str) -> str:
    """Its name, and the sound itself where a browser plays its kind and it is short."""
    path, kind = inside(spec.root, name), mimetypes.guess_type(name)[0] or ""
    said = f"<p>{html.escape(name)}</p>"
    if not kind.startswith("audio/") or path.stat().st_size > MOST_BYTES:
        return said
    return f'{said}<audio controls src="data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"></audio>'


def _inline(path: Path) -> str:
    with PIL.Image.open(path) as picture:
        small = picture.convert("RGB")
    small.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=80)
    return base64.b64encode(file.getvalue()).decode()
