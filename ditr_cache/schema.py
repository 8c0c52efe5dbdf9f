"""One frozen dataclass per concept on disk, to and from JSON. Format version 1.

Every JSON document carries `format_version`, `kind` and `checksum` (SHA-256 of the document without that field): a
newer version is refused with a clear error, a document that was cut or altered is refused as corrupt. So is one of
values that no cache has, whoever made its checksum fit: fields declare their limits, see `validation`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Annotated, Any, ClassVar, Self

from ditr_cache.errors import CorruptCacheError, FormatVersionError
from ditr_cache.validation import Between, FieldError, OneOf, Text, checker

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

POINT_ARRAYS = ("coord", "color", "normal", "strength", "segment", "instance", "source_index")
"""Arrays with a row for every point; all but the first and the last may lack."""

LINK_ARRAYS = ("link_point", "link_uv", "link_depth")
"""Arrays with a row for every link."""

_WIDTHS = {"coord": 3, "color": 3, "normal": 3, "link_uv": 2}  # columns; the others have none, a table any number
_FLOATS = ("coord", "normal", "strength", "link_depth", "scale")  # the others hold whole numbers, a table any

DEFAULT_GRID = (30, 40)
"""Tokens (rows, columns) of an image where neither an image size nor a dataset's recipe says otherwise: DITR's 420x560
pixels for a ViT/14."""

NOT_FUSED = "none"
"""`VFMSpec.fuse` of the layout `views`, which reduces nothing."""

FINGERPRINT_DIGITS = 24
"""Hexadecimal digits of the fingerprint of a view's calibration."""

MAX_ENTRIES = 2**32 - 1
"""Most points, links or rows of a partition: they are counted in 32 bits where they are stored."""

MAX_SIDE = 2**24
"""Most pixels, tokens or channels along one axis of an image, a grid or a feature."""

MAX_INFLATION, FREE_BYTES = 1000, 2**28
"""Arrays may take `FREE_BYTES`, 256 MiB, and `MAX_INFLATION` times their files: a reader makes room as the record says,
and a small download must not ask for more than a machine has. Real partitions inflate 1 to 30 times."""

