"""Write what each release costs into the datasets' pages: `python pipelines/dataset_pages.py`."""

from __future__ import annotations

from pathlib import Path

from benchmarks_page import table_lines, write_section

from ditr_cache.datasets import DATASETS, dataset_class
from ditr_cache.progress import human_bytes
from ditr_cache.release_cost import DEVICES, release_cost

PAGES = Path(__file__).parents[1] / "docs" / "datasets"
SECTION = "estimate"


def estimate_text(name: str) -> str:
    """The section of one dataset's page; says so where there is nothing to estimate."""
    cls = dataset_class(name)
    cost = release_cost(cls)
    if cost is None or cls.release is None:
        return "Every capture is of another size: ask `ditr-cache extract --dry-run`, which measures on your data."
    rows, columns = cls.defaults.grid
    figures = [
        ("samples", f"{cls.release.samples:,}"),
        ("images embedded", f"{cls.release.images:,}, {rows}x{columns} tokens each"),
        ("points", f"{cls.release.samples * cls.release.points / 1e6:,.0f} million"),
        *((f"forward passes on one {d.name}", duration(cost.gpu_hours[d.name])) for d in DEVICES),
        ("linking, on one CPU core", duration(cost.cpu_hours)),
        ("geometry on disk", f"at most {human_bytes(round(cost.geometry_bytes))}"),
        (f"features on disk, int8, layout `{cost.layout}`", f"at most {human_bytes(round(cost.feature_bytes))}"),
    ]
    devices = "; ".join(f"{d.name}: {d.source}" for d in DEVICES)
    return "\n".join(
        [
            "**Estimates, not measurements**, for the whole release with ViT-L/14 (`dinov2-large`). Decoding images",
            "comes on top and may decide; `ditr-cache extract --dry-run` measures on your data and your machine.",
            "",
            *table_lines(["what", "estimate"], figures),
            "",
            f"Sizes are before compression. Rates of ViT-L/14: {devices}. Counts: {cls.release.source}.",
        ]
    )


def duration(hours: float) -> str:
    """Hours, or minutes where they are few."""
    return f"{hours:.1f} h" if hours >= 2 else f"{max(1, round(hours * 60))} min"


def main() -> None:
    """Fill in the section of every page that is there."""
    for name in sorted(DATASETS):
        page = PAGES / f"{name}.md"
        if page.exists():
            write_section(page, SECTION, estimate_text(name))


if __name__ == "__main__":
    main()
