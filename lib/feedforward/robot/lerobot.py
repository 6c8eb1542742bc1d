"""Episodes on disk in the LeRobot dataset format v3.0, written and read without lerobot.

A data set is a folder::

    meta/info.json                                features, sizes, paths
    meta/stats.json                               minimum, maximum, mean, deviation, quantiles
    meta/tasks.parquet                            the instructions
    meta/episodes/chunk-000/file-000.parquet      one row an episode: where its frames are
    meta/checksums.json                           SHA-256 of all other files (ours; optional)
    data/chunk-000/file-000.parquet               one row a frame, one row group an episode
    videos/<camera>/chunk-000/file-000.mp4        the frames of many episodes in a row

What lerobot writes or the hub has in this format is read, too, whatever its keys and sizes.
"""

import hashlib
import io
import json
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property, lru_cache
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from feedforward.files import DataError, sha256

VERSION = "v3.0"

_DATA = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
_VIDEO = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
_EPISODES = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
_CHECKSUMS = "meta/checksums.json"
_FILES_A_CHUNK = 1000
_DATA_MB, _VIDEO_MB = 100, 200
_QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
_COUNTERS = ("frame_index", "episode_index", "index", "task_index")
# encoder, its pixels and quality, of H.264 with loss and without, which stores them as gbrp
_LOSSY, _LOSSLESS = ("libx264", "yuv420p", "20"), ("libx264rgb", "rgb24", "0")


class VideoError(RuntimeError):
    """Images that cannot be written or read as video, and how to mend it."""


# --- episodes -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Clip:
    """The images of one camera through an episode, as an mp4.

    Attributes:
        data: The file.
        shape: (frames, height, width).
        histogram: (3, 256) how often each value occurs, by colour: exact statistics need no more.
    """

    data: bytes
    shape: tuple[int, int, int]
    histogram: np.ndarray


@dataclass(frozen=True, eq=False)
class Episode:
    """One attempt at a task: T frames.

    Attributes:
        instruction: What was to be done.
        state: (T, S) float32, what was observed.
        actions: (T, A) float32, what was done then.
        images: By camera (T, H, W, 3) uint8, or a clip.
    """

    instruction: str
    state: np.ndarray
    actions: np.ndarray
    images: Mapping[str, "np.ndarray | Clip"]

    def __len__(self) -> int:
        return len(self.state)


# --- video --------------------------------------------------------------------------------------


def _av():
    try:
        import av
    except ImportError as error:
        raise VideoError(
            f"video needs PyAV, which does not load ({error}): pip install av"
        ) from error
    return av


def encode(frames: np.ndarray, fps: float, *, lossless: bool = True) -> Clip:
    """Images as an H.264 video in an mp4.

    Every tenth frame is a key frame and none waits for a later one, so that any frame is found
    fast and clips are joined without encoding them again.

    Args:
        frames: (T, H, W, 3) uint8; height and width must be even.
        fps: Frames a second, whole or not.
        lossless: Give the same images back, for a policy that will be shown such images: what
            compression changes is as large to an encoder of images as what the robot moves. A
            simulator's take four times the space so. Browsers play the other form alone.

    Raises:
        VideoError: When there is no encoder.
        ValueError: When the frames have another shape or type, or `fps` is not positive.
    """
    frames, rate = np.asarray(frames), _rate(fps)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not len(frames):
        raise ValueError(f"frames are (T, H, W, 3) uint8, not {frames.shape} {frames.dtype}")
    count, height, width, _ = frames.shape
    if height % 2 or width % 2:
        raise ValueError(f"H.264 needs an even height and width, not {height} x {width}")
    av = _av()
    encoder, pixels, quality = _LOSSLESS if lossless else _LOSSY
    try:
        av.codec.Codec(encoder, "w")
    except Exception as error:  # PyAV's class of it differs between versions
        raise VideoError(
            f"this PyAV has no encoder {encoder!r}: pip install --force-reinstall av brings one; "
            "without images no encoder is needed"
        ) from error
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        options = {"crf": quality, "preset": "veryfast", "g": "10", "bf": "0", "threads": "1"}
        stream = container.add_stream(encoder, rate=rate, options=options)
        stream.height, stream.width, stream.pix_fmt = height, width, pixels
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    values = frames.reshape(-1, 3)
    histogram = np.stack([np.bincount(values[:, colour], minlength=256) for colour in range(3)])
    return Clip(file.getvalue(), (count, height, width), histogram)


def _rate(fps: float) -> Fraction:
    """Frames a second as a video has them.

    Raises:
        ValueError: When they are no number from a thousandth on.
    """
    number = isinstance(fps, Real) and not isinstance(fps, bool) and math.isfinite(fps)
    if not number or fps < 1e-3:
        raise ValueError(f"fps is {fps!r}; give a positive number of frames a second")
    return Fraction(fps).limit_denominator(1001)  # 30000 / 1001 is that of television


def _form(clip: Clip) -> dict[str, Any]:
    """What a clip holds and how it is encoded: clips of one form are joined."""
    av = _av()
    try:
        with av.open(io.BytesIO(clip.data)) as container:
            video = container.streams.video[0]
            return {
                "frames": video.frames,
                "video.height": video.height,
                "video.width": video.width,
                "video.codec": video.codec_context.name,
                "video.pix_fmt": video.codec_context.pix_fmt,
                "frames a second": video.average_rate,
            }
    except (OSError, ValueError, IndexError) as error:  # what PyAV raises for damaged files
        raise DataError(f"a clip cannot be read: {type(error).__name__}: {error}") from error


