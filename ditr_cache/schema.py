"""One frozen dataclass per concept on disk, to and from JSON. Format version 1.

Every JSON document carries `format_version`, `kind` and `checksum` (SHA-256 of the document without that field): a
newer version is refused with a clear error, a document that was cut or altered is refused as corrupt.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from ditr_cache.errors import CorruptCacheError, FormatVersionError

FORMAT_VERSION = 1
"""Version of everything on disk that this code writes, and the newest that it reads."""

PROJECTION_VERSION = 1
"""Version of linking and lifting. Raised with any change that moves a feature to another point."""

IGNORE_INDEX = -1
"""Label of points that no loss and no metric counts."""

OCCLUSION = ("auto", "none")
"""How hidden points are found: by the view's depth map, or a z-buffer of the points where it has none; or not at all,
as DITR does outdoors."""

LAYOUTS = ("fused", "views")
"""How a feature store is laid out: one row per visible point, or every token that a link sees, stored once."""

DEFAULT_GRID = (30, 40)
"""Tokens (rows, columns) of an image where neither an image size nor a dataset's recipe says otherwise: DITR's 420x560
pixels for a ViT/14."""

NOT_FUSED = "none"
"""`VFMSpec.fuse` of the layout `views`, which reduces nothing."""


def canonical_digest(document: Any) -> str:
    """SHA-256 (hex) of a JSON value in canonical form: sorted keys, no spaces."""
    return hashlib.sha256(json.dumps(document, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class Document:
    """Mixin of the dataclasses that are a JSON file of their own."""

    kind: ClassVar[str]

    def to_json(self) -> str:
        """The document as text, with its version and checksum."""
        body = {"format_version": FORMAT_VERSION, "kind": self.kind, **dataclasses.asdict(self)}  # type: ignore[call-overload]
        return json.dumps({**body, "checksum": canonical_digest(json.loads(json.dumps(body)))}, indent=1)

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> Self:
        """The document in `text`; `where` names it in errors.

        Raises:
            FormatVersionError: a newer format.
            CorruptCacheError: not such a document, or altered since it was written.
        """
        try:
            body = json.loads(text)
            version, kind, checksum = body.pop("format_version"), body.pop("kind"), body.pop("checksum", None)
        except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
            raise CorruptCacheError(f"{where}: not a {cls.kind} of a ditr cache ({error})") from error
        if not isinstance(version, int) or version > FORMAT_VERSION:
            raise FormatVersionError(
                f"{where}: format version {version}, but this ditr reads up to {FORMAT_VERSION}; upgrade ditr"
            )
        if kind != cls.kind or checksum != canonical_digest({"format_version": version, "kind": kind, **body}):
            raise CorruptCacheError(
                f"{where}: this {cls.kind} was altered after it was written (checksum differs); run `ditr-cache verify`"
            )
        names = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        try:
            return cls(**{k: v for k, v in body.items() if k in names})
        except TypeError as error:
            raise CorruptCacheError(f"{where}: fields are missing ({error})") from error


def _nested(instance: object, name: str, cls: type, many: bool = False) -> None:
    """Turn the dicts of a field that came from JSON back into `cls` (frozen dataclasses allow no assignment)."""
    value = getattr(instance, name)
    if many:
        value = tuple(cls(**v) if isinstance(v, dict) else v for v in value)
    elif isinstance(value, dict):
        value = cls(**value)
    object.__setattr__(instance, name, value)


@dataclass(frozen=True, kw_only=True)
class LinkSettings:
    """How points are linked to views. Part of the cache's identity: one cache, one setting.

    Args:
        every_nth_frame: keep every n-th frame of a sample; None takes the dataset's own recommendation.
        max_views: at most this many views, evenly spread over those that remain; None keeps all.
        occlusion_tolerance: metres; a point is visible where its depth is within this of the view's depth (DITR: 0.2).
        depth_min, depth_max: metres along the camera's z; points outside are not linked. None: no upper bound.
        occlusion: one of `OCCLUSION`.
    """

    every_nth_frame: int | None = None
    max_views: int | None = None
    occlusion_tolerance: float = 0.2
    depth_min: float = 0.1
    depth_max: float | None = None
    occlusion: str = "auto"


@dataclass(frozen=True, kw_only=True)
class CacheMetadata(Document):
    """`cache.json`: what every partition of the cache has in common.

    Args:
        dataset: its name.
        class_names, class_colors: by label index.
        links: how points were linked to views.
        ignore_index: label of points that do not count.
        class_groups: group of each class, where the benchmark reports groups beside all (ScanNet200); else empty.
        dataset_options: options of the dataset that are not its defaults.
    """

    kind: ClassVar[str] = "cache"

    dataset: str
    class_names: tuple[str, ...]
    class_colors: tuple[tuple[int, int, int], ...]
    links: LinkSettings
    ignore_index: int = IGNORE_INDEX
    class_groups: tuple[str, ...] = ()
    dataset_options: dict[str, str | int | float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "class_names", tuple(self.class_names))
        object.__setattr__(self, "class_groups", tuple(self.class_groups))
        object.__setattr__(self, "class_colors", tuple(tuple(c) for c in self.class_colors))
        _nested(self, "links", LinkSettings)


@dataclass(frozen=True, kw_only=True)
class VFMSpec(Document):
    """`vfm.json`: everything that decides what a feature store holds. Its digest is the store's identity.

    Args:
        name: the name the user gave, say `dinov2-large`.
        architecture: timm's name of the network.
        weights_sha256: SHA-256 over the state dict's names, dtypes, shapes and bytes: the same weights have the same
            digest whatever file they came from.
        tap: which output is taken, say `blocks.11` or `feature_info.3`.
        norm: whether the final norm is applied to it.
        mean, std: normalisation of RGB in 0..1.
        interpolation: of the resize to `image_size`.
        image_size: (height, width) the network sees.
        grid: (rows, columns) of tokens.
        dim: width C of a token.
        layout: one of `LAYOUTS`.
        fuse: how a point's views are reduced: `mean`, `last` or `nearest`; `NOT_FUSED` in the layout `views`.
        codec: how rows are stored, see `codecs`.
        projection_version: of linking and lifting.
    """

    kind: ClassVar[str] = "vfm"

    name: str
    architecture: str
    weights_sha256: str
    tap: str
    norm: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    image_size: tuple[int, int]
    grid: tuple[int, int]
    dim: int
    layout: str = "fused"
    fuse: str = "mean"
    codec: str = "float16"
    projection_version: int = PROJECTION_VERSION

    def __post_init__(self) -> None:
        for name in ("mean", "std", "image_size", "grid"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of everything but the readable name."""
        fields = json.loads(json.dumps(dataclasses.asdict(self)))
        del fields["name"]
        return canonical_digest(fields)

    @property
    def key(self) -> str:
        """Name of the store's folder: readable name + 8 hex of the digest."""
        return f"{self.name}-{self.digest[:8]}"


