"""Video files: the frames, times and tokens that transformers gives them. Skipped where PyAV, which
both decode with, is not installed."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from transformers import AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.video_utils import VideoMetadata, read_video_pyav

from convert.dataset import convert
from pvm_jax.data.conversations import open_conversations
from pvm_jax.data.messages import parse
from pvm_jax.data.processor import Processor
from pvm_jax.data.video_files import FrameSampling, VideoFile, decoded, outline, sampled_places
from tests.pvm_jax.processor_files import IMAGES, TEMPLATE, write_checkpoint
from tests.pvm_jax.test_processing import Reference

av = pytest.importorskip("av")

RATE, SECONDS = 25, 20


def write_film(path, codec, frames=RATE * SECONDS):
    """A grey ramp with a square that wanders over it."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=RATE, width=96, height=64, pix_fmt="yuv420p")
        for number in range(frames):
            picture = np.full((64, 96, 3), number * 200 // frames, np.uint8)
            picture[10:30, number % 60 : number % 60 + 20] = (250, 20, 120)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    folder = tmp_path_factory.mktemp("films")
    write_film(folder / "a.mp4", "mpeg4")
    write_film(folder / "a.webm", "libvpx", frames=50)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def processor(folder):
    return Processor.from_pretrained(folder)


def theirs(film, sampling):
    """(frames, metadata) that transformers' own processor samples and decodes."""
    pytest.importorskip("torch")
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

    settings = SimpleNamespace(fps=sampling.fps, min_frames=4, max_frames=768)

    def sample(metadata, **options):
        return Qwen3VLVideoProcessor.sample_frames(settings, metadata, **options)

    return read_video_pyav(str(film), sample)


def conversation(film, **also):
    part = {"type": "video", "video": str(film)} | also
    asked = {"role": "user", "content": [part, {"type": "text", "text": "What?"}]}
    return [asked, {"role": "assistant", "content": "A square."}]


def test_an_mp4_of_20_s_has_the_frames_times_and_tokens_of_transformers(films, folder, processor):
    film = films / "a.mp4"
    frames, metadata = theirs(film, FrameSampling())
    ours = decoded(VideoFile(str(film)), FrameSampling())
    assert len(ours.frames) == 40
    assert np.array_equal(np.stack(ours.frames), frames)
    assert list(ours.seconds) == metadata.timestamps
    assert outline(VideoFile(str(film)), FrameSampling()) == (64, 96, list(ours.seconds))
    example = processor.encode(conversation(film))
    images = {key: value for key, value in IMAGES.items() if "proc" not in key}
    reference = Reference(
        Qwen2VLImageProcessorPil(**images),
        AutoTokenizer.from_pretrained(folder),
        SimpleNamespace(merge_size=2, temporal_patch_size=2),
        TEMPLATE,
    )
    inputs = {"video_grid_thw": example.video_grid_thw, "video_metadata": [metadata]}
    expected = reference.replace_video_token(inputs, 0)
    assert expected.count("seconds>") == 20
    assert expected in processor.decode(example.input_ids, skip_special_tokens=False)
    counted = processor.count(conversation(film))
    assert counted == (len(example.input_ids), example.num_patches)


@pytest.mark.parametrize("total", [3, 5, 24, 50, 499, 40_000])
@pytest.mark.parametrize("given", [{}, {"fps": 0.3}, {"fps": 7}, {"num_frames": 3}])
def test_sampling_equals_transformers(total, given):
    pytest.importorskip("torch")
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

    settings = SimpleNamespace(fps=None if given else 2, min_frames=4, max_frames=768)
    metadata = VideoMetadata(total_num_frames=total, fps=23.976)
    expected = Qwen3VLVideoProcessor.sample_frames(settings, metadata, **given)
    ours = sampled_places(total, 23.976, VideoFile("a", **given), FrameSampling())
    assert np.array_equal(ours, expected)


def test_a_webm_whose_header_does_not_count_its_frames(films):
    with av.open(str(films / "a.webm")) as container:
        assert container.streams.video[0].frames == 0
    video = decoded(VideoFile(str(films / "a.webm"), fps=5), FrameSampling())
    assert len(video.frames) == 10
    assert video.seconds[-1] == 49 / RATE
    levels = [frame[50, 80].mean() for frame in map(np.asarray, video.frames)]
    assert levels == sorted(levels)


def test_shards_hold_the_frames_that_were_decoded_once(films, processor, tmp_path):
    """Training on them is training on the file: the same tokens and pixels."""
    record = {"messages": conversation("a.mp4", num_frames=6)}
    (films / "data.jsonl").write_text(json.dumps(record) + "\n")
    convert(films / "data.jsonl", tmp_path / "shards", processor)
    (stored,) = open_conversations(tmp_path / "shards")
    (file,) = open_conversations(films / "data.jsonl")
    ((_, video),) = parse(stored, ()).videos
    assert len(video.frames) == 6
    ours, whole = processor.encode(stored), processor.encode(file)
    assert np.array_equal(ours.input_ids, whole.input_ids)
    assert np.array_equal(ours.pixel_values_videos, whole.pixel_values_videos)
    index = json.loads((tmp_path / "shards" / "dataset.json").read_text())
    assert index["videos"] is True


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("none.mp4", None, r"none\.mp4 does not exist"),
        ("text.mp4", b"words", r"text\.mp4 cannot be read as a video"),
        ("cut.mp4", 0.5, r"cut\.mp4 c"),
    ],
)
def test_a_file_that_is_no_whole_video_is_named(films, processor, tmp_path, name, content, told):
    path = tmp_path / name
    if isinstance(content, float):
        whole = (films / "a.webm").read_bytes()
        content = whole[: int(len(whole) * content)]
    if content is not None:
        path.write_bytes(content)
    error = FileNotFoundError if content is None else ValueError
    if name == "cut.mp4":  # what is left of a WebM is a shorter video
        assert len(decoded(VideoFile(str(path), fps=5), FrameSampling()).frames) < 10
        return
    with pytest.raises(error, match=rf"messages\[0\]: content\[0\]: .*{told}"):
        processor.encode(conversation(path))


def test_without_pyav_the_error_names_the_extra(films, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(ImportError, match=r"pip install 'pvm-jax\[video\]'"):
        outline(VideoFile(str(films / "a.mp4")), FrameSampling())
    (films / "one.jsonl").write_text(json.dumps({"messages": conversation("a.mp4")}))
    with pytest.raises(ImportError, match=r"one\.jsonl:1: .*pip install 'pvm-jax\[video\]'"):
        convert(films / "one.jsonl", films / "none", max_rejected=1.0)  # it is no reject
    assert not (films / "none").exists()
