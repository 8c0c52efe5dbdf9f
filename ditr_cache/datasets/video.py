"""Single frames of a video, by their number in the order in which they are shown.

A frame is decoded from the key frame before it, so frames are best asked for in ascending order: then every part of the
video is decoded once, or skipped. Threads that ask at the same time share one decoder; what one of them passes on its
way and another waits for is kept for it, and nothing else is.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditr_cache.datasets.images import MAX_PIXELS
from ditr_cache.errors import DataError, MissingDataError, errors_at
from ditr_cache.pointcloud.optional import require

CONTAINERS = {"format_whitelist": "matroska,webm,mov,mp4,m4a,3gp,3g2,mj2", "protocol_whitelist": "file"}
"""What FFmpeg may open. It goes by content and knows hundreds of formats; some are lists of other files or addresses,
which it would read in place of the video."""

_OPEN_VIDEOS = 2  # that of the scene at work, and that of the next one
_WORTH_A_SEEK = 32  # frames that are skipped: fewer are decoded in about the time that it takes to start anew
_opening = threading.Lock()


def read_video_frame(path: Path, number: int, *, size: tuple[int, int], where: str) -> NDArray[np.uint8]:
    """[height, width, 3] uint8 RGB of frame `number` of a video. Rotation tags are not applied.

    Args:
        path: of the video.
        number: of the frame, from 0.
        size: (width, height) that the camera promises.
        where: names the frame in errors.

    Raises:
        MissingDataError: no such file.
        DataError: not a video, truncated, damaged at this frame, or of another size.
        UsageError: the library that decodes videos is not installed.
    """
    try:
        stat = path.stat()
    except FileNotFoundError as error:
        raise MissingDataError(f"{where}: no such file {path}") from error
    except OSError as error:
        raise DataError(f"{where}: {path} cannot be read ({error})") from error
    with errors_at(where):
        with _opening:  # one thread looks through a new video, the others wait for it
            video = _opened(path, stat.st_mtime_ns, stat.st_size)
        return video.read(number, size)


def require_video() -> Any:
    """The library that decodes videos. Raises `UsageError` where it is not installed."""
    return require("av", "frames of videos", "datasets")


def _exact_conversion(flags: Any) -> Any:
    """How to convert to RGB: by default every value would come out one too small, and two with rounding alone."""
    flag = flags.BICUBIC
    for name in ("ACCURATE_RND", "FULL_CHR_H_INT", "FULL_CHR_H_INP"):  # not in older versions
        flag = flag | getattr(flags, name) if hasattr(flags, name) else flag
    return flag


@lru_cache(maxsize=_OPEN_VIDEOS)
def _opened(path: Path, changed: int, size: int) -> _Video:
    return _Video(path)


class _Video:
    """An open video, its time stamps, and the one decoder of it.

    Raises:
        DataError: not a video, or one whose frames have no time stamps.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        av = require_video()
        self._invalid = av.error.InvalidDataError
        self._errors = (av.error.FFmpegError, ValueError, IndexError, OverflowError)
        self._reformatter = av.video.reformatter.VideoReformatter
        self._conversion = _exact_conversion(av.video.reformatter.Interpolation)
        self._waiting: Counter[int] = Counter()
        self._ready: dict[int, Any] = {}
        self._counting = threading.Lock()
        self._decoding = threading.Lock()
        with self._readable("is not a video that can be read"):
            self._container = av.open(str(path), options=CONTAINERS)
            if not self._container.streams.video:
                raise DataError(f"{path}: no picture in this video")
            self._stream = self._container.streams.video[0]
            self._stream.thread_type = "AUTO"
            if self._stream.width * self._stream.height > MAX_PIXELS:
                raise DataError(f"{path}: frames of {self._stream.width}x{self._stream.height} pixels, too large")
            self._stamps, self._keys = self._index()
        self._frames: Iterator[Any] | None = None
        self._at = -1

    def read(self, number: int, size: tuple[int, int]) -> NDArray[np.uint8]:
        """RGB of one frame. Raises `DataError`."""
        if not 0 <= number < len(self._stamps):
            raise DataError(
                f"{self.path} has {len(self._stamps)} frames, from 0; the file is truncated or of another scene, "
                "download it again"
            )
        with self._counting:
            self._waiting[number] += 1
        try:
            with self._decoding:
                if number not in self._ready:
                    self._decode(number)
                frame = self._ready[number]
        finally:
            with self._counting:
                self._waiting[number] -= 1
                if not self._waiting[number]:
                    del self._waiting[number]
                    self._ready.pop(number, None)
        if (frame.width, frame.height) != size:
            raise DataError(
                f"{self.path}: expected {size[0]}x{size[1]} pixels as its camera says, got {frame.width}x{frame.height}"
            )
        try:
            # A converter of its own: that of the frame would serve two threads at once, which crashes.
            rgb = self._reformatter().reformat(frame, format="rgb24", interpolation=self._conversion)
            pixels: NDArray[np.uint8] = rgb.to_ndarray()
        except self._errors as error:
            raise DataError(f"{self.path}: frame {number} cannot be converted to RGB ({error})") from error
        return pixels

    def _index(self) -> tuple[list[int], list[int]]:
        """Time stamps of all frames in the order in which they are shown, and of the key frames."""
        stamps: list[int] = []
        keys: list[int] = []
        for packet in self._container.demux(self._stream):
            if not packet.size or packet.is_discard:
                continue
            if packet.pts is None:
                raise DataError(f"{self.path}: its frames have no time stamps, expected a Matroska or MP4 file")
            stamps.append(packet.pts)
            if packet.is_keyframe or not keys:
                keys.append(packet.pts)
        stamps.sort()
        if len(set(stamps)) != len(stamps):
            raise DataError(f"{self.path}: two frames have one time stamp: which is which cannot be told")
        return stamps, sorted(keys)

    def _decode(self, number: int) -> None:
        """Get a frame ready, and first those before it, not yet passed, that others wait for."""
        with self._counting:
            ahead = sorted(n for n in self._waiting if self._at < n < number and n not in self._ready)
        for n in ahead:
            with suppress(DataError):  # whoever waits for it comes across the same
                self._advance(n)
        self._advance(number)

    def _advance(self, number: int) -> None:
        with self._readable(f"cannot be decoded at frame {number}"):
            key = max(bisect_right(self._keys, self._stamps[number]) - 1, 0)
            ahead = self._frames is not None and 0 <= self._at < number
            if not ahead or bisect_right(self._stamps, self._keys[key]) - self._at > _WORTH_A_SEEK:
                self._seek(self._keys[key])
            first = self._forward(number)
            if first > number:  # containers seek by the order of decoding, and may land too late
                self._seek(self._keys[max(key - 1, 0)])
                self._forward(number)
            if number not in self._ready:
                raise DataError(f"{self.path}: frame {number} is damaged, download the file again")

    def _seek(self, stamp: int) -> None:
        """Go on from the key frame at or before `stamp`."""
        self._frames, self._at = None, -1
        self._container.seek(stamp, stream=self._stream)
        self._frames = self._decoded()

    def _decoded(self) -> Iterator[Any]:
        """Frames from here on, in the order in which they are shown, without those that cannot be decoded."""
        for packet in self._container.demux(self._stream):
            with suppress(self._invalid):
                yield from packet.decode()

    def _forward(self, number: int) -> int:
        """Decode up to a frame, and keep what is waited for. Returns the number of the first frame that was seen."""
        assert self._frames is not None
        first = -1
        for frame in self._frames:
            position = -1 if frame.pts is None else bisect_right(self._stamps, frame.pts) - 1
            if position < 0 or self._stamps[position] != frame.pts:
                continue
            self._at = position
            first = position if first < 0 else first
            if position in self._waiting and not frame.is_corrupt:
                self._ready[position] = frame
            if position >= number:
                return first
        self._frames, self._at = None, -1
        return first

    @contextmanager
    def _readable(self, what: str) -> Iterator[None]:
        """Turns what the library raises into `DataError`, and starts anew after it."""
        try:
            yield
        except DataError:
            raise
        except self._errors as error:
            self._frames, self._at = None, -1
            raise DataError(f"{self.path} {what} ({error}); the file is damaged, download it again") from error