def _join(clips: Sequence[bytes], counts: Sequence[int], fps: float, path: Path) -> None:
    """Clips behind one another in one file, not encoded again."""
    av = _av()
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format="mp4") as joined:
        stream, before = None, 0
        for clip, count in zip(clips, counts, strict=True):
            with av.open(io.BytesIO(clip)) as source:
                video = source.streams.video[0]
                if stream is None:
                    stream = joined.add_stream_from_template(video)
                    stream.time_base = video.time_base
                for packet in source.demux(video):
                    if packet.dts is None:  # the empty packet at the end
                        continue
                    shift = round(before / fps / packet.time_base)
                    packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
                    packet.stream = stream
                    joined.mux(packet)
            before += count


def decode(path: str | os.PathLike, seconds: Sequence[float], fps: float) -> np.ndarray:
    """Frames of a video at given times.

    Args:
        path: The video.
        seconds: T times from the beginning of the video.
        fps: Frames a second.

    Returns:
        (T, H, W, 3) uint8.

    Raises:
        VideoError: When there is no decoder, the video is damaged or has no frame at a time.
    """
    av = _av()
    order = np.argsort(seconds, kind="stable")
    frames: list[np.ndarray | None] = [None] * len(order)
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            unit = float(stream.time_base)
            half, far = 0.5 / fps, 32 / fps
            decoder, frame, at = None, None, -np.inf
            for place in order:
                wanted = float(seconds[place])
                if frame is None or wanted - at > far:
                    container.seek(max(0, int((wanted + half / 2) / unit)), stream=stream)
                    decoder = container.decode(stream)
                    frame = next(decoder)
                    at = frame.pts * unit
                while at < wanted - half:
                    frame = next(decoder)
                    at = frame.pts * unit
                if at > wanted + half:
                    raise VideoError(f"{path} has no frame at {wanted:.4f} s")
                frames[place] = frame.to_ndarray(format="rgb24")
        return np.stack(frames)
    except StopIteration:
        raise VideoError(f"{path} ends before {wanted:.4f} s") from None
    except (OSError, ValueError, IndexError) as error:  # what PyAV raises for damaged files
        raise VideoError(f"{path} cannot be read: {type(error).__name__}: {error}") from error


@dataclass(frozen=True, eq=False)
class VideoFrames:
    """The images of one camera of a data set, decoded when they are asked for.

    ``frames[places]`` gives (B, H, W, 3) uint8 for an array of B places.

    Attributes:
        files: Videos.
        file: (N,) the place in `files` of each frame.
        seconds: (N,) its time there.
        fps: Frames a second.
        shape: (N, H, W, 3).
        episode: (N,) the number of each frame's episode, for messages; None where it is not known.
    """

    files: tuple[Path, ...]
    file: np.ndarray
    seconds: np.ndarray
    fps: float
    shape: tuple[int, int, int, int]
    episode: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.file)

    def __getitem__(self, places: np.ndarray | slice) -> np.ndarray:
        places = np.arange(len(self))[places]
        images = np.empty((len(places), *self.shape[1:]), dtype=np.uint8)
        for file in np.unique(self.file[places]):
            rows = np.flatnonzero(self.file[places] == file)
            try:
                images[rows] = self._decoded(file, places[rows])
            except VideoError as error:
                raise self._named(file, places[rows], error) from error
        return images

    def _decoded(self, file: int, places: np.ndarray) -> np.ndarray:
        images = decode(self.files[file], self.seconds[places], self.fps)
        _require_size(self.files[file], images.shape[1:], self.shape[1:])
        return images

    def _named(self, file: int, places: np.ndarray, error: VideoError) -> VideoError:
        """The error with the number of the episode that it comes from."""
        for episode in [] if self.episode is None else np.unique(self.episode[places]):
            try:
                self._decoded(file, places[self.episode[places] == episode])
            except VideoError as own:
                return VideoError(f"episode {episode}: {own}")
        return error

    def select(self, places: np.ndarray) -> "VideoFrames":
        """The same for some of the frames."""
        return VideoFrames(
            self.files,
            self.file[places],
            self.seconds[places],
            self.fps,
            (len(places), *self.shape[1:]),
            None if self.episode is None else self.episode[places],
        )


@dataclass(frozen=True, eq=False)
class PictureFrames:
    """The images of one camera that are stored as pictures in the table of frames.

    ``frames[places]`` gives (B, H, W, 3) uint8 for an array of B places. What is read stays for a
    while, so that frames in their order come fast.

    Attributes:
        files: Tables of frames.
        file: (N,) the place in `files` of each frame.
        row: (N,) its row there.
        key: The column.
        shape: (N, H, W, 3).
        episode: As `VideoFrames` has it.
    """

    files: tuple[Path, ...]
    file: np.ndarray
    row: np.ndarray
    key: str
    shape: tuple[int, int, int, int]
    episode: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.file)

    def __getitem__(self, places: np.ndarray | slice) -> np.ndarray:
        places = np.arange(len(self))[places]
        images = np.empty((len(places), *self.shape[1:]), dtype=np.uint8)
        for file in np.unique(self.file[places]):
            path = self.files[file]
            ends, version = _row_group_ends(path), _version(path)
            mine = np.flatnonzero(self.file[places] == file)
            rows = self.row[places[mine]]
            groups = np.searchsorted(ends, rows, side="right")
            for place, row, group in zip(mine, rows, groups, strict=True):
                named = f"row {row} of {self.key!r} in {path}"
                if self.episode is not None:
                    named = f"episode {self.episode[places[place]]}: {named}"
                column = _row_group(path, version, int(group), self.key)
                stored = column[int(row - ends[group])].as_py()  # counted from the end
                picture = _picture(named, stored)
                _require_size(named, picture.shape, self.shape[1:])
                images[place] = picture
        return images

    def select(self, places: np.ndarray) -> "PictureFrames":
        """The same for some of the frames."""
        return PictureFrames(
            self.files,
            self.file[places],
            self.row[places],
            self.key,
            (len(places), *self.shape[1:]),
            None if self.episode is None else self.episode[places],
        )


