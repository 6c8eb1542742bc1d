"""The format is LeRobot's v3.0, statistics are exact, damage costs the damaged episodes alone."""

import io
import json
import sys
import warnings
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from feedforward.files import DataError
from feedforward.robot import lerobot
from feedforward.robot.demos import load_demonstrations
from feedforward.robot.lerobot import (
    Clip,
    Episode,
    VideoError,
    changed_files,
    decode,
    encode,
    read_dataset,
    write_dataset,
)

KEY = "observation.images.front"


def write(folder, episodes, **more):
    return write_dataset(
        folder,
        episodes,
        fps=20,
        state_names=[f"s{i}" for i in range(5)],
        action_names=["x", "y", "z"],
        robot="arm",
        **more,
    )


@pytest.fixture
def stored(tmp_path, make_episodes):
    return write(tmp_path / "set", make_episodes())


def shown(frames):
    """Which frame an image of `make_episodes` says it is."""
    return np.round((frames.mean(axis=(1, 2, 3)) - 20) / 3).astype(int) % 64


# --- the format ---------------------------------------------------------------------------------


def test_files_and_keys_are_those_of_the_format(stored, make_episodes):
    files = {path.relative_to(stored).as_posix() for path in stored.rglob("*") if path.is_file()}
    assert files == {
        "meta/info.json",
        "meta/stats.json",
        "meta/tasks.parquet",
        "meta/checksums.json",
        "meta/episodes/chunk-000/file-000.parquet",
        "data/chunk-000/file-000.parquet",
        f"videos/{KEY}/chunk-000/file-000.mp4",
    }
    info = json.loads((stored / "meta/info.json").read_text())
    episodes = make_episodes()
    assert info["codebase_version"] == "v3.0"
    assert info["robot_type"] == "arm"
    assert (info["fps"], info["total_episodes"], info["total_tasks"]) == (20, 4, 2)
    assert info["total_frames"] == sum(map(len, episodes))
    assert info["splits"] == {"train": "0:4"}
    assert info["data_path"] == "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
    assert info["video_path"] == (
        "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
    )
    assert set(info["features"]) == {
        *("observation.state", "action", KEY, "timestamp"),
        *("frame_index", "episode_index", "index", "task_index"),
    }
    assert info["features"]["action"] == {
        "dtype": "float32",
        "shape": [3],
        "names": ["x", "y", "z"],
    }
    assert info["features"][KEY]["dtype"] == "video"
    assert info["features"][KEY]["shape"] == [16, 16, 3]


def test_tables_hold_the_episodes(stored, make_episodes):
    episodes = make_episodes()
    frames = pq.read_table(stored / "data/chunk-000/file-000.parquet").to_pydict()
    assert np.array_equal(
        np.array(frames["observation.state"], dtype=np.float32),
        np.concatenate([episode.state for episode in episodes]),
    )
    assert frames["index"] == list(range(len(frames["index"])))
    within = [step for episode in episodes for step in range(len(episode))]
    assert frames["frame_index"] == within
    assert np.allclose(frames["timestamp"], np.array(within) / 20)
    rows = pq.read_table(stored / "meta/episodes/chunk-000/file-000.parquet").to_pylist()
    begin = 0
    for place, (row, episode) in enumerate(zip(rows, episodes, strict=True)):
        end = begin + len(episode)
        assert row["episode_index"] == place
        assert row["tasks"] == [episode.instruction]
        assert row["length"] == len(episode)
        assert (row["dataset_from_index"], row["dataset_to_index"]) == (begin, end)
        assert row[f"videos/{KEY}/from_timestamp"] == pytest.approx(begin / 20)
        assert row[f"videos/{KEY}/to_timestamp"] == pytest.approx(end / 20)
        for part in ("data", "meta/episodes", f"videos/{KEY}"):
            assert row[f"{part}/chunk_index"] == row[f"{part}/file_index"] == 0
        assert np.allclose(row["stats/action/mean"], episode.actions.mean(0), atol=1e-6)
        begin = end
    tasks = pq.read_table(stored / "meta/tasks.parquet").to_pandas()
    assert tasks.index.tolist() == ["open it", "close it"]
    assert tasks["task_index"].tolist() == [0, 1]
    assert set(frames["task_index"]) == {0, 1}


