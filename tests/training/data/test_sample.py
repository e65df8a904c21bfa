"""The media of training samples: damaged files are refused, and the frames are those that serving selects."""

import io

import numpy as np
import pytest
from PIL import Image

from omnivideo.errors import InvalidInput, UnreadableMedia
from omnivideo.media.read import read_fitted_media, read_media
from omnivideo.training.data.batch_sampler import Bucket, build_buckets, select_bucket
from omnivideo.training.data.sample import MediaShape, TrainingSample, check_sample, measure_shape
from tests.support.training_samples import make_mp4


@pytest.mark.parametrize("index_first", [True, False])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_truncated_mp4_is_refused(index_first, share):
    clip = make_mp4(24, index_first=index_first)
    assert measure_shape(clip).frames == 24
    with pytest.raises(UnreadableMedia):
        measure_shape(clip[: int(len(clip) * share)])


def test_a_truncated_png_is_refused():
    rng = np.random.default_rng(0)
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file, "PNG")
    with pytest.raises(UnreadableMedia):
        measure_shape(file.getvalue()[:1500])


def test_a_clip_is_read_at_the_requested_rate_and_size():
    clip = make_mp4(17, size=(64, 32), fps=16)
    frames = read_media(clip).frames
    fitted = read_fitted_media(clip, 32, 32, 9, 8)
    assert fitted.shape == (9, 32, 32, 3)
    assert np.array_equal(fitted, frames[::2, :, 16:48])
    assert np.array_equal(read_fitted_media(clip, 32, 32, 9, 8, frame_indices=[0, 3, 3, 8]), fitted[[0, 3, 3, 8]])
    last_frame_repeated = [*range(9), 8, 8, 8]
    assert np.array_equal(read_fitted_media(clip, 32, 32, 12, 8), fitted[last_frame_repeated])


def test_only_the_first_frame_of_an_animation_is_used():
    file = io.BytesIO()
    pictures = [Image.new("RGB", (32, 16), (shade, 0, 0)) for shade in (10, 200)]
    pictures[0].save(file, "GIF", save_all=True, append_images=pictures[1:], duration=100)
    assert measure_shape(file.getvalue()) == MediaShape(32, 16, 1, 0.0)
    assert read_fitted_media(file.getvalue(), 16, 16, 1, 8)[0, 0, 0, 0] == 10


def test_the_bucket_that_crops_least_is_chosen():
    buckets = build_buckets(64, 64, (1, 5, 9))
    assert all(bucket.width % 16 == bucket.height % 16 == 0 for bucket in buckets)
    assert select_bucket(buckets, "text-to-image", 640, 640, 1, 0, 8) == Bucket(64, 64, 1)
    assert select_bucket(buckets, "text-to-video", 640, 640, 17, 16, 8) == Bucket(64, 64, 9)
    assert select_bucket(buckets, "text-to-video", 640, 640, 16, 16, 8) == Bucket(64, 64, 5)
    tall = select_bucket(buckets, "text-to-image", 480, 832, 1, 0, 8)
    assert tall.height > tall.width
    with pytest.raises(InvalidInput, match="no bucket is so short"):
        select_bucket(buckets, "text-to-video", 640, 640, 3, 8, 8)


def test_a_clip_for_an_image_task_is_refused():
    with pytest.raises(InvalidInput, match="mp4"):
        check_sample(TrainingSample("text-to-image", "x", target=make_mp4()))
