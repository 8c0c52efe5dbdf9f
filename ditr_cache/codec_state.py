"""What a codec was fitted to be, as `codec.json` beside `vfm.json`: read once by whoever decodes rows."""

from __future__ import annotations

import base64
import binascii
import hashlib
import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ditr_cache.codecs import Codec, make_codec, needs_fit
from ditr_cache.errors import CorruptCacheError, MismatchError, UsageError
from ditr_cache.files import Paths, exists, read_document, read_documents, write_text
from ditr_cache.schema import ArrayInfo, ArrayName, Document, VFMSpec


@dataclass(frozen=True, kw_only=True)
class CodecState(Document):
    """The arrays that a codec was fitted to be.

    Args:
        arrays: shape, dtype and SHA-256 of each.
        content: its bytes in C order, as base64.
    """

    kind: ClassVar[str] = "codec"

    arrays: dict[ArrayName, ArrayInfo] = field(default_factory=dict)
    content: dict[ArrayName, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        infos = {k: ArrayInfo(**v) if isinstance(v, dict) else v for k, v in self.arrays.items()}
        object.__setattr__(self, "arrays", infos)

    @classmethod
    def of(cls, codec: Codec) -> CodecState:
        """The state of a codec."""
        arrays = {name: np.ascontiguousarray(array) for name, array in sorted(codec.arrays.items())}
        infos = {
            name: ArrayInfo(shape=a.shape, dtype=a.dtype.str, sha256=hashlib.sha256(a.tobytes()).hexdigest())
            for name, a in arrays.items()
        }
        content = {name: base64.b64encode(array.tobytes()).decode("ascii") for name, array in arrays.items()}
        return cls(arrays=infos, content=content)

    def decoded(self, where: str) -> dict[str, NDArray[Any]]:
        """The arrays. Raises `CorruptCacheError` where they are not what is said of them."""
        found = {}
        for name, info in self.arrays.items():
            try:
                content = base64.b64decode(self.content[name], validate=True)
            except (KeyError, binascii.Error, ValueError) as error:
                raise CorruptCacheError(f"{where}: array {name!r} is no base64 ({error})") from error
            if len(content) != math.prod(info.shape) * np.dtype(info.dtype).itemsize:
                raise CorruptCacheError(
                    f"{where}: array {name!r}: expected {info.dtype}{list(info.shape)}, got {len(content)} bytes"
                )
            found[name] = np.frombuffer(content, dtype=info.dtype).reshape(info.shape)
        return found

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the names, shapes, dtypes and bytes of all arrays; empty where there is none."""
        if not self.arrays:
            return ""
        text = "".join(f"{n}{i.dtype}{list(i.shape)}{self.content[n]}" for n, i in sorted(self.arrays.items()))
        return hashlib.sha256(text.encode()).hexdigest()


def write_codec(paths: Paths, spec: VFMSpec, codec: Codec) -> None:
    """Write what the codec of a VFM was fitted to be, where it was fitted."""
    path = paths.features(spec.key) / "codec.json"
    if spec.codec_digest and not exists(path):
        write_text(path, CodecState.of(codec).to_json())


def read_codec(paths: Paths, spec: VFMSpec) -> Codec:
    """The codec of a VFM.

    Raises:
        MissingDataError, CorruptCacheError: what it was fitted to be is not there, or damaged.
        MismatchError: it is that of another store.
    """
    if not spec.codec_digest:
        return make_codec(spec.codec, spec.dim)
    path = paths.features(spec.key) / "codec.json"
    state = read_document(path, CodecState)
    if state.digest != spec.codec_digest:
        raise MismatchError(
            f"{path}: the codec of another store: expected digest {spec.codec_digest[:16]}, got {state.digest[:16]}; "
            "restore the file, or remove the store and extract again"
        )
    return make_codec(spec.codec, spec.dim, state.decoded(str(path)))


def codec_spec(spec: VFMSpec, codec: Codec) -> VFMSpec:
    """The spec of a VFM whose rows this codec stores."""
    return replace(
        spec,
        codec=codec.name,
        codec_digest=CodecState.of(codec).digest,
        explained_variance=codec.explained_variance,
    )


def find_fitted(paths: Paths, spec: VFMSpec) -> VFMSpec | None:
    """The store of a cache that is what `spec` says, under a codec that was fitted before; None where there is none.

    A run that goes on encodes with what the first one fitted: fitted again, the codec and with it the key might differ.

    Args:
        paths: of the cache.
        spec: of the VFM; its `codec_digest` and `explained_variance` say nothing yet.

    Raises:
        UsageError: there are several.
    """
    found = [
        stored
        for _, stored in read_documents([store / "vfm.json" for store in paths.stores], VFMSpec)
        if isinstance(stored, VFMSpec) and stored.codec_digest and _unfitted(stored) == _unfitted(spec)
    ]
    if len(found) > 1:
        raise UsageError(
            f"cache {str(paths.root)!r} has several stores of {spec.name!r} under {spec.codec}, fitted to different "
            f"rows: {', '.join(s.key for s in found)}; remove all but one with `ditr-cache rm`, or use another cache"
        )
    return found[0] if found else None


def as_stored(paths: Paths, spec: VFMSpec) -> VFMSpec:
    """The spec as the cache has it: with its codec fitted, where it has to be and was. Raises as `find_fitted`."""
    return (find_fitted(paths, spec) or spec) if needs_fit(spec.codec) else spec


def _unfitted(spec: VFMSpec) -> VFMSpec:
    return replace(spec, codec_digest="", explained_variance=None)
