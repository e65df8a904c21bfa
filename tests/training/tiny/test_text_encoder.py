"""The labels that the text encoder is trained on."""

from omnivideo.synthetic.captions import RELATIONS, Caption
from omnivideo.synthetic.facts import ObjectSpec, SceneSpec
from omnivideo.synthetic.scenes import BACKGROUNDS, COLOURS
from omnivideo.training.tiny import text_encoder


def test_tokens_are_labelled_with_the_object_of_their_phrase(text_tokenizer):
    things = (ObjectSpec("circle", "red", "small"), ObjectSpec("square", "blue"))
    text = "a small red circle left of a blue square on black"
    caption = Caption(text, SceneSpec(things, background="black", relation="left of"), ((0, 18), (27, 40)))
    offsets = text_tokenizer(text, return_offsets_mapping=True).offset_mapping
    token_labels = text_encoder.label_caption_tokens(caption, offsets)
    colour, role, background = 1, len(text_encoder.SLOT_FIELDS), len(text_encoder.OBJECT_LABEL_SIZES)
    for (start, end), labels in zip(offsets, token_labels, strict=True):
        index = next((i for i, span in enumerate(caption.object_spans) if span[0] <= start < end <= span[1]), None)
        colours = [2 + list(COLOURS).index(thing.colour) for thing in things]
        assert labels[colour] == (text_encoder.IGNORE_INDEX if index is None else colours[index])
        assert labels[role] == (
            text_encoder.IGNORE_INDEX if index is None else 1 + RELATIONS.index(("left of", "right of")[index])
        )
        assert labels[background] == 1 + list(BACKGROUNDS).index("black")
