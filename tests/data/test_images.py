"""Images of dataset rows: what is read, where it goes, and what is said of rows that cannot be."""

from __future__ import annotations

import io

import pytest
import torch
from datasets import Dataset, Features, Image, Value
from datasets import List as ListOf
from PIL.Image import Transpose

from rloo_fast.data.checks import check_prompts
from rloo_fast.data.images import row_images, with_images, without_images
from rloo_fast.data.prompt_lengths import drop_long_prompts
from rloo_fast.data.row_errors import UnusableRow
from rloo_fast.data.skipping import Skipping
from rloo_fast.data.tokenize import RowTokenizer
from rloo_fast.models.vision import ImageReader
from tests.support.vision import make_processor, make_vision_model, picture

CHAT = [{"role": "user", "content": "w1 w2"}]


def as_bytes(image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def make_rows(family: str = "qwen2_5_vl", **settings) -> RowTokenizer:
    processor = make_processor(family)
    return RowTokenizer(
        processor.tokenizer,
        context_length=200,
        max_completion_length=8,
        chat_template_kwargs={},
        keep_columns=True,
        reader=ImageReader(processor, make_vision_model(family)),
        **settings,
    )


@pytest.fixture(scope="module")
def rows() -> RowTokenizer:
    return make_rows()


def test_an_image_is_read_from_whatever_holds_it(tmp_path):
    image = picture(1)
    path = tmp_path / "a.png"
    image.save(path)
    held = [image, str(path), path, as_bytes(image), {"bytes": as_bytes(image), "path": None},
            {"bytes": None, "path": str(path)}]  # fmt: skip
    for given in held:
        (found,) = row_images({"image": given})
        assert found.tobytes() == image.tobytes()
    assert [i.size for i in row_images({"images": [picture(1), picture(2, 24)]})] == [
        (16, 16), (24, 16)
    ]  # fmt: skip
    for none in ({"image": None}, {"images": None}, {"images": []}, {}):
        assert row_images(none) == []


def test_of_two_columns_a_row_uses_the_one_that_it_fills():
    one, other = picture(1), picture(2)
    for row, expected in [
        ({"image": one, "images": None}, [one]),
        ({"image": one, "images": []}, [one]),
        ({"image": None, "images": [one, other]}, [one, other]),
        ({"image": None, "images": []}, []),
    ]:
        assert [i.tobytes() for i in row_images(row)] == [i.tobytes() for i in expected]
    with pytest.raises(UnusableRow, match="both 'image' and 'images'"):
        row_images({"image": one, "images": [other]})


def test_a_file_is_turned_as_it_says():
    image = picture(1, 16, 24)
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    file = io.BytesIO()
    image.save(file, "PNG", exif=exif)
    (found,) = row_images({"image": file.getvalue()})
    assert found.tobytes() == image.transpose(Transpose.ROTATE_270).tobytes()


@pytest.mark.parametrize("family", ["qwen2_5_vl", "idefics3"])
def test_what_an_engine_reads_itself_is_what_is_trained_on(family):
    """Ids before the images are in their places, and pixels as the processor sees them."""
    rows = make_rows(family, engine_reads_images=True)
    see_through = picture(1).convert("RGBA")
    see_through.putalpha(100)
    for row in (
        {"prompt": "w1 <image> w2", "image": see_through},
        {"prompt": CHAT, "images": [picture(1), see_through]},
        {"prompt": CHAT, "images": []},
    ):
        (prompt,) = rows([row])
        ids, images = prompt.raw
        assert {image.mode for image in images} <= {"RGB"}
        text = rows.reader.processor.tokenizer.decode(ids)
        again = rows.reader.processor(
            text=[text], images=[images] if images else None, return_tensors="pt"
        )
        assert again["input_ids"][0].tolist() == prompt.ids
        if images:
            assert torch.equal(again["pixel_values"], prompt.inputs["pixel_values"])
            assert len(ids) < len(prompt.ids)


@pytest.mark.parametrize("decode", [True, False])
def test_rows_of_the_image_feature(rows, decode):
    several = Dataset.from_dict(
        {"prompt": ["w1 <image> w2", "w2"], "images": [[picture(3)], []]},
        features=Features(prompt=Value("string"), images=ListOf(Image())),
    )
    data = several.cast_column("images", ListOf(Image(decode=decode)))
    first, second = rows([data[0], data[1]])
    assert first.inputs["pixel_values"].shape[0] == 16
    assert "pixel_values" not in second.inputs
    assert rows.num_tokens([data[0], data[1]]) == [len(first.ids), len(second.ids)]
    assert len(first.ids) == 2 + 4  # the image is four tokens


UNUSABLE = {
    "no file": ({"image": "nowhere.png"}, "image 0 .*nowhere.png.* cannot be opened.*NotFound"),
    "no image": ({"image": b"text"}, "image 0 .4 bytes. cannot be opened .UnidentifiedImage"),
    "cut": ({"image": as_bytes(picture(1, 200, 200))[:200]}, "cannot be read .*damaged or cut"),
    "address": ({"image": "https://a.b/c.png"}, "download it first"),
    "a number": ({"image": 7}, "must be a PIL image, a path, or the bytes of a file, got int"),
    "no list": ({"images": picture(1)}, "must hold a list of images, got Image"),
}


@pytest.mark.parametrize(("columns", "said"), UNUSABLE.values(), ids=UNUSABLE)
def test_what_cannot_be_read_is_said(columns, said, rows):
    with pytest.raises(UnusableRow, match=said):
        rows([{"prompt": CHAT, **columns}])


def test_images_fill_their_places_in_order():
    a, b = picture(1), picture(2)
    parts = [{"type": "text", "text": "w1"}, {"type": "image"}, {"type": "image", "text": None}]
    (message,) = with_images([{"role": "user", "content": parts}], [a, b])
    assert message["content"][1:] == [{"type": "image", "image": a}, {"type": "image", "image": b}]
    assert parts[1] == {"type": "image"}  # the row is as it was
    system = {"role": "system", "content": "w0"}
    made = with_images([system, *CHAT], [a])
    assert made[0]["content"] == [{"type": "text", "text": "w0"}]
    assert [part["type"] for part in made[1]["content"]] == ["image", "text"]
    assert without_images(made)[1]["content"][0] == {"type": "image"}


def test_messages_are_those_of_trl():
    prepare = pytest.importorskip("trl.data_utils").prepare_multimodal_messages
    parts = [{"type": "image"}, {"type": "text", "text": "w1"}, {"type": "image"}]
    chats = [
        ([{"role": "system", "content": "w0"}, *CHAT, {"role": "assistant", "content": "w3"}], 1),
        ([{"role": "user", "content": parts}], 2),
        (CHAT, 0),
        (CHAT, 3),
    ]
    for chat, number in chats:
        images = [picture(i) for i in range(number)]
        assert with_images(chat, images) == prepare(chat, images)


OTHER_NUMBERS = {
    "fewer images": ([{"type": "image"}, {"type": "image"}], 1, "1 images .* 2 parts"),
    "more images": ([{"type": "image"}], 2, "2 images .* 1 parts"),
    "no place": ([{"type": "text", "text": "w1"}], 1, "1 images .* 0 parts"),
    "in the message": ([{"type": "image", "url": "a.png"}], 1, "holds an image itself .in .'url'"),
    "a video": ([{"type": "video"}], 0, "of the type 'video'"),
}


@pytest.mark.parametrize(("parts", "number", "said"), OTHER_NUMBERS.values(), ids=OTHER_NUMBERS)
def test_other_numbers_of_images_than_of_places(parts, number, said, rows):
    row = {
        "prompt": [{"role": "user", "content": parts}],
        "images": [picture(i) for i in range(number)],
    }
    with pytest.raises(UnusableRow, match=said):
        rows([row])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("w1 <image>", "ends with an image"),
        ("w1", "1 images, but its text has the image token '<image>' 0 times"),
        ("<image> <image> w1", "1 images, but .* 2 times"),
    ],
)
def test_a_text_prompt_writes_the_image_token(text, said, rows):
    with pytest.raises(UnusableRow, match=said):
        rows([{"prompt": text, "image": picture(1)}])