def _require_size(name: object, found: tuple[int, ...], described: tuple[int, ...]) -> None:
    if found != described:
        sizes = (" x ".join(map(str, shape[:2])) for shape in (found, described))
        raise VideoError("{} has {} pixels and {} are described".format(name, *sizes))


def _picture(name: str, stored: Any) -> np.ndarray:
    """A picture (H, W, 3) uint8 out of what a table holds of it."""
    from PIL import Image

    content = stored.get("bytes") if isinstance(stored, dict) else stored
    if not isinstance(content, bytes):
        raise VideoError(f"{name} holds no picture; what lies in files of its own is not read")
    try:
        return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    except Exception as error:  # each format has errors of its own
        raise VideoError(f"{name} is damaged: {type(error).__name__}: {error}") from error


def _row_group_ends(path: Path) -> np.ndarray:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_metadata(path)
    except (OSError, pa.ArrowException) as error:
        raise VideoError(f"{path} cannot be read: {error}") from error
    return np.cumsum([metadata.row_group(it).num_rows for it in range(metadata.num_row_groups)])


def _version(path: Path) -> tuple[int, int]:
    """What tells a file from another one that took its place."""
    found = path.stat()
    return found.st_mtime_ns, found.st_size


@lru_cache(maxsize=4)
def _row_group(path: Path, version: tuple[int, int], group: int, key: str):
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            return file.read_row_group(group, columns=[key])[key].combine_chunks()
    except (OSError, pa.ArrowException) as error:
        raise VideoError(f"{key!r} of {path} cannot be read: {error}") from error


# --- statistics ---------------------------------------------------------------------------------

STILL = 1e-4
"""A number whose standard deviation is below this stands still in the data: it is not scaled."""


def _statistics(values: np.ndarray) -> dict[str, list]:
    """Of (T, D) or (T,) numbers, over T, as stats.json has them."""
    values = np.asarray(values, dtype=np.float64).reshape(len(values), -1)
    quantiles = np.quantile(values, list(_QUANTILES.values()), axis=0)
    return {
        "min": values.min(axis=0).tolist(),
        "max": values.max(axis=0).tolist(),
        "mean": values.mean(axis=0).tolist(),
        "std": values.std(axis=0).tolist(),
        "count": [len(values)],
        **dict(zip(_QUANTILES, quantiles.tolist(), strict=True)),
    }


def _image_statistics(histogram: np.ndarray, frames: int) -> dict[str, list]:
    """Of images with values from 0 to 1, over frames and pixels, each (3, 1, 1)."""
    values = np.arange(256) / 255
    share = histogram / histogram.sum(axis=1, keepdims=True)
    mean = share @ values
    found = {
        "min": [values[colour.nonzero()[0][0]] for colour in histogram],
        "max": [values[colour.nonzero()[0][-1]] for colour in histogram],
        "mean": mean,
        "std": np.sqrt(np.maximum(share @ values**2 - mean**2, 0)),
    }
    for name, quantile in _QUANTILES.items():
        found[name] = [values[np.searchsorted(colour.cumsum(), quantile)] for colour in share]
    shaped = {name: np.reshape(numbers, (3, 1, 1)).tolist() for name, numbers in found.items()}
    return shaped | {"count": [frames]}


# --- writing ------------------------------------------------------------------------------------