@dataclass(frozen=True, kw_only=True)
class ArrayInfo:
    """One stored array: its shape, dtype and the SHA-256 of its bytes in C order."""

    shape: tuple[int, ...]
    dtype: str
    sha256: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))


@dataclass(frozen=True, kw_only=True)
class ViewInfo:
    """One linked view: its id and the number of its links. Views stand in the order of the links."""

    id: str
    links: int


@dataclass(frozen=True, kw_only=True)
class SampleInfo:
    """One sample of a geometry partition.

    Args:
        points: number of points.
        linked_points: number of points with at least one link.
        views: the views whose links are stored, in time order.
    """

    id: str
    split: str
    points: int
    linked_points: int
    views: tuple[ViewInfo, ...]

    def __post_init__(self) -> None:
        _nested(self, "views", ViewInfo, many=True)

    @property
    def coverage(self) -> float:
        """Fraction of points with at least one link."""
        return self.linked_points / self.points if self.points else 0.0


@dataclass(frozen=True, kw_only=True)
class BrokenView:
    """A view that was left out of a committed partition, and why."""

    sample: str
    view: str
    error: str


@dataclass(frozen=True, kw_only=True)
class GeometryRecord(Document):
    """Commit record of `geometry/<partition>.zarr`.

    Args:
        samples: in the order of the arrays.
        arrays: every array of the store.
        files: relative path -> size in bytes of every file of the store.
        broken_views: views left out; not empty means incomplete.
        seconds: how long it took.
    """

    kind: ClassVar[str] = "geometry record"

    partition: str
    samples: tuple[SampleInfo, ...]
    arrays: dict[str, ArrayInfo]
    files: dict[str, int]
    broken_views: tuple[BrokenView, ...] = ()
    seconds: float = 0.0

    def __post_init__(self) -> None:
        _nested(self, "samples", SampleInfo, many=True)
        _nested(self, "broken_views", BrokenView, many=True)
        object.__setattr__(
            self, "arrays", {k: ArrayInfo(**v) if isinstance(v, dict) else v for k, v in self.arrays.items()}
        )

    @property
    def digest(self) -> str:
        """Identity of the geometry: samples, views, and the content of every array (point order included)."""
        body = dataclasses.asdict(self)
        return canonical_digest(json.loads(json.dumps({k: body[k] for k in ("samples", "arrays")})))

    def point_slice(self, position: int) -> slice:
        """Where the points of the sample at that position stand in the point arrays."""
        start = sum(s.points for s in self.samples[:position])
        return slice(start, start + self.samples[position].points)

    def link_slice(self, position: int) -> slice:
        """Where the links of the sample at that position stand in the link arrays."""
        start = sum(v.links for s in self.samples[:position] for v in s.views)
        return slice(start, start + sum(v.links for v in self.samples[position].views))


@dataclass(frozen=True, kw_only=True)
class FeatureRecord(Document):
    """Commit record of `features/<vfm key>/<partition>.zarr`.

    Args:
        vfm_digest: `VFMSpec.digest` of the store it belongs to.
        geometry_digest: `GeometryRecord.digest` of the geometry it was made from.
        rows: number of stored rows T.
        valid_points: per sample, the number of points that have a feature.
        images: number of images that went through the VFM.
    """

    kind: ClassVar[str] = "feature record"

    partition: str
    vfm_digest: str
    geometry_digest: str
    arrays: dict[str, ArrayInfo]
    files: dict[str, int]
    rows: int
    valid_points: tuple[int, ...]
    images: int
    broken_views: tuple[BrokenView, ...] = ()
    seconds: float = 0.0

    def __post_init__(self) -> None:
        _nested(self, "broken_views", BrokenView, many=True)
        object.__setattr__(self, "valid_points", tuple(self.valid_points))
        object.__setattr__(
            self, "arrays", {k: ArrayInfo(**v) if isinstance(v, dict) else v for k, v in self.arrays.items()}
        )