def test_a_bad_row_is_named_before_training(rows):
    good = {"prompt": CHAT, "images": [as_bytes(picture(1))]}
    data = Dataset.from_list([good, good, {"prompt": CHAT, "images": [b"no image"]}])
    with pytest.raises(ValueError, match=r"train_dataset: row 2 .counted from 0.: its image 0"):
        check_prompts(data, None, rows, None, 1)
    assert Skipping(rows).left_out(data, "train_dataset") == {2}


def test_image_tokens_count_and_are_never_cut():
    """Prompts beyond max_prompt_length are left out whole."""
    rows = make_rows("llava")
    data = Dataset.from_list(
        [{"prompt": CHAT, "images": [picture(i) for i in range(n)]} for n in (0, 1, 2)]
    )
    lengths = rows.num_tokens(list(data))
    assert lengths == [4, 4 + 16, 4 + 32]
    kept, _ = drop_long_prompts(data, None, rows, 20, 1)
    assert [len(prompt.ids) for prompt in rows(list(kept))] == [4, 20]


def test_a_processor_without_a_template():
    rows = make_rows()
    rows.reader.processor.chat_template = None
    with pytest.raises(ValueError, match="the processor has no chat template"):
        rows([{"prompt": CHAT, "image": picture(1)}])
    rows.reader.processor.tokenizer.chat_template = make_processor("qwen2_5_vl").chat_template
    (prompt,) = rows([{"prompt": CHAT, "image": picture(1)}])
    assert "pixel_values" in prompt.inputs
