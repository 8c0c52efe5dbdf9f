"""What `ditr-cache datasets` prints: every dataset, what it needs on disk, its options and defaults."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from ditr_cache.datasets.base import DATASETS, dataset_class


def describe_datasets() -> list[dict[str, Any]]:
    """One JSON object per dataset, by name. Imports every reader, none of their optional libraries."""
    found = []
    for name in sorted(DATASETS):
        cls = dataset_class(name)
        found.append(
            {
                "name": name,
                "title": cls.title,
                "needs": [asdict(need) for need in cls.needs],
                "options": [asdict(option) for option in cls.options],
                "defaults": asdict(cls.defaults),
                "samples_per_partition": cls.samples_per_partition,
            }
        )
    return found


def listing_lines(datasets: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The same for people."""
    for dataset in datasets:
        rows, columns = dataset["defaults"]["grid"]
        yield f"{dataset['name']}: {dataset['title']}"
        for need in dataset["needs"]:
            optional = " (optional)" if need["optional"] else ""
            yield f"    {need['path']}{optional}: {need['content']}; from: {need['download']}"
        for option in dataset["options"]:
            choices = f" ({', '.join(str(c) for c in option['choices'])})" if option["choices"] else ""
            yield f"    --option {option['name']}={option['default']}{choices}: {option['help']}"
        yield f"    by default: {rows}x{columns} tokens an image, layout {dataset['defaults']['layout']}"
