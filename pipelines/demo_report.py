"""`report.html` of the demo: one validation room, what camera, features and networks see in it; IoU per class."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from PIL import Image

from ditr_cache import open_cache
from ditr_cache.show import label_colors, pca_colors, render
from ditr_train.evaluate import predict_sample
from ditr_train.trained import load_run

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1200px; color: #222; padding: 0 1rem }
figure { display: inline-block; margin: 0 .5rem 1rem 0; vertical-align: top } img { max-width: 360px; display: block }
figcaption { font-size: 13px; color: #555 } table { border-collapse: collapse } td, th { padding: .2rem .8rem;
border-bottom: 1px solid #ddd; text-align: right } td:first-child, th:first-child { text-align: left }
.swatch { display: inline-block; width: .9em; height: .9em; margin-right: .5em; vertical-align: -.1em }
"""


def write_report(
    out: Path,
    rooms: Path,
    cache_path: Path,
    runs: Path,
    arms: Mapping[str, str],
    results: Mapping[str, Sequence[Mapping[str, Any]]],
) -> Path:
    """Write the report and its pictures to `out`; returns the page's path."""
    cache = open_cache(cache_path)
    room = cache.split_ids("val")[0]
    sample = cache.read(room)
    table = np.array(cache.metadata.class_colors, dtype=np.uint8)
    assert sample.color is not None and sample.segment is not None and sample.feature is not None
    clouds = {
        "points": sample.color,
        "PCA of the cached features": pca_colors(sample.feature, sample.valid),
        "ground truth": label_colors(sample.segment, table, cache.metadata.ignore_index),
    }
    for arm, title in arms.items():
        predicted = predict_sample(load_run(runs / f"{arm}-0", device="cpu", checkpoint="last"), room)
        # Predictions come in the dataset's order, the cache is in Morton order.
        clouds[f"prediction, {title}"] = label_colors(predicted[sample.source_index].astype(np.int16), table, -1)
    folder = out / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    frames = sorted((rooms / "scans" / room / "color").glob("*.jpg"), key=lambda p: int(p.stem))
    figures = []
    for number, frame in enumerate(frames[:: max(1, len(frames) // 3)][:3]):
        with Image.open(frame) as image:
            image.save(folder / f"frame-{number}.png")
        figures.append((f"frame-{number}.png", f"camera frame {frame.stem}"))
    views = {"above": (0, 1, 2), "side": (0, 2, 1)}
    for number, (title, colors) in enumerate(clouds.items()):
        for view, axes in views.items():
            name = f"cloud-{number}-{view}.png"
            render(sample.coord, colors, axes=axes).save(folder / name)
            figures.append((name, f"{title}, from {'above' if view == 'above' else 'the side'}"))
    page = out / "report.html"
    page.write_text(_page(room, figures, cache.metadata.class_names, table, arms, results))
    return page


def _page(
    room: str,
    figures: Sequence[tuple[str, str]],
    classes: Sequence[str],
    colors: np.ndarray,
    arms: Mapping[str, str],
    results: Mapping[str, Sequence[Mapping[str, Any]]],
) -> str:
    pictures = "".join(
        f'<figure><img src="pictures/{name}" alt="{html.escape(title)}"><figcaption>{html.escape(title)}</figcaption>'
        "</figure>"
        for name, title in figures
    )
    rows = []
    for name, color in zip(classes, colors, strict=True):
        swatch = f'<span class="swatch" style="background: rgb({color[0]}, {color[1]}, {color[2]})"></span>'
        rows.append(
            f"<tr><td>{swatch}{html.escape(name)}</td>{_cells(arms, results, lambda r, n=name: r['IoU'][n])}</tr>"
        )
    rows.append(f"<tr><th>mIoU</th>{_cells(arms, results, lambda r: r['mIoU'])}</tr>")
    heads = "".join(f"<th>{html.escape(title)}</th>" for title in arms.values())
    seeds = len(next(iter(results.values())))
    return (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>ditr demo</title><style>{STYLE}</style>"
        f"<h1>ditr demo</h1><p>Validation room {html.escape(room)}: what the camera sees, what the cache "
        "holds, and what the same network predicts without and with the cached features.</p>"
        f"{pictures}<h2>IoU per class, mean of {seeds} seeds, all validation rooms, %</h2>"
        f"<table><tr><th>class</th>{heads}</tr>{''.join(rows)}</table></html>\n"
    )


def _cells(arms: Mapping[str, str], results: Mapping[str, Sequence[Mapping[str, Any]]], value: Any) -> str:
    cells = []
    for arm in arms:
        values = [value(r) for r in results[arm] if value(r) is not None]
        cells.append(f"<td>{100 * mean(values):.1f}</td>" if values else "<td>-</td>")
    return "".join(cells)
