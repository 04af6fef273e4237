"""Flax models shared by training and serving.

`names()` lists the published families, one file each; `get(name)` is the
family's `Family` record. Sizes and switches are one `ModelConfig`.
"""