def test_datasets_of_hugging_face_load_the_tables_as_lerobot_does(stored):
    import datasets

    features = datasets.Features(
        {
            "observation.state": datasets.Sequence(datasets.Value("float32"), length=5),
            "action": datasets.Sequence(datasets.Value("float32"), length=3),
            "timestamp": datasets.Value("float32"),
            **dict.fromkeys(
                ("frame_index", "episode_index", "index", "task_index"), datasets.Value("int64")
            ),
        }
    )
    table = pq.read_table(stored / "data/chunk-000/file-000.parquet")
    assert table.cast(features.arrow_schema).num_rows == table.num_rows
    assert table.column_names == list(features)


def test_single_numbers_are_a_plain_column_as_lerobot_has_them(tmp_path):
    values = np.arange(5, dtype=np.float32)[:, None]
    folder = write_dataset(
        tmp_path / "set",
        [Episode("turn", values, 2 * values, {})],
        fps=10,
        state_names=["angle"],
        action_names=["effort"],
    )
    table = pq.read_table(folder / "data/chunk-000/file-000.parquet")
    assert table.schema.field("observation.state").type == pa.float32()
    found = read_dataset(folder)
    assert np.array_equal(found.state, values)
    assert np.array_equal(found.actions, 2 * values)
    assert load_demonstrations(folder).action_statistics.mean.shape == (1,)


@pytest.mark.parametrize("fps", [12.5, 29.97, 0.4])
def test_a_rate_need_not_be_whole(tmp_path, make_episodes, fps):
    folder = tmp_path / "set"
    names = {"state_names": list("abcde"), "action_names": list("xyz")}
    write_dataset(folder, make_episodes(), fps=fps, **names)
    found = read_dataset(folder)
    assert found.info["fps"] == fps
    assert (shown(found.images["front"][:]) == np.arange(len(found.state)) % 64).all()


@pytest.mark.parametrize("fps", [0, -3, float("nan"), None])
def test_a_rate_must_be_positive(tmp_path, make_episodes, fps):
    names = {"state_names": list("abcde"), "action_names": list("xyz")}
    with pytest.raises(ValueError, match=r"fps is .*give a positive number"):
        write_dataset(tmp_path / "set", make_episodes(cameras=()), fps=fps, **names)
    with pytest.raises(ValueError, match="fps is"):
        encode(np.zeros((2, 16, 16, 3), np.uint8), fps)
    assert list(tmp_path.iterdir()) == []


def test_clips_of_one_form_are_joined_and_others_refused(tmp_path, make_episodes):
    first, second, *_ = make_episodes()

    def clip(episode, fps=20, **more):
        return encode(episode.images["front"], fps, **more)

    def stored(name, *clips):
        pairs = zip((first, second), clips, strict=True)
        return write(tmp_path / name, [replace(it, images={"front": own}) for it, own in pairs])

    good = clip(first)
    longer = Clip(good.data, (len(first) + 1, 16, 16), good.histogram)
    for other, message in (
        (clip(second, 10), "episode 1 has a clip of front at 10 frames a second, and fps is 20"),
        (clip(second, lossless=False), "episode 1 has a clip of front in another form .*yuv420p"),
        (clip(first), r"episode 1 has parts of"),
        (replace(clip(second), data=b"junk"), "cannot be read"),
    ):
        with pytest.raises(DataError, match=message):
            stored("set", good, other)
    with pytest.raises(DataError, match="episode 0 has parts of"):
        stored("set", longer, clip(second))
    with pytest.raises(DataError, match=r"episode 0 has a clip of front of \(\d+, 16, 16\) frames"):
        stored("set", replace(clip(second), shape=good.shape), clip(second))
    both = stored("lossy", *(clip(it, lossless=False) for it in (first, second)))
    info = json.loads((both / "meta/info.json").read_text())["features"][KEY]["info"]
    assert (info["video.codec"], info["video.pix_fmt"]) == ("h264", "yuv420p")


def test_statistics_are_those_of_all_frames(stored, make_episodes):
    found = json.loads((stored / "meta/stats.json").read_text())
    actions = np.concatenate([episode.actions for episode in make_episodes()]).astype(float)
    for name, expected in {
        "mean": actions.mean(0),
        "std": actions.std(0),
        "min": actions.min(0),
        "max": actions.max(0),
        "q10": np.quantile(actions, 0.1, axis=0),
        "count": [len(actions)],
    }.items():
        assert np.allclose(found["action"][name], expected)
    images = np.concatenate([episode.images["front"] for episode in make_episodes()]) / 255
    for name in ("mean", "std", "min", "max"):
        numbers = np.array(found[KEY][name])
        assert numbers.shape == (3, 1, 1)
        assert np.allclose(numbers.ravel(), getattr(images, name)(axis=(0, 1, 2)))
    assert np.allclose(np.ravel(found[KEY]["q50"]), np.median(images), atol=1 / 255)


