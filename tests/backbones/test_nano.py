"""The checkpoints that ship with the package: they load, are small, and mean something."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw
from safetensors import safe_open

import sda_core.backbones
from sda_core.backbones import Backbone, build
from sda_core.params import Nano
from tests.tolerances import up_to_rounding

FOLDERS = {kind: Path(sda_core.backbones.__file__).parent / kind for kind in ("nano", "nano2")}
MIN_PIXELS = {"nano": 784, "nano2": 9408}
LARGEST = {"nano": (20e6, 10e6), "nano2": (21e6, 10.1e6)}  # bytes of the folder, weights
each_folder = pytest.mark.parametrize("folder", FOLDERS.values(), ids=FOLDERS)
PROMPT = "picture of an item"

RED, GREEN, BLUE, YELLOW, WHITE = (215, 35, 35), (45, 150, 60), (40, 90, 205), (245, 210, 50), (255, 255, 255)


@pytest.fixture(scope="module", params=FOLDERS)
def nano(request: pytest.FixtureRequest) -> Backbone:
    section = {"min_pixels": MIN_PIXELS[request.param], "max_pixels": 12544, "max_text_tokens": 128, "pooling": "mean"}
    return build(Nano(kind=request.param, **section), torch.device("cpu"))


@torch.inference_mode()
def texts(nano: Backbone, *words: str) -> torch.Tensor:
    return torch.nn.functional.normalize(nano.encode(nano.model, nano.text_inputs(words)), dim=-1)


@torch.inference_mode()
def images(nano: Backbone, *images: Image.Image) -> torch.Tensor:
    return torch.nn.functional.normalize(nano.encode(nano.model, nano.image_inputs(images, PROMPT)), dim=-1)


def drawn(shape: str, colour: tuple[int, int, int], size: int = 112, shift: int = 0) -> Image.Image:
    """A plain shape on white."""
    image = Image.new("RGB", (size, size), WHITE)
    draw = ImageDraw.Draw(image)
    low, high = size // 5 + shift, size - size // 5 + shift
    match shape:
        case "disc":
            draw.ellipse((low, low, high, high), fill=colour)
        case "square":
            draw.rectangle((low, low, high, high), fill=colour)
        case "triangle":
            draw.polygon([(low, high), (high, high), ((low + high) // 2, low)], fill=colour)
        case _:
            raise ValueError(shape)
    return image


def test_the_name_does_not_depend_on_the_package_s_path(nano):
    assert nano.info.kind == nano.info.name
    assert nano.info.kind in FOLDERS


@each_folder
def test_the_folder_is_small_and_whole(folder):
    names = {file.name for file in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json", "MODEL_CARD.md"} <= names
    assert sum(file.stat().st_size for file in folder.rglob("*")) <= LARGEST[folder.name][0]
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl", ".py"))]


@each_folder
def test_weights_are_float16_and_sound(folder):
    with safe_open(folder / "model.safetensors", "pt") as stored:
        for name in stored.keys():  # noqa: SIM118 - not a dictionary
            tensor = stored.get_tensor(name)
            assert tensor.dtype == torch.float16, name
            assert torch.isfinite(tensor.float()).all(), name
            # nothing near the end of float16's range, hence nothing lost there
            assert tensor.float().abs().max() < 1000, name


def test_it_is_the_real_architecture(nano):
    config = nano.model.config
    assert type(nano.model).__name__ == "Qwen2_5_VLForConditionalGeneration"
    assert config.vision_config.window_size == 56
    assert 0 < len(config.vision_config.fullatt_block_indexes) < config.vision_config.depth
    head_dim = config.text_config.hidden_size // config.text_config.num_attention_heads
    assert 2 * sum(config.text_config.rope_parameters["mrope_section"]) == head_dim
    assert config.tie_word_embeddings
    assert sum(weight.numel() for weight in nano.model.parameters()) < LARGEST[nano.info.kind][1]


def test_vectors_do_not_depend_on_the_batch(nano):
    words = ["red lipstick", "a long title of a garden hose with many words, 12 oz", ""]
    together = texts(nano, *words)
    alone = torch.cat([texts(nano, word) for word in words])
    torch.testing.assert_close(together, alone, **up_to_rounding(alone))
    shown = [drawn("disc", RED), drawn("square", BLUE, size=60), Image.new("RGB", (300, 40), GREEN)]
    alone = torch.cat([images(nano, image) for image in shown])
    torch.testing.assert_close(images(nano, *shown), alone, **up_to_rounding(alone))


@pytest.mark.parametrize(
    ("word", "alike", "unlike"),
    [
        ("red lipstick", "crimson lip colour", "garden hose"),
        ("running shoes", "sneakers", "coffee maker"),
        ("moisturizing face cream", "skin lotion", "screwdriver"),
        ("acoustic guitar", "violin", "dog food"),
        ("puppy", "dog", "airplane"),
        ("Organic Green Tea, 20 Bags", "herbal tea", "Cordless Drill 18V"),
    ],
)
def test_alike_words_are_near(nano, word, alike, unlike):
    own, near, far = texts(nano, word, alike, unlike)
    assert own @ near > own @ far + 0.1


COLOURS = {"red": RED, "green": GREEN, "blue": BLUE, "yellow": YELLOW}


def test_images_of_one_colour_are_near(nano):
    """Plain shapes in four colours, moved a little: the nearest has the same colour; for nano, whatever its shape."""
    shapes = [(shape, colour) for shape in ("disc", "square", "triangle") for colour in COLOURS.values()]
    first = images(nano, *[drawn(*shape) for shape in shapes])
    moved = images(nano, *[drawn(*shape, shift=5) for shape in shapes])
    scores = first @ moved.T
    same = torch.tensor([[one[1] == other[1] for other in shapes] for one in shapes])
    assert same[torch.arange(len(shapes)), scores.argmax(1)].all()
    if nano.info.kind == "nano":  # nano 2 tells shapes apart as well
        assert scores[same].min() > scores[~same].max()


def test_colour_words_find_their_colour(nano):
    """No image of this test was ever trained on."""
    shapes = images(nano, *[drawn("disc", colour) for colour in COLOURS.values()])
    words = texts(nano, *[f"{name} circle" for name in COLOURS])
    assert (words @ shapes.T).argmax(1).tolist() == [0, 1, 2, 3]


COMMON = {"MiniLM", "EfficientNet", "Apache-2.0", "MIT", "seed", "steps", "R@10"}
CARDS = {
    "nano": COMMON | {"WordNet", "openclipart", "emojibase", "CC-BY"},
    "nano2": COMMON | {"sda_core/backbones/nano/MODEL_CARD.md", "clothing-dataset", "GroceryStoreDataset", "CC0 1.0"},
}


@pytest.mark.parametrize("kind", CARDS)
def test_the_card_says_what_it_must(kind):
    card = (FOLDERS[kind] / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert not [word for word in CARDS[kind] if word not in card]