def write_dataset(
    folder: str | os.PathLike,
    episodes: Iterable[Episode],
    *,
    fps: float,
    state_names: Sequence[str],
    action_names: Sequence[str],
    robot: str | None = None,
    notes: Mapping[str, Mapping[str, Any]] | None = None,
) -> Path:
    """Store episodes as a data set that appears when it is complete.

    Args:
        folder: Of the data set; it must not exist.
        episodes: In order, of like sizes and cameras; images become video.
        fps: Frames a second; lerobot itself expects a whole number.
        state_names: Of the numbers of a state.
        action_names: Of the numbers of an action.
        robot: What did it, in a word.
        notes: More files in ``meta``: by name what ``<name>.json`` holds.

    Returns:
        The folder.

    Raises:
        DataError: When the folder exists, there is no episode, or one differs from the first in
            sizes, cameras, or how its clips are encoded.
        VideoError: When there are images and no encoder.
        ValueError: When `fps` is not positive.
    """
    folder = Path(folder)
    _rate(fps)
    if folder.exists():
        raise DataError(f"{folder} exists: give another folder, or delete it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".part"))
    try:
        _Writer(temporary, fps, state_names, action_names, robot).write(episodes, notes or {})
        temporary.chmod(0o755)  # mkdtemp makes private folders
        try:
            temporary.rename(folder)
        except OSError as error:
            if not folder.exists():
                raise
            raise DataError(
                f"another process wrote {folder} meanwhile: give another folder, or delete it"
            ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


class _Writer:
    def __init__(self, root: Path, fps: float, state_names, action_names, robot):
        self.root, self.fps, self.robot = root, fps, robot
        self.names = {"observation.state": list(state_names), "action": list(action_names)}

    def write(self, episodes: Iterable[Episode], notes: Mapping[str, Mapping]) -> None:
        episodes = [self._encoded(episode) for episode in episodes]
        if not episodes:
            raise DataError("there is no episode to store")
        self._check(episodes)
        instructions = list(dict.fromkeys(episode.instruction for episode in episodes))
        columns = self._columns(episodes, instructions)
        rows = self._rows(episodes, columns)
        self._write_data(columns, rows)
        for camera in episodes[0].images:
            self._write_video(camera, [episode.images[camera] for episode in episodes], rows)
        self._write_episodes(rows)
        self._write_tasks(instructions)
        statistics = {key: _statistics(np.concatenate(values)) for key, values in columns.items()}
        for camera in episodes[0].images:
            clips = [episode.images[camera] for episode in episodes]
            statistics[_image_key(camera)] = _image_statistics(
                sum(clip.histogram for clip in clips), sum(clip.shape[0] for clip in clips)
            )
        self._write_json("meta/stats.json", statistics)
        self._write_json("meta/info.json", self._info(episodes, len(instructions)))
        for name, content in notes.items():
            self._write_json(f"meta/{name}.json", content)
        files = sorted(path for path in self.root.rglob("*") if path.is_file())
        checksums = {path.relative_to(self.root).as_posix(): sha256(path) for path in files}
        self._write_json(_CHECKSUMS, checksums)

    def _encoded(self, episode: Episode) -> Episode:
        images = {
            camera: frames if isinstance(frames, Clip) else encode(frames, self.fps)
            for camera, frames in episode.images.items()
        }
        return Episode(
            episode.instruction,
            np.asarray(episode.state, dtype=np.float32),
            np.asarray(episode.actions, dtype=np.float32),
            images,
        )

    def _check(self, episodes: Sequence[Episode]) -> None:
        sizes = tuple(map(len, self.names.values()))
        cameras = {camera: clip.shape[1:] for camera, clip in episodes[0].images.items()}
        self.forms: dict[str, dict[str, Any]] = {}
        for place, episode in enumerate(episodes):
            found = tuple(values.shape[1:] for values in (episode.state, episode.actions))
            if found != tuple((size,) for size in sizes):
                raise DataError(
                    f"episode {place} has states and actions of {found} numbers; {sizes} are named"
                )
            lengths = {len(episode.state), len(episode.actions)}
            lengths |= {clip.shape[0] for clip in episode.images.values()}
            if len(lengths) > 1 or not len(episode):
                raise DataError(f"episode {place} has parts of {sorted(lengths)} frames")
            if not (np.isfinite(episode.state).all() and np.isfinite(episode.actions).all()):
                raise DataError(f"episode {place} holds numbers that are not finite")
            if {camera: clip.shape[1:] for camera, clip in episode.images.items()} != cameras:
                raise DataError(f"episode {place} has other cameras or sizes than the first")
            for camera, clip in episode.images.items():
                self._check_clip(f"episode {place} has a clip of {camera}", camera, clip)

    def _check_clip(self, named: str, camera: str, clip: Clip) -> None:
        form = _form(clip)
        described = (form.pop("frames"), form["video.height"], form["video.width"])
        if described != tuple(clip.shape):
            raise DataError(f"{named} of {described} frames, height and width, not {clip.shape}")
        if (rate := form.pop("frames a second")) != _rate(self.fps):
            raise DataError(
                f"{named} at {float(rate):g} frames a second, and fps is {self.fps:g}: encode both "
                "alike"
            )
        if self.forms.setdefault(camera, form) != form:
            raise DataError(
                f"{named} in another form than the first's, which cannot be joined: {form}, not "
                f"{self.forms[camera]}"
            )

    def _columns(self, episodes, instructions) -> dict[str, list[np.ndarray]]:
        """The table of frames: by column one array an episode."""
        columns: dict[str, list[np.ndarray]] = {
            "observation.state": [episode.state for episode in episodes],
            "action": [episode.actions for episode in episodes],
        }
        begin = 0
        for place, episode in enumerate(episodes):
            frame = np.arange(len(episode))
            counters = {
                "timestamp": (frame / self.fps).astype(np.float32),
                "frame_index": frame,
                "episode_index": np.full(len(episode), place),
                "index": begin + frame,
                "task_index": np.full(len(episode), instructions.index(episode.instruction)),
            }
            for name, values in counters.items():
                columns.setdefault(name, []).append(values)
            begin += len(episode)
        return columns

    def _rows(self, episodes, columns) -> list[dict[str, Any]]:
        """The table of episodes."""
        bytes_of = [
            sum(values[place].nbytes for values in columns.values())
            for place in range(len(episodes))
        ]
        files, begin, rows = _places(bytes_of, _DATA_MB), 0, []
        for place, episode in enumerate(episodes):
            end = begin + len(episode)
            row = {
                "episode_index": place,
                "tasks": [episode.instruction],
                "length": len(episode),
                "data/chunk_index": files[place][0],
                "data/file_index": files[place][1],
                "dataset_from_index": begin,
                "dataset_to_index": end,
            }
            found = {key: _statistics(values[place]) for key, values in columns.items()}
            for camera, clip in episode.images.items():
                found[_image_key(camera)] = _image_statistics(clip.histogram, clip.shape[0])
            row |= {
                f"stats/{key}/{name}": numbers
                for key, statistics in found.items()
                for name, numbers in statistics.items()
            }
            rows.append(row | {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0})
            begin = end
        return rows

    def _write_data(self, columns, rows) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        types = {
            # lerobot has single numbers in a plain column
            **{
                key: pa.float32() if len(names) == 1 else pa.list_(pa.float32(), len(names))
                for key, names in self.names.items()
            },
            "timestamp": pa.float32(),
            **dict.fromkeys(_COUNTERS, pa.int64()),
        }
        schema = pa.schema(types.items())
        for path, places in _by_file(rows, "data", _DATA):
            (self.root / path).parent.mkdir(parents=True, exist_ok=True)
            # one row group an episode, whose pages have checksums: damage stays in one episode
            with pq.ParquetWriter(
                self.root / path,
                schema,
                compression="snappy",
                use_dictionary=False,
                write_page_checksum=True,
            ) as writer:
                for place in places:
                    arrays = [_arrow(columns[name][place], kind) for name, kind in types.items()]
                    writer.write_table(pa.Table.from_arrays(arrays, schema=schema))

    def _write_video(self, camera: str, clips: Sequence[Clip], rows) -> None:
        key = _image_key(camera)
        places = _places([len(clip.data) for clip in clips], _VIDEO_MB)
        before, last = 0, None
        for row, clip, place in zip(rows, clips, places, strict=True):
            before = before if place == last else 0
            row[f"videos/{key}/chunk_index"], row[f"videos/{key}/file_index"] = place
            row[f"videos/{key}/from_timestamp"] = before / self.fps
            before += clip.shape[0]
            row[f"videos/{key}/to_timestamp"] = before / self.fps
            last = place
        for path, members in _by_file(rows, f"videos/{key}", _VIDEO.replace("{video_key}", key)):
            _join(
                [clips[place].data for place in members],
                [clips[place].shape[0] for place in members],
                self.fps,
                self.root / path,
            )

    def _write_episodes(self, rows) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = self.root / _EPISODES.format(chunk_index=0, file_index=0)
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), path, compression="snappy")

    def _write_tasks(self, instructions: Sequence[str]) -> None:
        import pandas as pd

        index = pd.Index(instructions, name="task")
        tasks = pd.DataFrame({"task_index": np.arange(len(instructions))}, index=index)
        tasks.to_parquet(self.root / "meta/tasks.parquet")

    def _info(self, episodes: Sequence[Episode], tasks: int) -> dict[str, Any]:
        features: dict[str, dict[str, Any]] = {
            key: {"dtype": "float32", "shape": [len(names)], "names": names}
            for key, names in self.names.items()
        }
        for camera, clip in episodes[0].images.items():
            _, height, width = clip.shape
            features[_image_key(camera)] = {
                "dtype": "video",
                "shape": [height, width, 3],
                "names": ["height", "width", "channels"],
                "info": {
                    **self.forms[camera],
                    "video.is_depth_map": False,
                    "video.fps": self.fps,
                    "video.channels": 3,
                    "has_audio": False,
                },
            }
        features["timestamp"] = {"dtype": "float32", "shape": [1], "names": None}
        for name in _COUNTERS:
            features[name] = {"dtype": "int64", "shape": [1], "names": None}
        return {
            "codebase_version": VERSION,
            "robot_type": self.robot,
            "total_episodes": len(episodes),
            "total_frames": sum(map(len, episodes)),
            "total_tasks": tasks,
            "chunks_size": _FILES_A_CHUNK,
            "data_files_size_in_mb": _DATA_MB,
            "video_files_size_in_mb": _VIDEO_MB,
            "fps": self.fps,
            "splits": {"train": f"0:{len(episodes)}"},
            "data_path": _DATA,
            "video_path": _VIDEO if episodes[0].images else None,
            "features": features,
        }

    def _write_json(self, name: str, content: Any) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=4) + "\n", encoding="utf-8")