Channel = Annotated[int, Between(0, 255)]
Entries = Annotated[int, Between(0, MAX_ENTRIES)]
Side = Annotated[int, Between(1, MAX_SIDE)]
Bytes = Annotated[int, Between(0, 2**48)]
Fingerprints = Annotated[str, Text("[0-9a-f]*", "fingerprints in hexadecimal digits")]
BlockSums = Annotated[str, Text("([0-9a-f]{8})*", "checksums of 8 hexadecimal digits")]
Sha256 = Annotated[str, Text("[0-9a-f]{64}", "a SHA-256 in hexadecimal digits")]
ArrayName = Annotated[str, Text("[a-z][a-z0-9_]{0,63}", "the name of an array, in small letters")]
ArrayType = Annotated[str, Text("[<|][fiu][1248]", "a type of plain numbers, say '<f4'")]
_PART = r"[\w-][\w.-]{0,99}"
FilePath = Annotated[str, Text(f"{_PART}(/{_PART}){{0,7}}", "the path of a file within the partition's folder")]


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
        if type(version) is not int or version > FORMAT_VERSION:
            raise FormatVersionError(
                f"{where}: format version {version}, but this ditr reads up to {FORMAT_VERSION}; upgrade ditr"
            )
        try:
            digest = canonical_digest({"format_version": version, "kind": kind, **body})
        except RecursionError as error:  # nested just less deeply than the parser takes
            raise CorruptCacheError(f"{where}: not a {cls.kind} of a ditr cache ({error})") from error
        if kind != cls.kind or checksum != digest:
            raise CorruptCacheError(
                f"{where}: this {cls.kind} was altered after it was written (checksum differs); run `ditr-cache verify`"
            )
        names = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        try:
            checker(cls)(body)  # type: ignore[arg-type]  # a class can be hashed
            document = cls(**{k: v for k, v in body.items() if k in names})
            document.check()
        except TypeError as error:
            raise CorruptCacheError(f"{where}: fields are missing ({error})") from error
        except FieldError as error:
            raise CorruptCacheError(f"{where}: {error}; no ditr writes such a {cls.kind}: do not use it") from error
        return document

    def check(self) -> None:
        """Raise `FieldError` where fields contradict each other."""


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

    every_nth_frame: Entries | None = None
    max_views: Entries | None = None
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
    class_colors: tuple[tuple[Channel, Channel, Channel], ...]
    links: LinkSettings
    ignore_index: Annotated[int, Between(-(2**15), 2**15 - 1)] = IGNORE_INDEX
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
        codec_digest: SHA-256 of what a codec was fitted to be, which lies in `codec.json`; empty where it fits nothing.
        explained_variance: share of the variance of the training rows that such a codec keeps. Follows from the rest.
        projection_version: of linking and lifting.
    """

    kind: ClassVar[str] = "vfm"

    name: str
    architecture: str
    weights_sha256: Sha256
    tap: str
    norm: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    image_size: tuple[Side, Side]
    grid: tuple[Side, Side]
    dim: Side
    layout: Annotated[str, OneOf(LAYOUTS)] = "fused"
    fuse: str = "mean"
    codec: str = "float16"
    codec_digest: Annotated[str, Text("([0-9a-f]{64})?", "a SHA-256 in hexadecimal digits, or nothing")] = ""
    explained_variance: float | None = None
    projection_version: int = PROJECTION_VERSION

    def __post_init__(self) -> None:
        for name in ("mean", "std", "image_size", "grid"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of everything but the readable name."""
        fields = json.loads(json.dumps(dataclasses.asdict(self)))
        del fields["name"], fields["explained_variance"]
        if not self.codec_digest:  # stores that are older than fitted codecs keep their identity
            del fields["codec_digest"]
        return canonical_digest(fields)

    @property
    def key(self) -> str:
        """Name of the store's folder: readable name + 8 hex of the digest."""
        return f"{self.name}-{self.digest[:8]}"


@dataclass(frozen=True, kw_only=True)
class ArrayInfo:
    """One stored array: its shape, dtype and the SHA-256 of its bytes in C order."""

    shape: tuple[Entries, ...]
    dtype: ArrayType
    sha256: Sha256

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))

    @property
    def nbytes(self) -> int:
        """Bytes of the array in memory."""
        return prod(self.shape) * int(self.dtype[2:])


