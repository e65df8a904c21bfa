"""The held-out half of this list is never edited and never used in development; only its score is reported.

What people say in a creative conversation besides the world's own requests, with the behaviour that they expect:
`entries.py` defines and loads the list, `judge.py` judges the outcome of a phrase.
"""