def _image_key(camera: str) -> str:
    return f"observation.images.{camera}"


def _places(sizes: Sequence[int], limit_mb: int) -> list[tuple[int, int]]:
    """Chunk and file of each episode, so that a file stays below its limit where it can."""
    places, file, total = [], 0, 0
    for size in sizes:
        if total and total + size > limit_mb * 2**20:
            file, total = file + 1, 0
        total += size
        places.append(divmod(file, _FILES_A_CHUNK))
    return places


def _by_file(rows, prefix: str, pattern: str) -> Iterator[tuple[str, list[int]]]:
    """The files that the table of episodes names, each with the places of its episodes."""
    members: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        path = pattern.format(
            chunk_index=row[f"{prefix}/chunk_index"], file_index=row[f"{prefix}/file_index"]
        )
        members.setdefault(path, []).append(place)
    yield from members.items()


def _arrow(values: np.ndarray, kind):
    import pyarrow as pa

    if not pa.types.is_fixed_size_list(kind):
        return pa.array(values.ravel(), type=kind)
    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])


# --- reading ------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Stored:
    """What a data set holds, its damaged episodes left out.

    Attributes:
        state: (N, S) float32; S is how many numbers there are in the shape of the feature.
        actions: (N, A) float32, likewise.
        lengths: (E,) frames of each episode.
        episodes: (E,) their numbers in the data set.
        task: (E,) the place of each one's instruction.
        instructions: Of all tasks.
        statistics: As in ``meta/stats.json``, by feature; empty where there is no such file.
        images: By camera, N frames that are decoded when asked for.
        info: ``meta/info.json``.
    """

    state: np.ndarray
    actions: np.ndarray
    lengths: np.ndarray
    episodes: np.ndarray
    task: np.ndarray
    instructions: tuple[str, ...]
    statistics: dict[str, dict[str, np.ndarray]]
    images: dict[str, VideoFrames | PictureFrames]
    info: dict[str, Any]


def read_dataset(
    folder: str | os.PathLike,
    *,
    state_key: str = "observation.state",
    action_key: str = "action",
) -> Stored:
    """Read a data set; episodes that are damaged are left out with a warning that names them.

    Where there are checksums, a description that was changed since it was written is refused, and
    frames that were are read with a warning. Where there are none, of videos the last frame of each
    episode is looked at; other damage is an error when the images are asked for.

    Args:
        folder: Of the data set.
        state_key: The feature that holds the states.
        action_key: The feature that holds the actions.

    Raises:
        DataError: When it is no data set, has another version or lacks a feature, when what
            describes it is damaged, or no episode is left.
    """
    return _Reader(Path(folder), state_key, action_key).read()


def changed_files(folder: str | os.PathLike) -> list[str]:
    """The files of a data set that are missing or not as they were written, by its checksums.

    Without checksums nothing can be told, and their own file is what is missing.

    Args:
        folder: Of the data set.
    """
    root = Path(folder)
    try:
        checksums = json.loads((root / _CHECKSUMS).read_text(encoding="utf-8"))
        return [
            name
            for name, checksum in checksums.items()
            if not (root / name).is_file() or sha256(root / name) != checksum
        ]
    except (OSError, ValueError, AttributeError):  # not there, or not what was written
        return [_CHECKSUMS]