def test_large_sets_are_spread_over_files(tmp_path, make_episodes, monkeypatch):
    monkeypatch.setattr(lerobot, "_DATA_MB", 1e-3)
    monkeypatch.setattr(lerobot, "_VIDEO_MB", 3e-3)
    monkeypatch.setattr(lerobot, "_FILES_A_CHUNK", 2)
    folder = write(tmp_path / "set", make_episodes())
    assert len(list((folder / "data").glob("*/*.parquet"))) > 2
    assert (folder / "data/chunk-001/file-000.parquet").is_file()
    assert len(list((folder / "videos" / KEY).glob("*/*.mp4"))) > 1
    whole = read_dataset(folder)
    assert np.array_equal(
        whole.state, np.concatenate([episode.state for episode in make_episodes()])
    )
    assert (shown(whole.images["front"][:]) == np.arange(len(whole.state)) % 64).all()


def test_without_images_there_is_no_video_and_no_encoder_is_needed(
    tmp_path, make_episodes, monkeypatch
):
    monkeypatch.setitem(sys.modules, "av", None)
    folder = write(tmp_path / "set", make_episodes(cameras=()))
    assert json.loads((folder / "meta/info.json").read_text())["video_path"] is None
    assert read_dataset(folder).images == {}


def test_a_set_appears_whole_or_not_at_all(tmp_path, make_episodes, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(lerobot._Writer, "_write_episodes", full)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path / "set", make_episodes())
    assert list(tmp_path.iterdir()) == []


def test_episodes_that_do_not_fit_are_named(tmp_path, make_episodes):
    first, second, *_ = make_episodes(cameras=())
    with pytest.raises(DataError, match="there is no episode"):
        write(tmp_path / "none", [])
    for change, message in (
        ({"actions": second.actions[:, :2]}, r"episode 1 has states and actions of .*\(2,\)"),
        ({"actions": second.actions[:-1]}, "episode 1 has parts of"),
        ({"state": second.state * np.nan}, "episode 1 holds numbers that are not finite"),
    ):
        fields = {name: getattr(second, name) for name in ("instruction", "state", "actions")}
        other = lerobot.Episode(**(fields | change), images={})
        with pytest.raises(DataError, match=message):
            write(tmp_path / "set", [first, other])
    with_images = make_episodes(count=1)
    with pytest.raises(DataError, match="other cameras"):
        write(tmp_path / "set", [first, *with_images])
    write(tmp_path / "set", [first])
    with pytest.raises(DataError, match="exists"):
        write(tmp_path / "set", [first])


def test_a_folder_that_another_writes_meanwhile_is_left_to_it(tmp_path, make_episodes):
    first, second, *_ = make_episodes(cameras=())

    def slow():
        yield first
        write(tmp_path / "set", [second])

    with pytest.raises(DataError, match=r"another process wrote .*set meanwhile"):
        write(tmp_path / "set", slow())
    assert np.array_equal(read_dataset(tmp_path / "set").state, second.state)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


# --- video --------------------------------------------------------------------------------------


def test_any_frame_is_found(stored):
    frames = read_dataset(stored).images["front"]
    count = len(frames)
    places = np.random.default_rng(0).permutation(count)[:25]
    assert frames[places].shape == (25, 16, 16, 3)
    assert (shown(frames[places]) == places % 64).all()
    assert (shown(frames[:]) == np.arange(count) % 64).all()
    assert (shown(frames.select(places)[3:5]) == places[3:5] % 64).all()


@pytest.mark.parametrize("lossless", [True, False])
def test_pictures_come_back_as_they_were_or_nearly(tmp_path, lossless):
    rows, columns = np.mgrid[0:48, 0:48]
    smooth = np.stack([rows * 4, columns * 4, 100 + rows - columns], axis=-1)
    frames = np.stack([np.roll(smooth, shift, axis=0) for shift in range(12)]).astype(np.uint8)
    clip = encode(frames, 20, lossless=lossless)
    assert clip.shape == (12, 48, 48)
    (tmp_path / "clip.mp4").write_bytes(clip.data)
    back = decode(tmp_path / "clip.mp4", np.arange(12) / 20, 20)
    change = np.abs(back.astype(int) - frames)
    assert not change.any() if lossless else 0 < change.mean() < 6