@dataclass(frozen=True, kw_only=True)
class ViewInfo:
    """One linked view: its id and the number of its links. Views stand in the order of the links."""

    id: str
    links: Entries


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
    points: Entries
    linked_points: Entries
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
        offsets: where each file lies in the one object that the store is, see `pack`; empty where it is a folder.
        broken_views: views left out; not empty means incomplete.
        seconds: how long it took.
        checksums: of the arrays' chunks, see `checksums`; empty in records that were written before there were any. No
            part of the digest: the arrays' SHA-256 are.
        calibration: per sample, the fingerprints of its views' cameras and poses, see `fingerprint`; empty in records
            that were written before there were any. No part of the digest: what it decides, the links, is.
        projection_version: of linking; 1 in records that do not say.
    """

    kind: ClassVar[str] = "geometry record"

    partition: str
    samples: tuple[SampleInfo, ...]
    arrays: dict[ArrayName, ArrayInfo]
    files: dict[FilePath, Bytes]
    offsets: dict[FilePath, Bytes] = dataclasses.field(default_factory=dict)
    checksums: dict[ArrayName, BlockSums] = dataclasses.field(default_factory=dict)
    broken_views: tuple[BrokenView, ...] = ()
    seconds: float = 0.0
    calibration: tuple[Fingerprints, ...] = ()
    projection_version: int = 1

    def __post_init__(self) -> None:
        _nested(self, "samples", SampleInfo, many=True)
        _nested(self, "broken_views", BrokenView, many=True)
        object.__setattr__(self, "calibration", tuple(self.calibration))
        object.__setattr__(
            self, "arrays", {k: ArrayInfo(**v) if isinstance(v, dict) else v for k, v in self.arrays.items()}
        )

    def check(self) -> None:
        """See `Document`."""
        points = sum(s.points for s in self.samples)
        lengths = dict.fromkeys(POINT_ARRAYS, points) | {"offset": len(self.samples)}
        lengths |= dict.fromkeys(LINK_ARRAYS, sum(v.links for s in self.samples for v in s.views))
        _check_arrays(self.arrays, self.files, lengths, ("coord", "source_index"))
        _check_offsets(self.files, self.offsets)
        digits = [len(text) for text in self.calibration]
        if digits and digits != [FINGERPRINT_DIGITS * len(s.views) for s in self.samples]:
            expected = f"{FINGERPRINT_DIGITS} digits for each view of each sample"
            raise FieldError(expected, str(digits)).below(".calibration")
        if len({s.id for s in self.samples}) < len(self.samples):
            raise FieldError("samples of different ids", [s.id for s in self.samples])

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
        offsets, checksums: as in `GeometryRecord`.
    """

    kind: ClassVar[str] = "feature record"

    partition: str
    vfm_digest: Sha256
    geometry_digest: Sha256
    arrays: dict[ArrayName, ArrayInfo]
    files: dict[FilePath, Bytes]
    rows: Entries
    valid_points: tuple[Entries, ...]
    images: Entries
    offsets: dict[FilePath, Bytes] = dataclasses.field(default_factory=dict)
    checksums: dict[ArrayName, BlockSums] = dataclasses.field(default_factory=dict)
    broken_views: tuple[BrokenView, ...] = ()
    seconds: float = 0.0

    def __post_init__(self) -> None:
        _nested(self, "broken_views", BrokenView, many=True)
        object.__setattr__(self, "valid_points", tuple(self.valid_points))
        object.__setattr__(
            self, "arrays", {k: ArrayInfo(**v) if isinstance(v, dict) else v for k, v in self.arrays.items()}
        )

    def check(self) -> None:
        """See `Document`."""
        lengths = dict.fromkeys(("table", "scale"), self.rows)
        if "index" in self.arrays:  # of points or links, which only the geometry's record counts
            lengths["index"] = next(iter(self.arrays["index"].shape), 0)
        _check_arrays(self.arrays, self.files, lengths, ("table", "index"))
        _check_offsets(self.files, self.offsets)


def _check_arrays(
    arrays: dict[str, ArrayInfo], files: dict[str, int], lengths: dict[str, int], needed: tuple[str, ...]
) -> None:
    """Raise `FieldError` where arrays lack, have other lengths than what they are of, or take too much memory."""
    for name in needed:
        if name not in arrays:
            raise FieldError(f"the arrays {', '.join(needed)}", ", ".join(sorted(arrays))).below(".arrays")
    for name, length in lengths.items():
        if name not in arrays:
            continue
        shape, width = arrays[name].shape, _WIDTHS.get(name)
        wanted = (length,) if width is None else (length, width)
        if shape[:1] != (length,) if name == "table" else shape != wanted:
            raise FieldError(str(list(wanted)), str(list(shape))).below(f".arrays[{name!r}].shape")
        if name != "table" and (arrays[name].dtype[1] == "f") != (name in _FLOATS):
            raise FieldError("floats" if name in _FLOATS else "whole numbers", arrays[name].dtype).below(
                f".arrays[{name!r}].dtype"
            )
    most = FREE_BYTES + MAX_INFLATION * sum(files.values())
    total = sum(info.nbytes for info in arrays.values())
    if total > most:
        expected = f"at most {most} bytes in memory of {sum(files.values())} bytes of files"
        raise FieldError(expected, total).below(".arrays")


def _check_offsets(files: dict[str, int], offsets: dict[str, int]) -> None:
    """Raise `FieldError` where not every file, or anything else, has an offset."""
    if offsets and offsets.keys() != files.keys():
        raise FieldError("an offset for every file, or for none", ", ".join(sorted(offsets))).below(".offsets")
