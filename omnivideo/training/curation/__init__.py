"""Curation: a folder of videos becomes clips worth training on, and a report of what was kept, dropped and why.

bounds      the limits, and the stages in order
reading     files into scenes, scenes into sampled frames, and frames into files
measures    the measurement of every stage
aesthetic   the measurement that needs a downloaded model
pipeline    the stages over a folder on Dask, resumable after every clip
captions    captions of clips from a language model server
journal     the records that a killed run continues from
report      the HTML page
"""