def test_video_without_pyav_or_encoder_says_how_to_get_it(monkeypatch, tmp_path, make_episodes):
    frames = np.zeros((2, 16, 16, 3), dtype=np.uint8)
    monkeypatch.setattr(lerobot, "_LOSSLESS", ("libnothing", "rgb24", "0"))
    with pytest.raises(VideoError, match=r"no encoder 'libnothing'.*pip install"):
        encode(frames, 20)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(VideoError, match="pip install av"):
        write(tmp_path / "set", make_episodes())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("shape", [(2, 15, 16, 3), (2, 16, 16), (0, 16, 16, 3)])
def test_frames_must_be_encodable(shape):
    with pytest.raises(ValueError, match=r"even height|frames are"):
        encode(np.zeros(shape, dtype=np.uint8), 20)


# --- reading ------------------------------------------------------------------------------------


def test_what_is_written_is_read(stored, make_episodes):
    episodes = make_episodes()
    found = read_dataset(stored)
    assert np.array_equal(found.actions, np.concatenate([it.actions for it in episodes]))
    assert found.lengths.tolist() == list(map(len, episodes))
    assert [found.instructions[task] for task in found.task] == [it.instruction for it in episodes]
    assert found.statistics["action"]["mean"].shape == (3,)


def foreign(folder, **changes):
    """A set as others write it: other keys, pictures in the table, no checksums."""
    rng = np.random.default_rng(1)
    lengths, rows, begin = [7, 5, 6], [], 0
    (folder / "meta/episodes/chunk-000").mkdir(parents=True)
    for file, members in enumerate([(0, 1), (2,)]):
        columns = {}
        for place in members:
            count = lengths[place]
            pictures = []
            for frame in range(count):
                buffer = io.BytesIO()
                Image.new("RGB", (6, 4), (10 * (begin + frame), 0, 0)).save(buffer, "PNG")
                pictures.append({"bytes": buffer.getvalue(), "path": None})
            for name, values in {
                "image": pictures,
                "robot/state": rng.normal(size=(count, 8)).astype(np.float32).tolist(),
                "actions": rng.normal(size=(count, 7)).astype(np.float32).tolist(),
                "frame_index": range(count),
                "episode_index": [place] * count,
                "index": range(begin, begin + count),
                "task_index": [place % 2] * count,
            }.items():
                columns.setdefault(name, []).extend(values)
            rows.append(
                {
                    "episode_index": place,
                    "tasks": ["put the bowl away"],
                    "length": count,
                    "data/chunk_index": 0,
                    "data/file_index": file,
                }
            )
            begin += count
        path = folder / f"data/chunk-000/file-{file:03d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), path, row_group_size=4)
    pq.write_table(pa.Table.from_pylist(rows), folder / "meta/episodes/chunk-000/file-000.parquet")
    tasks = {"task_index": [1, 0], "__index_level_0__": ["second", "first"]}
    pq.write_table(pa.table(tasks), folder / "meta/tasks.parquet")
    (folder / "meta/stats.json").write_text("{}")
    info = {
        "codebase_version": "v3.0",
        "fps": 10.0,
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": None,
        "features": {
            "image": {"dtype": "image", "shape": [3, 4, 6], "names": ["channel", "h", "w"]},
            "robot/state": {"dtype": "float32", "shape": [8], "names": None},
            "actions": {"dtype": "float32", "shape": [7], "names": None},
        },
    }
    (folder / "meta/info.json").write_text(json.dumps(info | changes))
    return folder


def test_a_set_of_others_is_read(tmp_path):
    folder = foreign(tmp_path / "libero")
    found = read_dataset(folder, state_key="robot/state", action_key="actions")
    assert found.state.shape == (18, 8)
    assert found.actions.shape == (18, 7)
    assert found.lengths.tolist() == [7, 5, 6]
    assert found.instructions == ("first", "second")
    assert found.task.tolist() == [0, 1, 0]
    images = found.images["image"]
    assert images.shape == (18, 4, 6, 3)
    assert images[np.array([17, 0, 8])][:, 0, 0, 0].tolist() == [170, 0, 80]
    assert images.select(np.arange(5, 9))[1:3][:, 0, 0, 0].tolist() == [60, 70]
    with pytest.raises(DataError, match=r"no feature 'observation.state'; it has \['actions'"):
        read_dataset(folder)