def dataset_key(folder: str | os.PathLike) -> str:
    """What tells a data set from others: 16 hexadecimal digits.

    Of all files that describe it, and of the names and sizes of those that hold its frames, which
    may be too many to be read for it.

    Args:
        folder: Of the data set.

    Raises:
        DataError: When it is no data set.
    """
    root = Path(folder)
    if not (root / "meta/info.json").is_file():
        raise DataError(f"{root} is no data set in the LeRobot format {VERSION}: no meta/info.json")
    files = {
        path.relative_to(root).as_posix(): path
        for part in ("meta", "data", "videos")
        for path in (root / part).rglob("*")
        if path.is_file()
    }
    told = [
        (name, sha256(path) if name.startswith("meta/") else path.stat().st_size)
        for name, path in sorted(files.items())
    ]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


class _Reader:
    def __init__(self, root: Path, state_key: str, action_key: str):
        self.root = root
        path = root / _CHECKSUMS
        self.checksums = self._json(_CHECKSUMS) if path.is_file() else {}
        self.info = self._described("meta/info.json", self._json)
        version = self.info.get("codebase_version")
        if version != VERSION:
            older = str(version).startswith(("v1.", "v2."))
            raise DataError(
                f"{root} has the LeRobot format {version!r} and {VERSION!r} is read here. "
                + (
                    "lerobot converts: python -m lerobot.scripts.convert_dataset_v21_to_v30"
                    if older
                    else f"On the hub a data set may have a revision {VERSION!r}: take that"
                )
            )
        self.features = self._features()
        for key in (state_key, action_key):
            if key not in self.features:
                raise DataError(f"{root} has no feature {key!r}; it has {sorted(self.features)}")
        self.keys = {"state": state_key, "actions": action_key}
        self.fps = self.info.get("fps")
        try:
            _rate(self.fps)
        except ValueError as error:
            raise DataError(f"{root}/meta/info.json gives no rate of frames: {error}") from None

    def _features(self) -> dict[str, dict[str, Any]]:
        features = self.info.get("features")
        if not isinstance(features, dict):
            raise DataError(f"{self.root}/meta/info.json describes no features")
        for key, it in features.items():
            shape = it.get("shape") if isinstance(it, dict) else None
            whole = isinstance(shape, list) and all(isinstance(size, int) for size in shape)
            if not whole or (it.get("dtype") in ("image", "video") and len(shape) != 3):
                raise DataError(f"{self.root}/meta/info.json describes {key!r} by {it}: no shape")
        return features

    def _size(self, key: str) -> int:
        """Numbers of a feature in a frame."""
        return math.prod(self.features[key]["shape"])

    def read(self) -> Stored:
        statistics = self._statistics("meta/stats.json")
        tasks = self._described("meta/tasks.parquet", self._tasks)
        rows = self._episodes()
        kept: list[tuple[dict[str, Any], dict[str, Any]]] = []
        for path, places in self._files(rows, "data", "data_path", _DATA):
            kept += self._frames(path, [rows[place] for place in places], list(tasks))
        kept.sort(key=lambda pair: pair[0]["episode_index"])
        kept = self._with_sound_videos(kept)
        if not kept:
            raise DataError(f"{self.root} has no episode that can be read")
        rows, parts = zip(*kept, strict=True)
        lengths = np.array([row["length"] for row in rows])
        return Stored(
            state=np.concatenate([part["state"] for part in parts]),
            actions=np.concatenate([part["actions"] for part in parts]),
            lengths=lengths,
            episodes=np.array([row["episode_index"] for row in rows]),
            task=np.array([part["task"] for part in parts]),
            instructions=tuple(tasks.values()),
            statistics=statistics,
            images={
                **{_camera(key): self._video_frames(key, rows) for key in self._video_keys},
                **{_camera(it): self._picture_frames(it, rows, parts) for it in self._picture_keys},
            },
            info=self.info,
        )

    def _json(self, name: str) -> dict[str, Any]:
        path = self.root / name
        if not path.is_file():
            raise DataError(
                f"{path} is missing: {self.root} is no data set in the LeRobot format {VERSION}"
            )
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{path} is damaged: {error}") from error
        if not isinstance(content, dict):
            raise DataError(f"{path} is damaged: it holds no object")
        return content

    def _is_whole(self, name: str) -> bool:
        """Whether a file is as it was written, where that is known."""
        path = self.root / name
        return path.is_file() and self.checksums.get(name) in (None, sha256(path))

    def _described(self, name: str, read: Callable[[str], Any]) -> Any:
        """A file without which the others say nothing."""
        if (self.root / name).is_file() and not self._is_whole(name):
            raise DataError(
                f"{self.root / name} is damaged or was changed since it was written: restore it, "
                f"or, if the change was meant, delete {_CHECKSUMS}"
            )
        return read(name)

    def _statistics(self, name: str) -> dict[str, dict[str, np.ndarray]]:
        """Those that are there; of states and actions they must fit."""
        if not (self.root / name).is_file() and name not in self.checksums:
            return {}
        found: dict[str, dict[str, np.ndarray]] = {}
        for key, own in self._described(name, self._json).items():
            if own is None:
                continue
            try:
                found[key] = {it: np.asarray(numbers, dtype=float) for it, numbers in own.items()}
            except (AttributeError, TypeError, ValueError) as error:
                if key in self.keys.values():
                    raise DataError(f"{self.root / name} is damaged at {key!r}: {error}") from error
        for key in set(self.keys.values()) & found.keys():
            for it in ("mean", "std", "min", "max"):
                numbers = found[key].get(it, np.zeros(self._size(key)))
                sound = np.isfinite(numbers).all() and not (it == "std" and (numbers < 0).any())
                if numbers.size != self._size(key) or not sound:
                    raise DataError(
                        f"{self.root / name} gives {key!r}, which has {self._size(key)} numbers, "
                        f"the {it} {numbers.tolist()}: mend the file, or delete it to have the "
                        "statistics computed"
                    )
        return found

    def _tasks(self, name: str) -> dict[int, str]:
        """The instructions by their numbers, which need not go from 0 without gaps."""
        table = self._table(name)
        text = next((key for key in table.column_names if key != "task_index"), None)
        if text is None or "task_index" not in table.column_names:
            raise DataError(f"{self.root / name} has the columns {table.column_names}")
        numbers, words = table["task_index"].to_pylist(), table[text].to_pylist()
        wrong = [
            pair
            for pair in zip(numbers, words, strict=True)
            if not (isinstance(pair[0], int) and isinstance(pair[1], str))
        ]
        if wrong or len(set(numbers)) < len(numbers):
            raise DataError(
                f"{self.root / name} names {words} by {numbers}; each task needs an instruction "
                "and a number of its own"
            )
        return dict(sorted(zip(numbers, words, strict=True)))

    def _table(self, name: str):
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            return pq.read_table(self.root / name, page_checksum_verification=True)
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{self.root / name} cannot be read: {error}") from error

    def _episodes(self) -> list[dict[str, Any]]:
        files = sorted((self.root / "meta/episodes").glob("*/*.parquet"))
        rows = []
        for path in files:
            name = path.relative_to(self.root).as_posix()
            table = self._described(name, self._table)
            self._require_columns(name, table.column_names, ["episode_index", *self._needed])
            wanted = [key for key in table.column_names if not key.startswith("stats/")]
            rows += table.select(wanted).to_pylist()
        if not rows:
            raise DataError(f"{self.root} describes no episode in meta/episodes")
        if None in (numbers := [row["episode_index"] for row in rows]):
            raise DataError(f"{self.root} describes an episode without number in meta/episodes")
        if len(set(numbers)) < len(numbers):
            raise DataError(f"{self.root} describes an episode twice in meta/episodes")
        described = []
        for row in sorted(rows, key=lambda row: row["episode_index"]):
            missing = [
                key
                for key in self._needed
                if not isinstance(row[key], Real if key.endswith("timestamp") else int)
            ]
            if missing:
                self._skip(row, f"meta/episodes gives it no {', '.join(missing)}")
            else:
                described.append(row)
        return described

    @cached_property
    def _needed(self) -> list[str]:
        """What the table of episodes says of each, beside its number."""
        of_video = ("chunk_index", "file_index", "from_timestamp")
        videos = [f"videos/{key}/{it}" for key in self._video_keys for it in of_video]
        return ["length", "data/chunk_index", "data/file_index", *videos]

    def _require_columns(self, name: str, there: Sequence[str], needed: Sequence[str]) -> None:
        if missing := [key for key in needed if key not in there]:
            raise DataError(
                f"{self.root / name} has no column {', '.join(map(repr, missing))}; it has "
                f"{sorted(key for key in there if not key.startswith('stats/'))}"
            )

    def _files(self, rows, prefix: str, named: str, default: str) -> list[tuple[str, list[int]]]:
        """The files that hold some episodes, by the pattern that info.json has or lerobot's."""
        pattern = self.info.get(named) or default
        key = prefix.removeprefix("videos/")
        try:
            return list(_by_file(rows, prefix, pattern.replace("{video_key}", key)))
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise DataError(
                f"{self.root}/meta/info.json has the {named} {pattern!r}, which does not name the "
                f"files by chunk_index and file_index as {default!r} does"
            ) from error

    def _frames(self, name: str, rows, tasks: Sequence[int]) -> list[tuple[dict, dict]]:
        """The episodes of one file with their frames, without the damaged ones."""
        import pyarrow as pa

        tables, places, damage = self._row_groups(name)
        if damage is None and not self._is_whole(name):
            self._warn_of_change(name)
        table = pa.concat_tables(tables) if tables else None
        numbers = self._numbers(name, table, "episode_index")[:, 0] if table else np.empty(0)
        found = []
        for row in rows:
            mine = np.flatnonzero(numbers == row["episode_index"])
            if not len(mine):
                self._skip(row, damage or f"{name} does not hold it")
                continue
            here = slice(mine[0], mine[-1] + 1)
            part = table.slice(mine[0], mine[-1] - mine[0] + 1)
            episode = {
                kind: self._numbers(name, part, key).astype(np.float32)
                for kind, key in self.keys.items()
            }
            task = self._numbers(name, part, "task_index")[0, 0]
            episode |= {"rows": places[here], "file": name}
            episode["task"] = tasks.index(task) if task in tasks else None
            if wrong := self._wrong(row, part, episode, tasks):
                self._skip(row, wrong)
            else:
                found.append((row, episode))
        return found

    def _row_groups(self, name: str):
        """What can be read of a file of frames, in which rows, and what was wrong, or None."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = [*self.keys.values(), "frame_index", "episode_index", "task_index"]
        needed = [*columns, *self._picture_keys]
        tables, places, damage = [], [np.array([], dtype=np.int64)], None
        try:
            with pq.ParquetFile(self.root / name, page_checksum_verification=True) as file:
                self._require_columns(name, file.schema_arrow.names, needed)
                begin = 0
                for group in range(file.num_row_groups):
                    end = begin + file.metadata.row_group(group).num_rows
                    try:
                        tables.append(file.read_row_group(group, columns=columns))
                        places.append(np.arange(begin, end))
                    except (OSError, pa.ArrowException) as error:
                        damage = f"{name} is damaged: {error}"
                    begin = end
        except (OSError, pa.ArrowException) as error:
            damage = f"{name} cannot be read: {error}"
        return tables, np.concatenate(places), damage

    def _numbers(self, name: str, table, key: str) -> np.ndarray:
        try:
            return _array(table[key])
        except (TypeError, ValueError) as error:
            kind = table[key].type
            raise DataError(f"{self.root / name} has no numbers in {key!r} but {kind}") from error

    def _wrong(self, row, part, episode, tasks: Sequence[int]) -> str | None:
        frames = self._numbers(episode["file"], part, "frame_index")[:, 0]
        if len(frames) != row["length"] or (frames != np.arange(len(frames))).any():
            return f"it has {len(frames)} frames in order or not, and {row['length']} are described"
        for kind, key in self.keys.items():
            shape = (row["length"], self._size(key))
            if episode[kind].shape != shape:
                return f"its {key} has shape {episode[kind].shape}, and {shape} is described"
            if not np.isfinite(episode[kind]).all():
                return f"its {key} holds numbers that are not finite"
        if episode["task"] is None:
            found = part["task_index"][0].as_py()
            return f"its task {found} is not among the {len(tasks)} of meta/tasks.parquet"
        return None

    def _warn_of_change(self, name: str) -> None:
        warnings.warn(
            f"{self.root / name} was changed since it was written, and what it holds now is read, "
            f"with the statistics of before: restore it, or, if the change was meant, delete "
            f"{_CHECKSUMS}",
            stacklevel=2,
        )

    def _skip(self, row: Mapping[str, Any], why: str) -> None:
        name = f"episode {row['episode_index']} ({', '.join(map(repr, row.get('tasks') or []))})"
        warnings.warn(f"{self.root}: {name} is left out: {why}", stacklevel=2)

    @cached_property
    def _picture_keys(self) -> list[str]:
        return [key for key, it in self.features.items() if it.get("dtype") == "image"]

    @cached_property
    def _video_keys(self) -> list[str]:
        return [key for key, it in self.features.items() if it.get("dtype") == "video"]

    def _with_sound_videos(self, kept):
        """Leave out what lies in the damaged part of a video, or in one that is missing."""
        try:
            _av()
        except VideoError:  # states are read without it
            return kept
        wrong: dict[int, str] = {}
        for key in self._video_keys:
            rows = [row for row, _ in kept]
            for name, places in self._videos(key, rows):
                if name in self.checksums and self._is_whole(name):
                    continue
                # known to be changed: all is looked at; else the last frame says that it is whole
                changed = name in self.checksums
                found = self._undecodable(key, {place: rows[place] for place in places}, changed)
                if changed and not found:
                    self._warn_of_change(name)
                wrong = found | wrong
        for place, problem in sorted(wrong.items()):
            self._skip(kept[place][0], problem)
        return [pair for place, pair in enumerate(kept) if place not in wrong]

    def _undecodable(self, key: str, rows: Mapping[int, Mapping], every: bool) -> dict[int, str]:
        """Which episodes of a video cannot be shown, and why."""

        def look(some: Sequence[Mapping]) -> None:
            frames = replace(self._video_frames(key, some), episode=None)  # which the skip names
            ends = np.cumsum([row["length"] for row in some]) - 1
            frames[:] if every else frames[ends]

        if not every:
            with suppress(VideoError):  # in one go, which is fast
                look(list(rows.values()))
                return {}
        found = {}
        for place, row in rows.items():
            try:
                look([row])
            except VideoError as error:
                found[place] = str(error)
        return found

    def _videos(self, key: str, rows) -> list[tuple[str, list[int]]]:
        return self._files(rows, f"videos/{key}", "video_path", _VIDEO)

    def _video_frames(self, key: str, rows: Sequence[Mapping[str, Any]]) -> VideoFrames:
        lengths = [row["length"] for row in rows]
        named, file = self._videos(key, rows), np.empty(len(rows), dtype=np.int64)
        for number, (_, places) in enumerate(named):
            file[places] = number
        seconds = [
            row[f"videos/{key}/from_timestamp"] + np.arange(row["length"]) / self.fps
            for row in rows
        ]
        return VideoFrames(
            files=tuple(self.root / name for name, _ in named),
            file=np.repeat(file, lengths),
            seconds=np.concatenate(seconds),
            fps=self.fps,
            shape=(sum(lengths), *self._image_shape(key)),
            episode=np.repeat([row["episode_index"] for row in rows], lengths),
        )

    def _picture_frames(self, key: str, rows, parts) -> PictureFrames:
        lengths = [row["length"] for row in rows]
        names = [self.root / part["file"] for part in parts]
        files = tuple(dict.fromkeys(names))
        return PictureFrames(
            files=files,
            file=np.repeat([files.index(name) for name in names], lengths),
            row=np.concatenate([part["rows"] for part in parts]),
            key=key,
            shape=(sum(lengths), *self._image_shape(key)),
            episode=np.repeat([row["episode_index"] for row in rows], lengths),
        )

    def _image_shape(self, key: str) -> tuple[int, int, int]:
        """Height, width, and the three colours that any image is shown in.

        Some data sets name the colours first, and some have them there without saying so.
        """
        shape, names = self.features[key]["shape"], self.features[key].get("names") or []
        colours = ("channel", "channels", "c")
        named = [place for place, name in enumerate(names) if name in colours]
        first = named == [0] if named else shape[0] in (1, 3, 4) and shape[2] not in (1, 3, 4)
        return (*(shape[1:] if first else shape[:2]), 3)


def _camera(key: str) -> str:
    return key.removeprefix("observation.images.")


def _array(column) -> np.ndarray:
    """A column of lists, or of lists in them, as (T, D) float64, one of numbers as (T, 1).

    Lists of several lengths, and none in the place of one, give (T, 0).
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    values = column.combine_chunks()
    rows = len(values)
    while True:
        if isinstance(values, pa.ExtensionArray):
            values = values.storage
        lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
        if not any(is_one(values.type) for is_one in lists):
            break
        if values.null_count or pc.count_distinct(pc.list_value_length(values)).as_py() > 1:
            return np.empty((rows, 0))
        values = values.flatten()
    numbers = values.to_numpy(zero_copy_only=False).astype(np.float64)
    return numbers.reshape(rows, -1) if rows else np.empty((0, 1))
