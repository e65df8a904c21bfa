"""Curation: a folder of videos becomes clips worth training on, and a report of what was kept, dropped and why.

bounds      what is allowed, and the stages in their order
reading     files into scenes, scenes into sampled frames, and frames into files
measures    the figure of every stage
aesthetic   the one that needs a downloaded model
pipeline    the stages over a folder on Dask, resumable after every clip
captions    a language model server's words for a clip
report      the page
command     `omnivideo data curate`
"""