def test_another_version_is_refused(tmp_path):
    folder = foreign(tmp_path / "old", codebase_version="v2.1")
    with pytest.raises(DataError, match=r"'v2.1' and 'v3.0' is read.*convert"):
        read_dataset(folder)
    newer = foreign(tmp_path / "new", codebase_version="v3.1")
    with pytest.raises(DataError, match=r"'v3.1' and 'v3.0' is read.*revision 'v3.0'"):
        read_dataset(newer)


def test_files_that_are_not_as_they_were_written_are_named(stored):
    assert changed_files(stored) == []
    (stored / "meta/tasks.parquet").unlink()
    with open(stored / "data/chunk-000/file-000.parquet", "ab") as data:
        data.write(b"more")
    assert set(changed_files(stored)) == {"meta/tasks.parquet", "data/chunk-000/file-000.parquet"}
    for content in ("{", "[]"):
        (stored / "meta/checksums.json").write_text(content)
        assert changed_files(stored) == ["meta/checksums.json"]


def test_what_is_no_data_set_is_refused(tmp_path, stored):
    with pytest.raises(DataError, match=r"info.json is missing.*no data set"):
        read_dataset(tmp_path)
    (stored / "meta/info.json").write_text("{")
    with pytest.raises(DataError, match=r"info.json is damaged or was changed"):
        read_dataset(stored)
    (stored / "meta/checksums.json").unlink()
    with pytest.raises(DataError, match=r"info.json is damaged: "):
        read_dataset(stored)


