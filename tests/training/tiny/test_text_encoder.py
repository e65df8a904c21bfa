"""The labels that the text encoder is trained on."""

from omnivideo.synthetic.captions import RELATIONS, Caption
from omnivideo.synthetic.facts import ObjectSpec, SceneSpec
from omnivideo.synthetic.scenes import BACKGROUNDS, COLOURS
from omnivideo.training.tiny import text_encoder


def test_every_token_is_told_about_the_object_whose_phrase_it_is_in(text_tokenizer):
    things = (ObjectSpec("circle", "red", "small"), ObjectSpec("square", "blue"))
    words = "a small red circle left of a blue square on black"
    said = Caption(words, SceneSpec(things, background="black", relation="left of"), ((0, 18), (27, 40)))
    offsets = text_tokenizer(words, return_offsets_mapping=True).offset_mapping
    told = text_encoder.label_caption_tokens(said, offsets)
    colour, role, background = 1, 4, len(text_encoder.OBJECT_LABEL_SIZES)
    for (start, end), labels in zip(offsets, told, strict=True):
        inside = next((at for at, span in enumerate(said.object_spans) if span[0] <= start < end <= span[1]), None)
        red_blue = [2 + list(COLOURS).index(thing.colour) for thing in things]
        assert labels[colour] == (text_encoder.IGNORE_INDEX if inside is None else red_blue[inside])
        assert labels[role] == (
            text_encoder.IGNORE_INDEX if inside is None else 1 + RELATIONS.index(("left of", "right of")[inside])
        )
        assert labels[background] == 1 + list(BACKGROUNDS).index("black")
