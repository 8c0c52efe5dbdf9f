"""Frames of videos: the right one in any order and from many threads, and what is broken."""

import random
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import av
import numpy as np
import pytest

from ditr_cache.datasets import video
from ditr_cache.datasets.video import read_video_frame
from ditr_cache.errors import DataError, MissingDataError

SIZE = (64, 48)
COUNT = 90


def picture(number):
    """Six stripes of bright and dark: the number in binary digits, and a seventh."""
    bits = [(number >> bit) & 1 for bit in range(8)]
    row = np.repeat(np.where(bits, 200, 40), 8)
    return np.broadcast_to(row[None, :, None], (48, 64, 3)).astype(np.uint8)


def number_of(pixels):
    return sum((int(pixels[24, 8 * bit + 4, 1]) > 120) << bit for bit in range(8))


def write(path, *, codec="libx264", step=1, options=(("g", "30"),)):
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=60, options=dict(options))
        stream.width, stream.height = SIZE
        stream.pix_fmt, stream.time_base = "yuvj420p" if codec == "mjpeg" else "yuv420p", Fraction(1, 60)
        for number in range(COUNT):
            frame = av.VideoFrame.from_ndarray(picture(number), format="rgb24")
            frame.pts, frame.time_base = number * step, Fraction(1, 60)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module", params=["mkv", "mp4"])
def film(request, tmp_path_factory):
    """A video with frames that are decoded in another order than shown (B-frames), and three key frames."""
    return write(tmp_path_factory.mktemp("video") / f"film.{request.param}", options=[("g", "30"), ("bf", "3")])


def read(path, number, size=SIZE):
    return read_video_frame(path, number, size=size, where=f"frame {number}")


def test_frames_in_any_order(film):
    order = [*range(0, COUNT, 7), *random.Random(5).sample(range(COUNT), 25), 0, COUNT - 1, 0]
    assert [number_of(read(film, n)) for n in order] == order


def test_threads_share_one_decoder(film, monkeypatch):
    video._opened.cache_clear()
    seeks = []
    real = video._Video._seek
    monkeypatch.setattr(video._Video, "_seek", lambda self, stamp: (seeks.append(stamp), real(self, stamp))[1])
    numbers = list(range(0, COUNT, 2))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda n: number_of(read(film, n)), numbers))
    assert found == numbers
    assert len(seeks) < len(numbers) / 3  # a thread that comes late costs one
    opened = video._opened(film, film.stat().st_mtime_ns, film.stat().st_size)
    assert not opened._ready
    assert not opened._waiting


def test_what_is_far_ahead_is_not_decoded(film, monkeypatch):
    video._opened.cache_clear()
    read(film, 0)
    shown = []
    monkeypatch.setattr(
        video._Video,
        "_forward",
        lambda self, number, real=video._Video._forward: (shown.append(self._at), real(self, number))[1],
    )
    assert number_of(read(film, 89)) == 89
    assert shown == [-1]  # anew, from the last key frame


def test_the_same_frame_from_many_threads(film):
    with ThreadPoolExecutor(8) as pool:
        assert {number_of(x) for x in pool.map(lambda _: read(film, 33), range(16))} == {33}


def test_videos_of_another_rate(tmp_path):
    path = write(tmp_path / "slow.mkv", step=7)
    assert [number_of(read(path, n)) for n in (0, 1, 50, 3)] == [0, 1, 50, 3]


def test_another_codec_of_key_frames_only(tmp_path):
    path = write(tmp_path / "film.mkv", codec="mjpeg")
    assert [number_of(read(path, n)) for n in (88, 4, 5, 60)] == [88, 4, 5, 60]


def test_frames_and_sizes_that_are_not_there(film, tmp_path):
    for number in (COUNT, -1):
        with pytest.raises(DataError, match=rf"frame {number}: .*film.* has 90 frames, from 0; .*download it again"):
            read(film, number)
    with pytest.raises(DataError, match=r"frame 3: .*film.*: expected 32x24 pixels as its camera says, got 64x48"):
        read(film, 3, size=(32, 24))
    assert number_of(read(film, 3)) == 3
    with pytest.raises(MissingDataError, match=r"frame 0: no such file .*nothing.mkv"):
        read(tmp_path / "nothing.mkv", 0)


@pytest.mark.parametrize("content", [b"", b"no video" * 100])
def test_files_that_are_no_videos(tmp_path, content):
    path = tmp_path / "rgb.mkv"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"frame 0: .*rgb.mkv is not a video that can be read .*download it again"):
        read(path, 0)


def test_a_file_without_pictures(tmp_path):
    path = tmp_path / "rgb.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), dtype=np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    with pytest.raises(DataError, match=r"rgb.mkv: no picture in this video"):
        read(path, 0)


def test_a_truncated_video(tmp_path):
    path = write(tmp_path / "rgb.mkv")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert number_of(read(path, 10)) == 10
    with pytest.raises(DataError, match=r"frame 89: .*rgb.mkv has \d+ frames, from 0; the file is truncated"):
        read(path, 89)


def test_a_damaged_part_does_not_spoil_the_rest(tmp_path):
    path = write(tmp_path / "rgb.mkv", codec="mjpeg")
    content = bytearray(path.read_bytes())
    packets = [i for i in range(len(content) - 2) if content[i : i + 3] == b"\xff\xd8\xff"]
    assert len(packets) == COUNT
    length = packets[41] - packets[40] - 30  # what stands before the next one is Matroska's
    content[packets[40] : packets[40] + length] = bytes(length)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"frame 40: .*frame 40 is damaged, download the file again"):
        read(path, 40)
    assert [number_of(read(path, n)) for n in (30, 60, 80)] == [30, 60, 80]


def test_a_new_file_of_the_same_name_is_opened_anew(tmp_path):
    path = write(tmp_path / "rgb.mkv")
    assert number_of(read(path, 5)) == 5
    path.write_bytes(b"something else")
    with pytest.raises(DataError, match=r"not a video"):
        read(path, 5)


def test_a_frame_that_the_decoder_patched_up(tmp_path):
    path = write(tmp_path / "rgb.mkv", options=[("g", "30"), ("bf", "0")])
    with av.open(str(path)) as container:
        place = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size][40]
    content = bytearray(path.read_bytes())
    content[place[0] + 20 : sum(place)] = bytes(place[1] - 20)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"frame 40: .*frame 40 is damaged, download the file again"):
        read(path, 40)
    assert [number_of(read(path, n)) for n in (39, 60, 80)] == [39, 60, 80]