@pytest.mark.parametrize(
    "name",
    [
        *("meta/info.json", "meta/stats.json", "meta/tasks.parquet"),
        "meta/episodes/chunk-000/file-000.parquet",
    ],
)
def test_a_description_that_changed_is_refused(stored, name):
    content = bytearray((stored / name).read_bytes())
    content[len(content) // 2] ^= 1
    (stored / name).write_bytes(content)
    with pytest.raises(DataError, match=r"was changed since.*delete meta/checksums.json"):
        read_dataset(stored)


# --- damage -------------------------------------------------------------------------------------


def test_a_flipped_bit_costs_one_episode_and_names_it(stored, make_episodes):
    path = stored / "data/chunk-000/file-000.parquet"
    group = pq.ParquetFile(path).metadata.row_group(2).column(0)
    content = bytearray(path.read_bytes())
    content[group.data_page_offset + group.total_compressed_size // 2] ^= 4
    path.write_bytes(content)
    with pytest.warns(UserWarning, match=r"episode 2 \('open it'\) is left out.*damaged"):
        found = read_dataset(stored)
    episodes = make_episodes()
    assert found.episodes.tolist() == [0, 1, 3]
    kept = [episodes[place] for place in found.episodes]
    assert np.array_equal(found.state, np.concatenate([it.state for it in kept]))
    before = np.cumsum([0, *map(len, episodes)])
    frames = np.concatenate([np.arange(before[it], before[it + 1]) for it in found.episodes])
    assert (shown(found.images["front"][:]) == frames % 64).all()


def test_sound_files_that_changed_are_read_with_a_warning_that_says_how_to_mend_it(
    stored, make_episodes
):
    other = write(stored.with_name("other"), make_episodes(cameras=("front", "back")))
    expected = r"was changed since it was written.*delete meta/checksums.json"
    path = f"videos/{KEY}/chunk-000/file-000.mp4"
    turned = [
        replace(it, images={name: 255 - frames for name, frames in it.images.items()})
        for it in make_episodes()
    ]
    (stored / path).write_bytes((write(stored.with_name("turned"), turned) / path).read_bytes())
    with pytest.warns(UserWarning, match=rf"{KEY}.*{expected}"):
        read_dataset(stored)
    path = "data/chunk-000/file-000.parquet"
    table = pq.read_table(other / path)
    twice = pa.FixedSizeListArray.from_arrays(
        pa.array(2 * table["action"].combine_chunks().flatten().to_numpy()), 3
    )
    pq.write_table(table.set_column(1, "action", twice), other / path)
    with pytest.warns(UserWarning, match=rf"file-000.parquet {expected}"):
        found = read_dataset(other)
    actions = np.concatenate([it.actions for it in make_episodes()])
    assert np.array_equal(found.actions, 2 * actions)
    (other / "meta/checksums.json").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_dataset(other)


def rewritten(stored, change):
    path = stored / "data/chunk-000/file-000.parquet"
    pq.write_table(change(pq.read_table(path)), path)


def test_numbers_that_are_not_finite_cost_their_episode(stored):
    def change(table):
        values = table["action"].combine_chunks().flatten().to_numpy().copy()
        values[4] = np.nan
        column = pa.FixedSizeListArray.from_arrays(pa.array(values), 3)
        return table.set_column(table.column_names.index("action"), "action", column)

    rewritten(stored, change)
    with pytest.warns(UserWarning, match=r"episode 0 .*its action holds.*not finite"):
        assert read_dataset(stored).episodes.tolist() == [1, 2, 3]


def test_missing_frames_cost_their_episode(stored):
    rewritten(stored, lambda table: table.slice(0, table.num_rows - 1))
    with pytest.warns(UserWarning, match=r"episode 3 .*frames"):
        assert read_dataset(stored).episodes.tolist() == [0, 1, 2]


def test_a_table_that_is_cut_short_leaves_nothing(stored):
    path = stored / "data/chunk-000/file-000.parquet"
    path.write_bytes(path.read_bytes()[:-40])
    with (
        pytest.warns(UserWarning, match="cannot be read"),
        pytest.raises(DataError, match="no episode that can be read"),
    ):
        read_dataset(stored)


def test_a_video_that_is_damaged_costs_what_it_shows(stored, make_episodes):
    path = stored / f"videos/{KEY}/chunk-000/file-000.mp4"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.warns(UserWarning, match="left out"), pytest.raises(DataError, match="no episode"):
        read_dataset(stored)
    path.unlink()
    with pytest.warns(UserWarning, match=r"file-000.mp4"), pytest.raises(DataError):
        read_dataset(stored)


def test_videos_of_others_are_looked_at_and_their_damage_is_named(
    tmp_path, make_episodes, monkeypatch
):
    monkeypatch.setattr(lerobot, "_VIDEO_MB", 3e-3)
    folder = write(tmp_path / "set", make_episodes())
    (folder / "meta/checksums.json").unlink()
    videos = sorted((folder / "videos" / KEY).glob("*/*.mp4"))
    videos[-1].write_bytes(videos[-1].read_bytes()[:400])
    with pytest.warns(UserWarning, match=r"episode 3 .* is left out: .*cannot be read"):
        found = read_dataset(folder)
    assert 3 not in found.episodes
    # what the last frames do not tell is an error when it is asked for
    frames = found.images["front"]
    monkeypatch.setattr(lerobot, "decode", broken_after(float(frames.seconds[5])))
    with pytest.raises(VideoError, match=r"^episode 0: .*no frame"):
        frames[:]
    with pytest.raises(VideoError, match=r"^episode 0: .*no frame"):
        frames.select(np.arange(3, 9))[:]


def broken_after(end):
    def broken(path, seconds, fps):
        if max(seconds) > end:
            raise VideoError(f"{path} has no frame at {max(seconds)}")
        return decode(path, seconds, fps)

    return broken


def test_a_picture_that_is_damaged_is_named(tmp_path):
    folder = foreign(tmp_path / "set")
    path = folder / "data/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    pictures = table["image"].to_pylist()
    pictures[8]["bytes"], pictures[9]["bytes"] = b"junk", None
    column = pa.array(pictures, type=table["image"].type)
    pq.write_table(table.set_column(0, "image", column), path)
    images = read_others(folder).images["image"]
    assert images[:8].shape == (8, 4, 6, 3)
    with pytest.raises(VideoError, match=r"episode 1: row 8 of 'image' in .* is damaged"):
        images[7:9]
    with pytest.raises(VideoError, match=r"episode 1: row 9 .* holds no picture"):
        images[np.array([9])]


def test_pictures_are_those_of_the_file_that_is_there(tmp_path):
    folder = foreign(tmp_path / "set")
    first = read_others(folder).images["image"]
    assert first[:3][:, 0, 0, 0].tolist() == [0, 10, 20]
    path = folder / "data/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    pictures = table["image"].to_pylist()[::-1]
    column = pa.array(pictures, type=table["image"].type)
    pq.write_table(table.set_column(0, "image", column), path, row_group_size=4)
    assert read_others(folder).images["image"][:3][:, 0, 0, 0].tolist() == [110, 100, 90]


# --- what others write --------------------------------------------------------------------------


def read_others(folder):
    return read_dataset(folder, state_key="robot/state", action_key="actions")


def described(folder, **changes):
    path = folder / "meta/info.json"
    info = json.loads(path.read_text())
    for name, value in changes.items():
        if value is None:
            info.pop(name)
        else:
            info[name] = value
    path.write_text(json.dumps(info))


def test_what_info_leaves_out_is_lerobots_own(tmp_path, stored):
    folder = foreign(tmp_path / "others")
    described(folder, data_path=None, video_path=None)
    assert len(read_others(folder).state) == 18
    (stored / "meta/checksums.json").unlink()
    described(stored, data_path=None, video_path=None)
    (stored / "meta/stats.json").unlink()
    found = load_demonstrations(stored)
    assert found.images["front"][:].shape == (len(found), 16, 16, 3)
    assert np.allclose(found.action_statistics.std, found.actions.std(0), atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fps": None}, "no rate of frames: fps is None"),
        ({"fps": 0}, "no rate of frames: fps is 0"),
        ({"features": None}, "describes no features"),
        ({"data_path": "data/{episode}.parquet"}, "data_path 'data/{episode}.parquet', which"),
    ],
)
def test_what_info_must_say_is_asked_for(tmp_path, changes, message):
    folder = foreign(tmp_path / "set")
    described(folder, **changes)
    with pytest.raises(DataError, match=message):
        read_others(folder)


def test_statistics_that_do_not_fit_are_refused_and_missing_ones_computed(stored):
    path = stored / "meta/stats.json"
    path.unlink()
    with pytest.raises(DataError, match=r"stats.json is missing"):
        read_dataset(stored)
    (stored / "meta/checksums.json").unlink()
    good = {"mean": [0, 0, 0], "std": [1, 1, 1], "min": [-1, -1, -1], "max": [1, 1, 1]}
    for change, message in (
        ({"mean": [0, 0]}, r"'action', which has 3 numbers, the mean \[0.0, 0.0\]"),
        ({"std": [1, -1, 1]}, "the std"),
        ({"max": [1, None, 1]}, "the max"),
        ({"max": ["a", "b", "c"]}, "is damaged at 'action'"),
    ):
        path.write_text(json.dumps({"action": good | change}))
        with pytest.raises(DataError, match=message):
            read_dataset(stored)
    path.write_text(json.dumps({"action": good, "observation.state": None, "note": "by hand"}))
    found = load_demonstrations(stored)
    assert found.action_statistics.std.tolist() == [1, 1, 1]
    assert np.allclose(found.state_statistics.std, found.state.std(0), atol=1e-6)


def test_numbers_of_tasks_may_have_gaps(tmp_path):
    folder = foreign(tmp_path / "set")
    tasks = folder / "meta/tasks.parquet"
    pq.write_table(pa.table({"task_index": [7, 1, 0], "task": ["x", "one", "zero"]}), tasks)
    for path in (folder / "data").glob("*/*.parquet"):
        table = pq.read_table(path)
        moved = pa.array([{0: 0, 1: 7}[it] for it in table["task_index"].to_pylist()])
        place = table.column_names.index("task_index")
        pq.write_table(table.set_column(place, "task_index", moved), path)
    found = read_others(folder)
    assert found.instructions == ("zero", "one", "x")
    assert found.task.tolist() == [0, 2, 0]
    for wrong in ({"task_index": [0, 0], "task": ["a", "b"]}, {"task_index": [0], "task": [None]}):
        pq.write_table(pa.table(wrong), tasks)
        with pytest.raises(DataError, match="an instruction and a number of its own"):
            read_others(folder)
    pq.write_table(pa.table({"task_index": [0], "task": ["zero"]}), tasks)
    with pytest.warns(UserWarning, match=r"episode 1 .*its task 7 is not among the 1"):
        assert read_others(folder).episodes.tolist() == [0, 2]


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.float64()),
        pa.large_list(pa.float32()),
        pa.list_(pa.list_(pa.float32())),
        pa.list_(pa.list_(pa.float32(), 7), 1),
    ],
)
def test_lists_of_any_kind_are_numbers(tmp_path, kind):
    folder = foreign(tmp_path / "set")
    before = read_others(folder).actions
    nested = pa.types.is_list(kind.value_type) or pa.types.is_fixed_size_list(kind.value_type)
    for path in (folder / "data").glob("*/*.parquet"):
        table = pq.read_table(path)
        rows = table["actions"].to_pylist()
        column = pa.array([[row] for row in rows] if nested else rows, type=kind)
        place = table.column_names.index("actions")
        pq.write_table(table.set_column(place, "actions", column), path)
    if nested:
        features = json.loads((folder / "meta/info.json").read_text())["features"]
        features["actions"]["shape"] = [1, 7]
        described(folder, features=features)
    assert np.array_equal(read_others(folder).actions, before)


