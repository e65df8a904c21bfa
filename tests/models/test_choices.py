"""The likelihoods of fixed answers: normalised where the answers branch, and nowhere else."""

import math

import pytest

from omnivideo.models.choices import BranchQuery, score_choices


def answer(choices, logprobs_by_prefix):
    """Drive `score_choices` with a table of log probabilities; return the probabilities and the queries."""
    queries, generator = [], score_choices(choices)
    try:
        query = next(generator)
        while True:
            queries.append(query)
            query = generator.send([logprobs_by_prefix[query.prefix_ids][token] for token in query.token_ids])
    except StopIteration as stop:
        return stop.value, queries


def test_answers_that_differ_in_the_first_token_need_one_query():
    probabilities, queries = answer([[5, 9], [6, 9]], {(): {5: math.log(0.3), 6: math.log(0.1)}})
    assert probabilities == pytest.approx([0.75, 0.25])
    assert queries == [BranchQuery((), (5, 6))]


def test_a_shared_beginning_is_asked_about_where_it_ends():
    table = {(): {1: math.log(0.2), 2: math.log(0.2)}, (1, 3): {4: math.log(0.01), 9: math.log(0.03)}}
    probabilities, queries = answer([[1, 3, 9], [1, 3, 4, 9], [2, 9]], table)
    assert probabilities == pytest.approx([0.375, 0.125, 0.5])
    assert [query.prefix_ids for query in queries] == [(), (1, 3)]


def test_very_unlikely_answers_do_not_underflow():
    probabilities, _ = answer([[1], [2]], {(): {1: -900.0, 2: -900.0}})
    assert probabilities == pytest.approx([0.5, 0.5])