def changed(folder, name, column):
    """Frames of the first file with another column; None leaves it out."""
    path = folder / "data/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    place = table.column_names.index(name)
    table = table.remove_column(place)
    pq.write_table(table if column is None else table.add_column(place, name, column), path)


@pytest.mark.parametrize("name", ["actions", "task_index", "frame_index", "image"])
def test_a_column_that_is_not_there_is_named(tmp_path, name):
    folder = foreign(tmp_path / "set")
    changed(folder, name, None)
    with pytest.raises(DataError, match=rf"file-000.parquet has no column '{name}'; it has"):
        read_others(folder)


def test_columns_that_hold_something_else_are_named(tmp_path):
    folder = foreign(tmp_path / "set")
    changed(folder, "actions", pa.array(["go"] * 12))
    with pytest.raises(DataError, match="no numbers in 'actions' but string"):
        read_others(folder)


def test_nothing_in_the_place_of_numbers_costs_its_episode(tmp_path):
    rows = np.zeros((12, 7)).tolist()
    for name, column in (
        ("actions", pa.array([*rows[:3], None, *rows[4:]])),
        ("actions", pa.array([*rows[:3], rows[0][:6], *rows[4:]])),
        ("actions", pa.array([*rows[:3], [None, *rows[0][1:]], *rows[4:]])),
        ("frame_index", pa.array([0, 1, 2, None, 4, 5, 6, 0, 1, 2, 3, 4])),
        ("task_index", pa.array([None] * 7 + [1] * 5)),
    ):
        folder = foreign(tmp_path / f"{name} {len(list(tmp_path.iterdir()))}")
        changed(folder, name, column)
        with pytest.warns(UserWarning, match=r"episode 0 .* is left out"):
            assert read_others(folder).episodes.tolist() == [1, 2]
    path = folder / "meta/episodes/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    place = table.column_names.index("length")
    pq.write_table(table.set_column(place, "length", pa.array([7, None, 6])), path)
    with pytest.warns(UserWarning, match=r"episode 1 .*meta/episodes gives it no length"):
        assert read_others(folder).episodes.tolist() == [2]
    pq.write_table(table.remove_column(place), path)
    with pytest.raises(DataError, match="has no column 'length'"):
        read_others(folder)


@pytest.mark.parametrize(
    ("shape", "names"),
    [
        ([3, 4, 6], None),
        ([3, 4, 6], ["rgb", "rows", "columns"]),
        ([3, 4, 6], ["channel", "height", "width"]),
        ([4, 6, 3], None),
        ([4, 6, 3], ["height", "width", "channel"]),
    ],
)
def test_colours_may_come_first(tmp_path, shape, names):
    folder = foreign(tmp_path / "set")
    features = json.loads((folder / "meta/info.json").read_text())["features"]
    features["image"] |= {"shape": shape, "names": names}
    described(folder, features=features)
    assert read_others(folder).images["image"][4:6].shape == (2, 4, 6, 3)


def test_images_of_another_size_than_described_are_named(tmp_path, stored):
    folder = foreign(tmp_path / "others")
    features = json.loads((folder / "meta/info.json").read_text())["features"]
    features["image"]["shape"] = [3, 6, 4]
    described(folder, features=features)
    with pytest.raises(VideoError, match=r"episode 0: row 2 .* has 4 x 6 .* 6 x 4 are described"):
        read_others(folder).images["image"][2:3]
    (stored / "meta/checksums.json").unlink()
    features = json.loads((stored / "meta/info.json").read_text())["features"]
    features[KEY]["shape"] = [8, 8, 3]
    described(stored, features=features)
    with pytest.warns(UserWarning, match="16 x 16 .* 8 x 8"), pytest.raises(DataError):
        read_dataset(stored)
